"""No batch leaves a parameter of walt's networks without a gradient: DDP need not look for such in every step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from on_ranks import Net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from walt import distributed
from walt.model.config import TransformerConfig
from walt.model.diffusion import Diffusion
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.presets import PRESETS
from walt.settings import TokenizerLossConfig
from walt.train.discriminator import Discriminator
from walt.train.losses import DiscriminatorLoss, LeCam

IMAGES = {"absent": None, "none": [0, 0], "both": [0, 1], "all": [1, 1]}


def without_gradient(network: nn.Module) -> list[str]:
    assert not getattr(network, "unused_parameters", False)
    return [name for name, parameter in network.named_parameters() if parameter.grad is None]


def small(config: TransformerConfig, **changes) -> TransformerConfig:
    frames = min(config.latent_size[0], 2)
    sizes = {"layers": 2, "width": 16, "heads": 2, "latent_size": (frames, 8, 8), "time_features": 8, "text_length": 6}
    windows = {"spatial_window": (1, 2, 2), "spacetime_window": (frames, 2, 2)}
    return replace(config, **sizes, **windows, text_width=min(config.text_width, 8), **changes)


CHANGES = [{}, {"adaln": "separate"}, {"self_condition": False}, {"frame_condition": True}, {"cross_attention": "all"}]
CHANGES += [{"qk_norm": False}, {"bias_tables": False}, {"layers": 1}]


@pytest.mark.parametrize("preset", PRESETS)
def test_transformers(preset):
    """Of every preset and condition; all dropped, or none; with images, without, and with nothing else."""
    diffusion = Diffusion()
    for change in CHANGES:
        config = replace(small(PRESETS[preset][1]), **change)
        torch.manual_seed(0)
        model = Transformer(config)
        x0 = torch.randn(2, config.latent_channels, *config.latent_size)
        given: dict[str, torch.Tensor] = {}
        if config.classes:
            given["label"] = torch.tensor([0, 1])
        if config.text_width:
            ids = torch.zeros(2, 6, dtype=torch.int64)
            given["text"] = ids if config.text_vocabulary else torch.randn(2, 6, config.text_width)
            given["text_mask"] = torch.tensor([[True] * 6, [True] + [False] * 5])
        if config.low_resolution:
            given["low_resolution"] = torch.randn(2, config.latent_channels, config.latent_size[0], 4, 4)
        for kind, image in IMAGES.items():
            if image is not None and config.cross_attention == "all":
                continue  # refused
            more = {} if image is None else {"image": torch.tensor(image, dtype=torch.bool)}
            for flag in (False, True):
                model.zero_grad()
                generators = [torch.Generator().manual_seed(i) for i in range(2)]
                randoms = diffusion.randoms(x0.shape[1:], generators, low_resolution=config.low_resolution)
                randoms |= {name: torch.full((2,), flag) for name in ("dropped", "self_conditioned")}
                diffusion.loss(model, x0, randoms, **given, **more).backward()
                assert without_gradient(model) == [], (change, kind, flag)


@pytest.mark.parametrize("kind", ["video", "image"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("frames", [1, 5])
def test_tokenizers(kind, adaptive, frames):
    tokenizer = Tokenizer(replace(PRESETS["minimal"][0], kind=kind, adaptive_norm=adaptive, middle_blocks=1))
    tokenizer.decode(tokenizer.encode(torch.randn(1, 3, frames, 16, 16))).square().mean().backward()
    assert without_gradient(tokenizer) == []


@pytest.mark.parametrize("penalise", [False, True])
@pytest.mark.parametrize("frames", [1, 5])
def test_discriminators(frames, penalise):
    discriminator = Discriminator(4)
    video = torch.randn(1, 3, frames, 16, 16)
    batch = {"video": video, "reconstruction": video.flip(-1), "penalise": penalise}
    DiscriminatorLoss(TokenizerLossConfig(), LeCam())(discriminator, batch)[0].backward()
    assert without_gradient(discriminator) == []


def test_only_networks_that_say_so_are_searched(monkeypatch):
    seen = []
    monkeypatch.setattr(DistributedDataParallel, "__init__", lambda self, module, **options: seen.append(options))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_: None)
    for network in (Net(), nn.Linear(2, 2)):
        distributed.parallel(nn.Sequential(network), network, "ddp")
    assert [options["find_unused_parameters"] for options in seen] == [True, False]
