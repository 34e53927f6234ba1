"""`walt info`: shapes, parameters, FLOPs and memory of presets and trained models; the card of one that has a card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import nn

from walt.commands.options import Command, Positive, value
from walt.demo.card import CARD, describe_model
from walt.errors import WaltError, nearest_or_all
from walt.model.config import TokenizerConfig, TransformerConfig
from walt.model.cost import STATES, activation_bytes, count
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.presets import PRESETS
from walt.pretrained import load_tokenizer, model_folder, packaged
from walt.sample.denoiser import load_denoiser


@dataclass(kw_only=True)
class Info(Command):
    name: tyro.conf.Positional[Annotated[str, value(str, "NAME")]] = "tiny"  # a preset, tiny-doom, or a model's folder
    all: bool = False  # every preset, as a table
    batch: Positive = 1  # for the memory

    examples = ("walt info L", "walt info --all", "walt info tiny-doom", "walt info runs/mine")

    def run(self) -> None:
        if self.all:
            print(table(self.batch))
        elif self.name not in PRESETS and (folder := trained(self.name)) and (folder / CARD).is_file():
            print(describe_model(folder))
        else:
            print(describe(self.name, self.batch))


def trained(name: str) -> Path | None:
    """The folder of the trained model of that name, if there is one."""
    return model_folder(name) if str(Path(name)) in packaged() or Path(name).is_dir() else None


def configs(name: str) -> tuple[TokenizerConfig, TransformerConfig]:
    """The tokenizer's and the base model's, of a preset or a trained model."""
    if name in PRESETS:
        return PRESETS[name]
    if folder := trained(name):
        denoiser, _ = load_denoiser(folder / "transformer")
        return load_tokenizer(folder / "tokenizer").config, denoiser.transformer.config
    raise WaltError(f"unknown preset or folder {name!r}{nearest_or_all(name, [*PRESETS, *packaged()])}")


def networks(coder: TokenizerConfig, denoiser: TransformerConfig) -> tuple[Tokenizer, Transformer]:
    """The networks on the meta device."""
    with torch.device("meta"):
        return Tokenizer(coder), Transformer(denoiser)


def describe(name: str, batch: int = 1) -> str:
    """Shapes, parameters, FLOPs and memory of a preset or a trained model, and how its FLOPs divide."""
    coder, denoiser = configs(name)
    tokenizer, transformer = networks(coder, denoiser)
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
        tokenizer, transformer = networks(coder, denoiser)
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
