"""Samples from one denoiser: the options, batches with a progress bar, and long videos as overlapping clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from walt.errors import WaltError, as_user_error
from walt.model.config import as_int, check_frames
from walt.model.diffusion import Preview
from walt.model.randoms import sample_noise
from walt.sample.denoiser import Denoiser
from walt.sample.replay import Replayed
from walt.terminal import progress_bar


class Options(TypedDict, total=False):
    """The fields of `Sampling`, as keyword arguments."""

    steps: int
    seed: int
    guidance: float
    guidance_power: float | None
    batch: int
    progress: bool
    preview: Preview | None


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    steps: of DDIM. seed: equal arguments give equal samples; the first samples of many are those of few.
    guidance, guidance_power: see `Diffusion.sample`. batch: videos at a time; of pictures, as many more as a video has
    latent frames. progress: whether to show a bar. preview: called as preview(step, steps, estimate) with the running
    batch's estimate of its latents [B, c, t, h, w]; `WaltPipeline.decode` shows them.
    """

    steps: int = 50
    seed: int = 0
    guidance: float = 1.0
    guidance_power: float | None = None
    batch: int = 16
    progress: bool = True
    preview: Preview | None = None

    def __post_init__(self) -> None:
        with as_user_error("sample"):
            for name in ("steps", "seed", "batch"):
                object.__setattr__(self, name, as_int(name, getattr(self, name)))
        if self.batch < 1:
            raise WaltError(f"batch: got {self.batch}; expected at least 1")


def sample_batches(
    denoiser: Denoiser,
    conditions: dict[str, Tensor],
    keys: Sequence[tuple[int, ...]],
    shape: Sequence[int],
    sampling: Sampling,
    desc: str,
) -> Tensor:
    """A sample of `shape` for each noise key, batch by batch -> float32 [len(keys), *shape] on the CPU.

    conditions: those of `Diffusion.sample`, each [len(keys), ...].
    """
    with as_user_error(desc):
        total = -(-len(keys) // sampling.batch) * len(denoiser.diffusion.timesteps(sampling.steps))
    latents = []
    transformer = Replayed(denoiser.transformer)
    with progress_bar(total=total, desc=desc, unit="step", shown=sampling.progress, leave=False) as bar:

        def show(step: int, steps: int, estimate: Tensor) -> None:
            bar.update()
            if sampling.preview is not None:
                sampling.preview(step, steps, estimate)

        for first in range(0, len(keys), sampling.batch):
            batch = slice(first, first + sampling.batch)
            with as_user_error(desc):
                latent = denoiser.diffusion.sample(
                    transformer,
                    sample_noise(sampling.seed, keys[batch], shape),
                    steps=sampling.steps,
                    guidance=sampling.guidance,
                    guidance_power=sampling.guidance_power,
                    preview=show,
                    **{name: tensor[batch] for name, tensor in conditions.items()},
                )
            latents.append(latent.float().cpu())
    return torch.cat(latents)


def clip_starts(frames: int, length: int, overlap: int) -> list[int]:
    """First frames of clips of `length` that cover `frames` and overlap by at least `overlap`; 1 + 4k if one does."""
    if frames <= length:
        check_frames(frames)
        return [0]
    return [*range(0, frames - length, length - overlap), frames - length]


def join_clips(clips: np.ndarray, starts: Sequence[int]) -> np.ndarray:
    """Clips [num, len(starts), L, H, W, 3] -> [num, T, H, W, 3]; where two overlap, the earlier one's frames."""
    joined = clips[:, 0]
    for i, start in enumerate(starts[1:], 1):
        joined = np.concatenate([joined, clips[:, i, joined.shape[1] - start :]], axis=1)
    return joined
