"""A trained denoiser with its diffusion process, read from a folder; and whether several fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from walt.checkpoint import best_weights, load_description, load_weights, read_tensors
from walt.errors import as_user_error
from walt.model.config import ClipShape, DiffusionConfig, TransformerConfig
from walt.model.diffusion import Diffusion
from walt.model.text import TextEncoder, check_text
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer


@dataclass
class Denoiser:
    """A denoiser, its diffusion process and the clips it makes."""

    transformer: Transformer
    diffusion: Diffusion
    clip: ClipShape


def load_denoiser(folder: str | Path) -> tuple[Denoiser, dict[str, Any]]:
    """The denoiser of a checkpoint folder, averaged weights if it has them, and what its config.json says."""
    folder, document = load_description(folder, "transformer")
    with as_user_error(str(folder / "config.json")):
        transformer = Transformer(TransformerConfig.from_dict(document.get("config", {})))
        diffusion = Diffusion(DiffusionConfig.from_dict(document.get("diffusion", {})))
        clip = ClipShape(**document.get("clip", {}))
    path = best_weights(folder)
    load_weights(transformer, read_tensors(path), path)
    return Denoiser(transformer.eval(), diffusion, clip), document


def check_fit(tokenizer: Tokenizer, stages: Sequence[Denoiser], text: TextEncoder | None) -> None:
    """Raise ValueError, naming the field, unless the base model and the super-resolution stages after it fit."""
    named = [("transformer" if i == 0 else f"sr{i}", denoiser) for i, denoiser in enumerate(stages)]
    for i, (name, denoiser) in enumerate(named):
        config, clip = denoiser.transformer.config, denoiser.clip
        channels, *size = tokenizer.config.latent_shape(clip.frames, clip.height, clip.width)
        _expect(f"{name} latent_channels", config.latent_channels, channels, "as the tokenizer has")
        _expect(f"{name} latent_size", config.latent_size, tuple(size), f"the tokenizer's of {clip}")
        _expect(f"{name} low_resolution", config.low_resolution, i > 0, "by its place in the cascade")
        if config.text_width and text is None:
            raise ValueError(f"text: got no text encoder; expected one: {name} has text_width={config.text_width}")
        if config.text_width and text is not None:
            check_text(config, text)
    for (_, before), (name, after) in pairwise(named):
        frames, height, width = before.transformer.config.latent_size
        expected = (frames, 2 * height, 2 * width)
        _expect(f"{name} latent_size", after.transformer.config.latent_size, expected, "twice the stage before it")


def _expect(name: str, got: object, expected: object, why: str) -> None:
    if got != expected:
        raise ValueError(f"{name}: got {got}; expected {expected}, {why}")
