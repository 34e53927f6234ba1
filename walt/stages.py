"""The two stages of training: what a step is, and the latents that join them; for `walt demo` and `walt train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from walt.checkpoint import fingerprint
from walt.data.loading import Batch, Source
from walt.data.pixels import to_model, to_pixels
from walt.data.simulator import Clips
from walt.model.config import (
    ClipShape,
    DiffusionConfig,
    TokenizerConfig,
    TransformerConfig,
    tokenizer_description,
    transformer_description,
)
from walt.model.diffusion import Diffusion
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.settings import TokenizerLossConfig, TrainingConfig
from walt.train.losses import DecorrelationTerm, DenoiserLoss, ReconstructionTerm, TokenizerLoss
from walt.train.objective import Objective
from walt.train.tokenizer import STATISTICS, set_statistics
from walt.train.trainer import Trainer

IMAGE_STRIDE = 4  # every fourth frame of a clip also serves as an image


def tokenizer_source(clips: Clips, frames: int) -> Source:
    """Random clips, and a random run of `frames` frames of them.

    The tokenizer is causal, so short runs teach it what whole clips would and cost less. Frames stay whole: its norms
    pool over a frame, and what they learn on crops does not hold for frames.
    """
    video = torch.from_numpy(clips.video)

    def source(shared: torch.Generator, samples: Mapping[int, torch.Generator]) -> Batch:
        start = int(torch.randint(video.shape[1] - frames + 1, (), generator=shared))
        index = [int(torch.randint(len(clips), (), generator=own)) for own in samples.values()]
        return {"video": to_model(video[index, start : start + frames])}

    return source


def tokenizer_loss() -> TokenizerLoss:
    return TokenizerLoss(TokenizerLossConfig(reconstruction=1.0), [ReconstructionTerm(), DecorrelationTerm()])


@dataclass(frozen=True)
class Latents:
    """What the second stage trains on, normalised: video [N, c, 1+t, h, w], image [M, c, h, w] sorted by label.

    tokenizer: the fingerprint of that which made them.
    """

    video: Tensor
    video_label: Tensor
    image: Tensor
    image_label: Tensor
    tokenizer: str = ""


@torch.inference_mode()
def encode(tokenizer: Tokenizer, video: np.ndarray, *, batch: int = 8, desc: str = "encode") -> Tensor:
    """uint8 [N, T, H, W, 3] -> latents [N, c, 1+t, h, w]."""
    chunks = torch.from_numpy(video).split(batch)
    bar = tqdm(chunks, desc=desc, unit="frame", unit_scale=batch * video.shape[1], leave=False)
    return torch.cat([tokenizer.encode(to_model(chunk)) for chunk in bar])


@torch.inference_mode()
def decode(tokenizer: Tokenizer, latent: Tensor, *, batch: int = 8) -> np.ndarray:
    """The inverse of `encode`."""
    return np.concatenate([to_pixels(tokenizer.decode(part)) for part in latent.split(batch)])


def prepare_latents(tokenizer: Tokenizer, clips: Clips) -> Latents:
    """Encode all clips, and single frames of them as images."""
    frames = clips.video[:, ::IMAGE_STRIDE]
    label = torch.from_numpy(clips.label)
    image_label = label.repeat_interleave(frames.shape[1])
    order = image_label.argsort(stable=True)
    image = encode(tokenizer, frames.reshape(-1, 1, *frames.shape[2:]), batch=64, desc="encode images")[:, :, 0]
    video, key = encode(tokenizer, clips.video, desc="encode clips"), fingerprint(tokenizer)
    return Latents(video, label, image[order], image_label[order], key)


def transformer_source(diffusion: Diffusion, latents: Latents, batch: int, images: int) -> Source:
    """Joint training (paper, section 3.2): `batch - images` videos and `images` stacks of 1+t images of one class."""
    counts = torch.bincount(latents.image_label)
    starts = counts.cumsum(0) - counts

    def sample(image: bool, own: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(latents.video), (), generator=own)
        label = latents.video_label[index]
        if not image:
            return latents.video[index], label
        place = torch.rand(latents.video.shape[2], generator=own) * counts[label]
        return latents.image[starts[label] + place.long()].transpose(0, 1), label

    def source(shared: torch.Generator, samples: Mapping[int, torch.Generator]) -> Batch:
        image = [number >= batch - images for number in samples]
        latent, label = zip(*map(sample, image, samples.values()), strict=True)
        randoms = diffusion.randoms(latents.video.shape[1:], list(samples.values()))
        batch_of = {"latent": torch.stack(latent), "label": torch.stack(label)}
        return {**batch_of, "image": torch.tensor(image), "randoms": randoms}

    return source


def train_tokenizer(
    clips: Clips,
    config: TokenizerConfig,
    training: TrainingConfig,
    folder: Path,
    *,
    batch: int,
    frames: int,
    data: Mapping[str, Any],
    seconds: float | None = None,
) -> tuple[Tokenizer, Trainer[Tokenizer]]:
    """First stage, from its checkpoint in `folder` if there is one -> the averaged tokenizer, with latent statistics.

    `data` describes the clips: a checkpoint of other clips is not gone on from. `seconds` is for this run.
    """
    torch.manual_seed(training.seed)
    trainer: Trainer[Tokenizer] = Trainer(
        [Objective(Tokenizer(config), tokenizer_loss(), training, average=True)],
        tokenizer_source(clips, frames),
        folder,
        batch=batch,
        frames=frames,
        kind="tokenizer",
        description={**tokenizer_description(config), "data": dict(data)},
    )
    trainer.resume()
    tokenizer = trainer.averaged
    if not trainer.finished or torch.equal(tokenizer.latent_std, torch.ones_like(tokenizer.latent_std)):
        trainer.run(seconds=None if seconds is None else trainer.elapsed + seconds)
        chosen = np.linspace(0, len(clips) - 1, min(STATISTICS, len(clips))).astype(int)
        bar = tqdm(torch.from_numpy(clips.video[chosen]).split(8), desc="latent statistics", leave=False)
        set_statistics(tokenizer.eval(), map(to_model, bar))
        trainer.save()
    return tokenizer.eval(), trainer


def train_transformer(
    transformer: Transformer,
    diffusion: Diffusion,
    latents: Latents,
    training: TrainingConfig,
    folder: Path,
    *,
    batch: int,
    images: int,
    clip: ClipShape,
    classes: tuple[str, ...],
    data: Mapping[str, Any],
    seconds: float | None = None,
) -> tuple[Transformer, Trainer[Transformer]]:
    """Second stage, from its checkpoint in `folder` if there is one -> the averaged transformer."""
    description = transformer_description(transformer.config, diffusion.config, clip, classes)
    trainer: Trainer[Transformer] = Trainer(
        [Objective(transformer, DenoiserLoss(diffusion), training, average=True)],
        transformer_source(diffusion, latents, batch, images),
        folder,
        batch=batch,
        frames=clip.frames,
        kind="transformer",
        description={**description, "data": dict(data), "tokenizer": latents.tokenizer},
    )
    trainer.resume()
    trainer.run(seconds=None if seconds is None else trainer.elapsed + seconds)
    return trainer.averaged.eval(), trainer


def new_transformer(config: TransformerConfig, seed: int) -> tuple[Transformer, Diffusion]:
    torch.manual_seed(seed)
    return Transformer(config).eval(), Diffusion(DiffusionConfig())
