"""The two stages of training: what a step is, and the latents that join them; for `walt demo` and `walt train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from walt.checkpoint import fingerprint
from walt.data.loading import Batch, Draw
from walt.data.pixels import to_model, to_pixels
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
from walt.train.losses import decorrelation_loss, reconstruction_loss
from walt.train.objective import Loss, Phase
from walt.train.tokenizer import STATISTICS, set_statistics
from walt.train.trainer import Trainer


@dataclass(frozen=True)
class Clips:
    """N clips of equal size: video uint8 [N, T, H, W, 3], label int64 [N]."""

    video: np.ndarray
    label: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.video)


IMAGE_STRIDE = 4  # every fourth frame of a clip also serves as an image


def tokenizer_draw(clips: Clips, batch: int, frames: int) -> Draw:
    """`batch` random clips, and a random run of `frames` frames of them.

    The tokenizer is causal, so short runs teach it what whole clips would and cost less. Frames stay whole: its norms
    pool over a frame, and what they learn on crops does not hold for frames.
    """

    def draw(generator: torch.Generator) -> Batch:
        index = torch.randint(len(clips), (batch,), generator=generator)
        return {
            "index": index,
            "start": int(torch.randint(clips.video.shape[1] - frames + 1, (1,), generator=generator)),
        }

    return draw


def tokenizer_loss(clips: Clips, frames: int) -> Loss:
    """Reconstruct the runs that `tokenizer_draw` chose."""
    video, weight = torch.from_numpy(clips.video), TokenizerLossConfig.decorrelation

    def loss(model: nn.Module, rows: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(model, Tokenizer)
        target = to_model(video[rows["index"], rows["start"] : rows["start"] + frames])
        latent = model.encode(target)
        return reconstruction_loss(model.decode(latent), target) + weight * decorrelation_loss(latent), {}

    return loss


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


def transformer_draw(diffusion: Diffusion, latents: Latents, batch: int, images: int) -> Draw:
    """Joint training (paper, section 3.2): `batch - images` videos and `images` stacks of 1+t images of one class."""
    counts = torch.bincount(latents.image_label)
    starts = counts.cumsum(0) - counts
    shape = (batch, *latents.video.shape[1:])

    def draw(generator: torch.Generator) -> Batch:
        index = torch.randint(len(latents.video), (batch,), generator=generator)
        label = latents.video_label[index]
        place = (torch.rand(batch, shape[2], generator=generator) * counts[label, None]).long()
        rows = {"index": index, "label": label, "stack": starts[label, None] + place}
        return {**rows, "image": torch.arange(batch) >= batch - images, **diffusion.draw(shape, generator)}

    return draw


def transformer_loss(diffusion: Diffusion, latents: Latents) -> Loss:
    """The diffusion loss of what `transformer_draw` chose."""

    def loss(model: nn.Module, rows: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        stacks = latents.image[rows["stack"]].transpose(1, 2)  # [B, c, 1+t, h, w]
        x0 = torch.where(rows["image"].reshape(-1, 1, 1, 1, 1), stacks, latents.video[rows["index"]])
        draws = {name: rows[name] for name in diffusion.DRAWS}
        return diffusion.loss(model, x0, draws, label=rows["label"], image=rows["image"]), {}

    return loss


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
        [Phase("model", Tokenizer(config), tokenizer_loss(clips, frames))],
        tokenizer_draw(clips, batch, frames),
        training,
        folder,
        kind="tokenizer",
        description={**tokenizer_description(config), "data": dict(data)},
        frames_per_step=batch * frames,
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
        [Phase("model", transformer, transformer_loss(diffusion, latents))],
        transformer_draw(diffusion, latents, batch, images),
        training,
        folder,
        kind="transformer",
        description={**description, "data": dict(data), "tokenizer": latents.tokenizer},
        frames_per_step=batch * clip.frames,
    )
    trainer.resume()
    trainer.run(seconds=None if seconds is None else trainer.elapsed + seconds)
    return trainer.averaged.eval(), trainer


def new_transformer(config: TransformerConfig, seed: int) -> tuple[Transformer, Diffusion]:
    torch.manual_seed(seed)
    return Transformer(config).eval(), Diffusion(DiffusionConfig())
