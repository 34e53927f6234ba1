"""Configurations and presets of the denoiser: parameters and FLOPs of the paper, round trips, errors."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformer_cases import EVERYTHING, FEATURES, SMALL, inputs, make

from walt.model.config import TransformerConfig
from walt.model.transformer import Transformer, split
from walt.presets import PRESETS
from walt_kernels import use_backend

L, XL = PRESETS["L"][1], PRESETS["XL"][1]
L_TEXT = PRESETS["L-T2V"][1]


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (L, 313.2),
        (replace(L, adaln_rank=4), 313.6),
        (replace(L, adaln_rank=16), 315.7),
        (replace(L, adaln_rank=64), 323.9),
        (replace(L, adaln_rank=256), 356.9),
        (replace(L, adaln="separate"), 457.7),
        (XL, 460.0),
        (L_TEXT, 419.3),
        (replace(L_TEXT, cross_attention="all"), 419.3),
        (replace(L_TEXT, layers=40, width=1408), 1299),
    ],
    ids=["L r=2", "L r=4", "L r=16", "L r=64", "L r=256", "L separate", "XL", "L T2V", "L T2V video", "40x1408 T2V"],
)
def test_parameters_of_the_paper(config: TransformerConfig, millions: float) -> None:
    assert abs(parameters(config) / (millions * 1e6) - 1) < 1e-3


@pytest.mark.parametrize(("layers", "width"), [(24, 1024), (40, 1408)])
def test_third_modulation_of_text(layers: int, width: int) -> None:
    """416 M and 1.293 B with 6d modulations in place of 9d, as counted for the paper's tables."""
    narrow = parameters(replace(L_TEXT, layers=layers, width=width))
    narrow -= 3 * width * width + 3 * width + layers * 2 * 3 * width
    assert abs(narrow / {24: 416.0e6, 40: 1293e6}[layers] - 1) < 1e-3


@pytest.mark.parametrize(("adaln", "millions"), [("separate", 475.8), ("lora", 12.66)])
def test_modulations_of_the_paper(adaln: str, millions: float) -> None:
    """ViT-g, 40x1408, AdaLN alone. (12.66 M counts no LoRA pair in the first layer; ours has one in each.)"""
    with torch.device("meta"):
        modulation = Transformer(TransformerConfig(layers=40, width=1408, adaln=adaln)).modulation
    assert sum(p.numel() for p in modulation.parameters()) / 1e6 == pytest.approx(millions, rel=3e-3)


@pytest.mark.parametrize("branches", [2, 3])
def test_modulations_of_all_layers_are_split_at_once(branches: int) -> None:
    """A layer more does not add to the ops, which are launches, that split them and join their gradients."""

    class Calls(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.ops: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops.append(str(func))
            return func(*args, **(kwargs or {}))

    seen = []
    for layers in (2, 5):
        modulations = torch.randn(layers, 3, 3 * branches * 4, requires_grad=True)
        with Calls() as calls:
            rows = [row for layer in split(modulations, branches) for kind in layer for row in kind]
            (gradient,) = torch.autograd.grad(rows, modulations, [row.detach() for row in rows])
        assert torch.equal(gradient, modulations)
        assert torch.equal(torch.cat(rows, dim=-1), modulations.transpose(0, 1).flatten(1))
        seen.append([name for name in calls.ops if "detach" not in name])
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("name", "billions", "tolerance"), [("sr-1.3B", 1.3, 0.01), ("sr-419M", 0.419, 0.02), ("base-3B", 3.11, 0.02)]
)
def test_presets_of_the_cascade(name: str, billions: float, tolerance: float) -> None:
    assert parameters(PRESETS[name][1]) / 1e9 == pytest.approx(billions, rel=tolerance)


def parameters(config: TransformerConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def test_flops_of_the_paper() -> None:
    """809 GFLOP a sample of L; 934 if every layer attended to all tokens."""
    assert L.tokens == 1280
    assert round(sum(L.flops().values()) / 1e9) == 809
    full = replace(L, spacetime_window=L.grid)
    doubled = 2 * sum(full.flops().values()) - sum(L.flops().values())  # S layers, too, would grow
    everywhere = sum(L.flops().values()) - L.flops()["attention windows"] + 24 * 4 * 1280**2 * 1024
    assert sum(L.flops().values()) < sum(full.flops().values()) < everywhere < doubled + everywhere
    assert round(everywhere / 1e9) == 934


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, adaln="separate", patch=2, spatial_window=(1, 2, 3)),
        replace(FEATURES, cross_attention="all"),
        EVERYTHING,
    ],
)
def test_flops_are_those_that_run(config: TransformerConfig) -> None:
    """PyTorch counts the products it sees; it sees all of them when our ops run as plain PyTorch."""
    model = make(config)
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        model(**inputs(1, config))
    assert counter.get_total_flops() == sum(config.flops().values())


def test_flops_of_windows_that_do_not_divide() -> None:
    config = replace(SMALL, latent_size=(3, 5, 7), spatial_window=(1, 2, 4), spacetime_window=(2, 5, 3))
    scores = 0
    for window in config.windows():
        cuts = [
            [min(side, size - i) for i in range(0, size, side)] for size, side in zip(config.grid, window, strict=True)
        ]
        scores += sum((a * b * c) ** 2 for a in cuts[0] for b in cuts[1] for c in cuts[2])
    assert config.flops()["attention windows"] == 2 * 2 * scores * config.width


def test_configuration_round_trip() -> None:
    for config in (SMALL, *(pair[1] for pair in PRESETS.values())):
        assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_presets_fit_together() -> None:
    for tokenizer, transformer in PRESETS.values():
        frames, height, width = transformer.latent_size
        pixels = tokenizer.video_shape(frames, height, width)[1:]
        assert tokenizer.latent_shape(*pixels) == (transformer.latent_channels, *transformer.latent_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 33}, "heads: got 2; expected a divisor of width=33"),
        ({"layers": 0}, "layers: got 0"),
        ({"patch": 4}, "patch: got 4; expected a divisor of the latent's 4 rows and 6 columns"),
        ({"spatial_window": [2, 4, 6]}, "spatial_window: got .* expected one frame"),
        ({"spacetime_window": [3, 2]}, "spacetime_window: got"),
        ({"adaln": "full"}, "adaln: got 'full'; expected lora or separate"),
        ({"time_features": 15}, "time_features: got 15; expected an even int"),
        ({"classes": -1}, "classes: got -1"),
        ({"text_width": -1}, "text_width: got -1"),
        ({"text_vocabulary": 9}, "text_width: got 0; expected an int >= 1 with a text_vocabulary"),
        ({"text_length": 0}, "text_length: got 0"),
        ({"cross_attention": "none"}, "cross_attention: got 'none'; expected spatial or all"),
        ({"frame_condition": 1}, "frame_condition: got 1; expected true or false"),
        ({"low_resolution": True, "latent_size": [3, 3, 6]}, r"latent_size: got \(3, 3, 6\); expected an even height"),
        ({"depth": 3}, "TransformerConfig: got 'depth'"),
    ],
)
def test_bad_configuration(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_dict({**SMALL.to_dict(), **changes})


def test_configuration_must_be_a_dict() -> None:
    with pytest.raises(ValueError, match="TransformerConfig: got 3; expected a dict"):
        TransformerConfig.from_dict(3)  # type: ignore[arg-type]
