"""A small denoiser with every parameter away from its initial value, and inputs for it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from walt.model.config import TransformerConfig
from walt.model.transformer import Transformer

SMALL = TransformerConfig(
    layers=3,
    width=32,
    heads=2,
    latent_channels=4,
    latent_size=(3, 4, 6),
    spatial_window=(1, 4, 6),
    spacetime_window=(3, 2, 3),
    classes=5,
    time_features=16,
)
# Text as features, and text as token ids with every other condition; patches of two sizes.
FEATURES = replace(SMALL, text_width=12, text_length=5)
EVERYTHING = replace(
    SMALL,
    text_width=6,
    text_length=4,
    text_vocabulary=9,
    frame_condition=True,
    low_resolution=True,
    patch=2,
    spatial_window=(1, 2, 3),
    spacetime_window=(3, 1, 2),
)
SHAPE = (2, 4, 3, 4, 6)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(config: TransformerConfig = SMALL, seed: int = 0) -> Transformer:
    """A float64 model whose every parameter is away from its initial value."""
    torch.manual_seed(seed)
    model = Transformer(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def inputs(batch: int = 2, config: TransformerConfig = SMALL) -> dict[str, Tensor]:
    """Everything that a model of this configuration takes, but `image`."""
    shape = (batch, config.latent_channels, *config.latent_size)
    given = {"z_t": draw(*shape), "time": torch.tensor([999, 3, 500, 77])[:batch]}
    if config.classes:
        given["label"] = torch.arange(batch) % config.classes
    if config.self_condition:
        given["self_condition"] = draw(*shape, seed=1)
    if config.text_width:
        length = config.text_length
        if config.text_vocabulary:
            given["text"] = torch.arange(batch * length).reshape(batch, length) % config.text_vocabulary
        else:
            given["text"] = draw(batch, length, config.text_width, seed=2)
        given["text_mask"] = torch.arange(length) < torch.tensor([2, 0, length, 1])[:batch, None]
    if config.frame_condition:
        given["frames"], given["known"] = draw(*shape, seed=3), torch.tensor([1, 2, 0, 1])[:batch]
    if config.low_resolution:
        given["low_resolution"] = draw(*shape[:3], shape[3] // 2, shape[4] // 2, seed=4)
        given["noise_level"] = torch.tensor([30, 200, 0, 5])[:batch]
    return given


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * max(1.0, expected.abs().max().item()))
