"""`walt info`: shapes, parameters, FLOPs and memory of the presets; the card of a model in this package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from torch import nn

from walt.commands.options import Command, Positive, value
from walt.demo.card import describe_model
from walt.errors import WaltError, did_you_mean
from walt.model.config import TokenizerConfig, TransformerConfig
from walt.model.cost import STATES, activation_bytes, count
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.presets import PRESETS
from walt.pretrained import model_folder, packaged


@dataclass(kw_only=True)
class Info(Command):
    name: tyro.conf.Positional[Annotated[str, value(str, "NAME")]] = "tiny"  # a preset, or a model such as tiny-doom
    all: bool = False  # every preset, as a table
    batch: Positive = 1  # for the memory

    examples = ("walt info L", "walt info --all", "walt info tiny-doom")

    def run(self) -> None:
        if self.name in packaged() and not self.all:
            print(describe_model(model_folder(self.name)))
        else:
            print(table(self.batch) if self.all else describe(self.name, self.batch))


def preset(name: str) -> tuple[TokenizerConfig, TransformerConfig]:
    if name not in PRESETS:
        known = [*PRESETS, *packaged()]
        nearest = did_you_mean(name, known) or f"; there are {', '.join(known)}"
        raise WaltError(f"unknown preset {name!r}{nearest}")
    return PRESETS[name]


def networks(name: str) -> tuple[Tokenizer, Transformer]:
    """The preset's networks on the meta device."""
    coder, denoiser = preset(name)
    with torch.device("meta"):
        return Tokenizer(coder), Transformer(denoiser)


def describe(name: str, batch: int = 1) -> str:
    """Shapes, parameters, FLOPs and memory of a preset, and how its FLOPs divide."""
    coder, denoiser = preset(name)
    tokenizer, transformer = networks(name)
    _, frames, height, width = coder.video_shape(*denoiser.latent_size)
    flops = sum(denoiser.flops().values())
    conditions = [f"{denoiser.classes} classes"] if denoiser.classes else []
    if denoiser.text_width:
        conditions.append(f"text of {denoiser.text_length} tokens")
    conditions += ["first frames"] * denoiser.frame_condition + ["a low resolution"] * denoiser.low_resolution
    lines = [
        name,
        f"  video            {frames} x {height} x {width} (frames x height x width), RGB",
        f"  latent           {' x '.join(map(str, denoiser.latent_size))}, {denoiser.latent_channels} channels",
        f"  tokens           {denoiser.tokens} = {' x '.join(map(str, denoiser.grid))}, patch {denoiser.patch}",
        f"  windows          {' x '.join(map(str, denoiser.spatial_window))} and"
        f" {' x '.join(map(str, denoiser.spacetime_window))}, in turn",
        f"  conditions       {', '.join(conditions) or 'none'}",
        f"  tokenizer        {_millions(tokenizer)} parameters: encoder {_millions(tokenizer.encoder)},"
        f" decoder {_millions(tokenizer.decoder)}",
        f"  transformer      {_millions(transformer)} parameters: {denoiser.layers} layers, width {denoiser.width},"
        f" {denoiser.heads} heads",
        f"  to train it      {_size(STATES * 4 * count(transformer))} of states (AdamW, average);"
        f" {_size(activation_bytes(denoiser, batch))} of activations for a batch of {batch} in float32,"
        f" {_size(activation_bytes(denoiser, batch, checkpointing=True))} with checkpointing",
        f"  FLOPs a sample   {flops / 1e9:.1f} G for a pass of the transformer, {flops * 50 / 1e12:.2f} T for 50 steps",
        *(f"    {name:<28} {value / 1e9:9.2f} G" for name, value in denoiser.flops().items()),
    ]
    return "\n".join(lines)


def table(batch: int = 1) -> str:
    """One line for each preset; activations for a batch, in float32."""
    row = "{:<12} {:>15} {:>12} {:>7} {:>10} {:>12} {:>10} {:>12} {:>14}"
    head = ("preset", "video", "latent", "tokens", "tokenizer", "transformer", "GFLOPs", "activations", "checkpointed")
    lines = [row.format(*head)]
    for name, (coder, denoiser) in PRESETS.items():
        tokenizer, transformer = networks(name)
        video = "x".join(map(str, coder.video_shape(*denoiser.latent_size)[1:]))
        latent = "x".join(map(str, denoiser.latent_size))
        lines.append(
            row.format(
                *(name, video, latent, denoiser.tokens, _millions(tokenizer), _millions(transformer)),
                f"{sum(denoiser.flops().values()) / 1e9:.1f}",
                _size(activation_bytes(denoiser, batch)),
                _size(activation_bytes(denoiser, batch, checkpointing=True)),
            )
        )
    return "\n".join([*lines, f"FLOPs of one pass over one sample; activations in float32 for a batch of {batch}"])


def _millions(model: nn.Module) -> str:
    parameters = count(model)
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters / 1e6:.3f} M"


def _size(size: int) -> str:
    unit, name = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB") if size >= 2**20 else (2**10, "KiB")
    return f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size / unit:.0f} {name}"
