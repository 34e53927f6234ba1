"""What the commands do beside the demo: train on a folder, sample, evaluate, describe a configuration."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from walt.config import PRESETS, TokenizerConfig, TransformerConfig
from walt.data import centre_square, folder_clips, shrink
from walt.errors import WaltError, user_values
from walt.evaluate import psnr
from walt.pipeline import ClipShape, WaltPipeline, load_tokenizer
from walt.stages import decode, encode, fitted, new_transformer, prepare_latents
from walt.stages import train_tokenizer as run_tokenizer
from walt.stages import train_transformer as run_transformer
from walt.tokenizer import Tokenizer
from walt.training import Trainer, TrainingConfig
from walt.transformer import Transformer
from walt.video import read_video, tile, write_png, write_video

FPS = 12


def preset(name: str) -> tuple[TokenizerConfig, TransformerConfig]:
    if name not in PRESETS:
        raise WaltError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def train_tokenizer(arguments: argparse.Namespace) -> None:
    config, _ = preset(arguments.preset)
    _, data = _settings(arguments, config)
    train, test = folder_clips(arguments.data, frames=arguments.frames, size=arguments.size)
    tokenizer, trainer = run_tokenizer(
        train,
        config,
        _training(arguments),
        arguments.out / "tokenizer",
        batch=arguments.batch,
        frames=arguments.frames,
        data=data,
    )
    _report(trainer)
    if len(test):
        print(_psnr_line(tokenizer, test.video))


def train_base(arguments: argparse.Namespace) -> None:
    clip, data = _settings(arguments, preset(arguments.preset)[0])
    tokenizer = load_tokenizer(arguments.out / "tokenizer")
    train, _ = folder_clips(arguments.data, frames=arguments.frames, size=arguments.size, held_out=0)
    config = fitted(tokenizer.config, preset(arguments.preset)[1], arguments.frames, arguments.size, len(train.classes))
    transformer, diffusion = new_transformer(config, arguments.seed)
    _, trainer = run_transformer(
        transformer,
        diffusion,
        prepare_latents(tokenizer, train),
        _training(arguments),
        arguments.out / "transformer",
        batch=arguments.batch,
        images=arguments.batch // 4,
        clip=clip,
        classes=train.classes,
        data=data,
    )
    _report(trainer)


def _settings(arguments: argparse.Namespace, config: TokenizerConfig) -> tuple[ClipShape, dict[str, object]]:
    with user_values("--frames, --size"):
        config.latent_shape(arguments.frames, arguments.size, arguments.size)
    data = {"folder": str(arguments.data), "frames": arguments.frames, "size": arguments.size, "batch": arguments.batch}
    return ClipShape(arguments.frames, arguments.size, arguments.size, FPS), data


def _training(arguments: argparse.Namespace) -> TrainingConfig:
    return TrainingConfig(arguments.steps, lr=arguments.lr, seed=arguments.seed)


def _report(trainer: Trainer[Any]) -> None:
    print(f"{trainer.folder}: {trainer.step} steps in {trainer.elapsed:.0f} s; losses in {trainer.log_path}")


def sample(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out or Path("samples.png" if arguments.images else "samples.mp4")
    allowed = (".png",) if arguments.images else (".mp4", ".gif")
    if out.suffix.lower() not in allowed:
        raise WaltError(f"cannot write {out}: the name must end in {' or '.join(allowed)}")
    pipeline = WaltPipeline.from_pretrained(arguments.source)
    if arguments.label is None and pipeline.classes:
        labels = [i % len(pipeline.classes) for i in range(arguments.num or len(pipeline.classes))]
    else:
        number = pipeline.label(arguments.label)
        labels = [] if number is None else [number] * (arguments.num or 1)
    made = pipeline.generate(
        labels or None,
        len(labels) or arguments.num or 1,
        steps=arguments.steps,
        seed=arguments.seed,
        images=arguments.images,
    )
    if arguments.images:
        write_png(out, tile(made[:, None], columns=min(8, len(made)))[0])
    else:
        write_video(out, tile(made, columns=min(4, len(made))), pipeline.clip.fps)
    names = ", ".join(dict.fromkeys(pipeline.classes[i] for i in labels)) or "no class"
    print(f"{out}: {len(made)} {'pictures' if arguments.images else 'clips'} of {names}")


def evaluate(arguments: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(arguments.source / "tokenizer")
    with user_values("--frames, --size"):
        tokenizer.config.latent_shape(arguments.frames, arguments.size, arguments.size)
    video = read_video(arguments.video, frames=arguments.frames)
    print(_psnr_line(tokenizer, shrink(centre_square(video), arguments.size, arguments.size)[None]))


def _psnr_line(tokenizer: Tokenizer, video: np.ndarray) -> str:
    decibel = psnr(decode(tokenizer, encode(tokenizer, video)), video)
    return f"reconstruction PSNR {decibel.mean():.2f} dB over {len(video)} clips of {video.shape[1]} frames"


def info(arguments: argparse.Namespace) -> None:
    names = list(PRESETS) if arguments.all else [arguments.name]
    print("\n\n".join(describe(name) for name in names))


def describe(name: str) -> str:
    """Shapes, parameters and FLOPs of a preset; the networks are built without memory (meta device)."""
    coder, denoiser = preset(name)
    with torch.device("meta"):
        tokenizer, transformer = Tokenizer(coder), Transformer(denoiser)
    _, frames, height, width = coder.video_shape(*denoiser.latent_size)
    flops = sum(denoiser.flops().values())
    lines = [
        name,
        f"  video            {frames} x {height} x {width} (frames x height x width), RGB",
        f"  latent           {' x '.join(map(str, denoiser.latent_size))}, {denoiser.latent_channels} channels",
        f"  tokens           {denoiser.tokens} = {' x '.join(map(str, denoiser.grid))}, patch {denoiser.patch}",
        f"  windows          {' x '.join(map(str, denoiser.spatial_window))} and"
        f" {' x '.join(map(str, denoiser.spacetime_window))}, in turn",
        f"  tokenizer        {_millions(tokenizer)} parameters: encoder {_millions(tokenizer.encoder)},"
        f" decoder {_millions(tokenizer.decoder)}",
        f"  transformer      {_millions(transformer)} parameters: {denoiser.layers} layers, width {denoiser.width},"
        f" {denoiser.heads} heads, {denoiser.classes} classes",
        f"  FLOPs a sample   {flops / 1e9:.1f} G for a pass of the transformer, {flops * 50 / 1e12:.2f} T for 50 steps",
        *(f"    {part:<22} {value / 1e9:9.2f} G" for part, value in denoiser.flops().items()),
    ]
    return "\n".join(lines)


def _millions(model: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M"
