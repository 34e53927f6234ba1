"""What every variant shares: clips of ViZDoom, one tokenizer, their latents, and a distance for generated latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from walt.data.simulator import SCENARIOS, render_clips
from walt.evaluate.metrics import clip_distances
from walt.evaluate.networks import FEATURES, FrameFeatures, Projection
from walt.model.tokenizer import Tokenizer
from walt.presets import PRESETS
from walt.pretrained import load_tokenizer
from walt.settings import TrainingConfig
from walt.stages import Clips, Latents, decode, encode, prepare_latents, train_tokenizer

FRAMES, SIZE = 17, 64
HELD_OUT = 10_000  # first episode that is held out: further than any training set counts
DIMENSIONS = 32

Distance = Callable[[Tensor], dict[str, float]]  # normalised latents -> "frames" and "motion"


@dataclass(frozen=True)
class Material:
    """Latents are normalised by the tokenizer's mean and deviation; held out are [N, c, 1+t, h, w] and label [N]."""

    latents: Latents
    held_out: Tensor
    label: Tensor
    mean: Tensor  # [c]
    std: Tensor
    classes: tuple[str, ...]
    distance: Distance
    features: str

    def raw(self, latent: Tensor) -> Tensor:
        """As the encoder gives them, [N, c, ...]."""
        return latent * self._channels(self.std, latent) + self._channels(self.mean, latent)

    def normalised(self, latent: Tensor) -> Tensor:
        return (latent - self._channels(self.mean, latent)) / self._channels(self.std, latent)

    def raw_latents(self) -> Latents:
        return replace(self.latents, video=self.raw(self.latents.video), image=self.raw(self.latents.image))

    @staticmethod
    def _channels(statistic: Tensor, like: Tensor) -> Tensor:
        return statistic.reshape(-1, *[1] * (like.ndim - 2))


def prepare(clips: int, held_out: int, tokenizer: Path | None, folder: Path, seconds: float) -> Material:
    """`clips` a class to train on and `held_out` a class to compare with; the tokenizer is loaded, or trained first.

    `tokenizer` is a trained one's folder; if it is None, one is trained in `folder` for `seconds`.
    """
    train, test = rendered(range(clips)), rendered(range(HELD_OUT, HELD_OUT + held_out))
    coder = load_tokenizer(tokenizer) if tokenizer else small_tokenizer(train, folder, seconds)
    latents, test_latents = prepare_latents(coder, train), encode(coder, test.video, desc="encode held-out clips")
    return Material(
        latents,
        test_latents,
        torch.from_numpy(test.label),
        coder.latent_mean,
        coder.latent_std,
        train.classes,
        decoded_distance(coder, train, test_latents),
        f"Frechet distance of frames plus that of their steps in time, between {len(test)} generated and as many"
        f" held-out clips, both decoded; {FEATURES}, first {DIMENSIONS} principal components of real frames",
    )


def rendered(episodes: range) -> Clips:
    video = np.stack([video for _, video in render_clips(SCENARIOS, episodes, frames=FRAMES, size=SIZE)])
    return Clips(video, np.arange(len(SCENARIOS)).repeat(len(episodes)), SCENARIOS)


def small_tokenizer(clips: Clips, folder: Path, seconds: float) -> Tokenizer:
    """As the demo trains it."""
    tokenizer, _ = train_tokenizer(
        clips,
        PRESETS["tiny"][0],
        TrainingConfig(20_000, lr=2e-3, warmup=100),
        folder,
        batch=1,
        frames=5,
        data={"clips": len(clips)},
        seconds=seconds,
    )
    return tokenizer


def decoded_distance(tokenizer: Tokenizer, train: Clips, held_out: Tensor) -> Distance:
    """`clip_distances` to the held-out clips as the tokenizer shows them: what is left to the transformer."""
    network = FrameFeatures()
    project = Projection(
        network(train.video[np.concatenate([np.flatnonzero(train.label == i)[:8] for i in range(len(SCENARIOS))])]),
        DIMENSIONS,
    )

    def features(latent: Tensor) -> np.ndarray:
        return project(network(decode(tokenizer, latent)))

    reference = features(held_out)
    return lambda latent: clip_distances(features(latent), reference)
