"""What every variant shares: clips of ViZDoom, one tokenizer, their latents, and a distance for generated latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from walt.checkpoint import fingerprint
from walt.data.batches import LatentSource
from walt.data.clips import ClipStore, write_store
from walt.data.latents import LatentStore, encode_latents
from walt.data.loading import Batch, Source
from walt.data.pixels import to_pixels
from walt.data.simulator import DEMO_FPS, SCENARIOS, render_clips
from walt.evaluate.metrics import clip_distances
from walt.evaluate.networks import FEATURES, FrameFeatures, Projection
from walt.model.config import TransformerConfig
from walt.model.diffusion import Diffusion
from walt.model.tokenizer import Tokenizer
from walt.pretrained import load_tokenizer
from walt.train.denoiser import DenoiserSource

FRAMES, SIZE = 17, 64
HELD_OUT = 10_000  # first episode that is held out: further than any training set counts
DIMENSIONS = 32

Distance = Callable[[Tensor], dict[str, float]]  # normalised latents -> "frames" and "motion"


@dataclass(frozen=True)
class Material:
    """Latents are normalised by the tokenizer's mean and deviation; held out are [N, c, 1+t, h, w] and label [N]."""

    latents: LatentStore
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

    @staticmethod
    def _channels(statistic: Tensor, like: Tensor) -> Tensor:
        return statistic.reshape(-1, *[1] * (like.ndim - 2))


def source_of(
    material: Material, config: TransformerConfig, diffusion: Diffusion, *, batch: int, images: int, normalised: bool
) -> Source:
    """What `walt train base` trains on; latents that are not `normalised` are as the encoder gives them."""
    source = DenoiserSource(LatentSource(material.latents, batch, images), diffusion, config, None)

    def raw(shared: torch.Generator, samples: Mapping[int, torch.Generator]) -> Batch:
        made = source(shared, samples)
        return {**made, "latent": material.raw(made["latent"])}

    return source if normalised else raw


def prepare(clips: int, held_out: int, tokenizer: Path, work: Path) -> Material:
    """`clips` a class to train on and `held_out` a class to compare with, and their latents.

    `tokenizer` is a trained one's folder. Clips and latents are written to `work`, which is to outlive the material.
    """
    coder = load_tokenizer(tokenizer)
    train, test = (
        write_store(work / name, render_clips(SCENARIOS, episodes, frames=FRAMES, size=SIZE), DEMO_FPS)
        for name, episodes in (("data", range(clips)), ("held-out", range(HELD_OUT, HELD_OUT + held_out)))
    )
    shown = {"key": fingerprint(coder), "frames": FRAMES, "height": SIZE, "width": SIZE}
    latents, unseen = (
        encode_latents(store, work / f"latents-{store.folder.name}", coder.encode, **shown) for store in (train, test)
    )
    held = torch.tensor(unseen.video).float()
    return Material(
        latents,
        held,
        torch.from_numpy(test.label),
        coder.latent_mean,
        coder.latent_std,
        train.classes,
        decoded_distance(coder, train, held),
        f"Frechet distance of frames plus that of their steps in time, between {len(held)} generated and as many"
        f" held-out clips, both decoded; {FEATURES}, first {DIMENSIONS} principal components of real frames",
    )


def decoded_distance(tokenizer: Tokenizer, train: ClipStore, held_out: Tensor) -> Distance:
    """`clip_distances` to the held-out clips as the tokenizer shows them: what is left to the transformer."""
    network = FrameFeatures()
    project = Projection(network(train.read(train.windows(FRAMES, hop=FRAMES)[train.balanced(8)], FRAMES)), DIMENSIONS)

    @torch.inference_mode()
    def features(latent: Tensor) -> np.ndarray:
        video = np.concatenate([to_pixels(tokenizer.decode(part)) for part in latent.split(8)])
        return project(network(video))

    reference = features(held_out)
    return lambda latent: clip_distances(features(latent), reference)
