"""Sampling through CUDA graphs: the samples of plain calls, and plain calls where there is no GPU or a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from walt.model.config import DiffusionConfig
from walt.model.diffusion import Diffusion, model_config
from walt.model.transformer import Transformer
from walt.presets import PRESETS
from walt.sample.replay import Replayed

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, z_t: torch.Tensor, time: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return sum(conditions.values(), z_t * 2 + time[:, None])


def transformer(device: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(PRESETS["tiny"][1]).to(device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def test_without_a_gpu_calls_are_the_modules_own() -> None:
    module = Counting()
    replayed = Replayed(module)
    with torch.no_grad():
        for i in range(4):
            x = torch.full((2, 3), float(i))
            assert torch.equal(replayed(x, torch.ones(2), text=x), 3 * x + 1)
    assert module.calls == 4


def test_a_wrapped_transformer_has_its_configuration() -> None:
    model = transformer("cpu")
    assert model_config(Replayed(model)) is model.config


@pytest.mark.gpu
@gpu
def test_later_calls_are_replays_of_the_second() -> None:
    module = Counting()
    replayed = Replayed(module)
    with torch.no_grad():
        results = [
            replayed(torch.full((2, 3), float(i), device="cuda"), torch.ones(2, device="cuda")) for i in range(5)
        ]
        for i, result in enumerate(results):  # each in memory of its own
            assert torch.equal(result, torch.full_like(result, 2 * i + 1))
        assert module.calls == 2
        assert replayed(torch.zeros(3, 3, device="cuda"), torch.ones(3, device="cuda")).shape == (3, 3)
        assert module.calls == 3
    replayed(torch.zeros(2, 3, device="cuda", requires_grad=True), torch.ones(2, device="cuda")).sum().backward()
    assert module.calls == 4


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("options", [{}, {"guidance": 2.0}], ids=str)
def test_samples_are_those_of_plain_calls(options: dict[str, Any]) -> None:
    model = transformer("cuda")
    diffusion = Diffusion(DiffusionConfig())
    noise = torch.randn(2, model.config.latent_channels, *model.config.latent_size)
    given = {"label": torch.tensor([0, 1]), "steps": 6, **options}
    plain = diffusion.sample(model, noise, **given)
    assert torch.equal(diffusion.sample(Replayed(model), noise, **given), plain)
