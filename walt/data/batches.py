"""Batches of the training data. To draw a batch is to choose its rows, to load it is to make its tensors.

The two are apart so that each of several processes can draw the same global batch, from equal generators, and load
its own rows of it, ahead of their turn (`walt.data.loading`). A bucket is one shape of
batches: videos of one resolution and length, or stacks of 1 + t independent images, with t the latent frames that
follow a video's first (paper, section 3.2). `Buckets` draws each batch from one of several buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from walt.data.clips import ClipStore
from walt.data.latents import LatentStore
from walt.data.loading import Batch
from walt.data.pixels import to_model
from walt.data.text_features import TextFeatures
from walt.errors import WaltError
from walt.model.config import TIME_FACTOR, check_frames

CONDITIONS = ("label", "caption")


class Source(Protocol):
    """Where batches come from."""

    def draw(self, generator: torch.Generator) -> Batch:
        """Choose a batch with random numbers from `generator` alone. Each tensor has a leading axis of samples."""

    def load(self, batch: Batch) -> Batch:
        """The tensors of a drawn batch, or of a part of it. May be called from any thread."""


@dataclass(frozen=True)
class Bucket:
    """Batches of `batch` videos of `frames` = 1 + 4t frames, every `stride`-th of a film, or of as many stacks of
    1 + t images: the image files, and every `image_every`-th frame of the videos (None: of none)."""

    frames: int
    height: int
    width: int
    batch: int
    images: bool = False
    stride: int = 1
    image_every: int | None = 4

    def __post_init__(self) -> None:
        check_frames(self.frames, "frames")
        for name in ("height", "width", "batch", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected an int >= 1")

    @property
    def depth(self) -> int:
        """Images of a stack, as many as latent frames of a video."""
        return 1 + self.frames // TIME_FACTOR


class PixelSource:
    """Clips or image stacks of a cache in the shape of one bucket, cropped at random places if `random_crop`.

    With `flip` half of them are mirrored: not for captions that tell left from right. The images of a stack share
    what `condition` names, a label or a caption, since one sample is trained on one condition.
    """

    def __init__(
        self,
        cache: ClipStore,
        bucket: Bucket,
        *,
        condition: str = "label",
        random_crop: bool = True,
        flip: bool = False,
    ) -> None:
        self.cache, self.bucket, self.random_crop, self.flip = cache, bucket, random_crop, flip
        if bucket.height > cache.height or bucket.width > cache.width:
            raise WaltError(
                f"a bucket of {bucket.height}x{bucket.width} pixels needs more than {cache.folder} was prepared for,"
                f" {cache.height}x{cache.width}"
            )
        if bucket.images:
            self.rows = torch.from_numpy(cache.images(bucket.image_every))
        else:
            self.rows = torch.from_numpy(cache.windows(bucket.frames, stride=bucket.stride))
        if not len(self.rows):
            raise WaltError(f"{cache.folder} holds {_shortage(cache, bucket)}")
        self._stacks = Stacks(conditions(cache, self.rows, condition)) if bucket.images else None

    def draw(self, generator: torch.Generator) -> Batch:
        """rows int64 [B, 2] or [B, 1+t, 2], offset float32 of the same shape, flip bool [B] or [B, 1+t]."""
        size = self.bucket.batch
        if self._stacks is None:
            chosen = torch.randint(len(self.rows), (size,), generator=generator)
        else:
            chosen = self._stacks.draw(size, self.bucket.depth, generator)
        middle = torch.full((*chosen.shape, 2), 0.5)
        return {
            "rows": self.rows[chosen],
            "offset": torch.rand((*chosen.shape, 2), generator=generator) if self.random_crop else middle,
            "flip": (torch.rand(chosen.shape, generator=generator) < 0.5) & self.flip,
        }

    def load(self, batch: Batch) -> Batch:
        """video float32 [B, 3, T, H, W] in [-1, 1] (T = 1+t independent images in a stack), label int64 [B] (after the
        last class: none), caption B texts (of a stack, its first image's; "": none) and image bool [B]."""
        bucket, rows = self.bucket, batch["rows"]
        pixels = self.cache.read(
            rows.flatten(0, -2).numpy(),
            1 if bucket.images else bucket.frames,
            stride=bucket.stride,
            crop=(bucket.height, bucket.width),
            offset=batch["offset"].flatten(0, -2).numpy(),
            flip=batch["flip"].flatten().numpy(),
        )
        video = to_model(pixels.reshape(len(rows), -1, *pixels.shape[2:]))
        items = (rows[:, 0] if bucket.images else rows)[:, 0]
        return {"video": video, "image": torch.full((len(rows),), bucket.images), **described(self.cache, items)}


def _shortage(cache: ClipStore, bucket: Bucket) -> str:
    if bucket.images:
        return "no image"
    shots = [stop - first for item in cache.items if item.kind == "video" for first, stop in item.shots]
    needed, longest = (bucket.frames - 1) * bucket.stride + 1, max(shots, default=0)
    return f"no clip of {bucket.frames} frames: it takes {needed} frames of a shot, and the longest has {longest}"


def described(cache: ClipStore, items: Tensor) -> Batch:
    """Label and caption of items int64 [B]."""
    captions = [cache.caption[index] or "" for index in items.tolist()]
    return {"label": torch.from_numpy(cache.label)[items], "caption": captions}


def conditions(cache: ClipStore, rows: Tensor, condition: str) -> Tensor:
    """int64 [M], equal for those of rows [M, 2] that share their label or caption."""
    if condition not in CONDITIONS:
        raise ValueError(f"condition: got {condition!r}; expected {' or '.join(CONDITIONS)}")
    known = cache.label if condition == "label" else np.array([text or "" for text in cache.caption])
    return torch.from_numpy(np.unique(known, return_inverse=True)[1])[rows[:, 0]]


class Stacks:
    """Draws stacks of images that share a condition, given as numbers int64 [M].

    The first image is any, so conditions come as often as their images do; the others are drawn with replacement.
    """

    def __init__(self, condition: Tensor) -> None:
        self.condition = condition
        self.order = condition.argsort(stable=True)
        self.counts = condition.bincount()
        self.starts = self.counts.cumsum(0) - self.counts

    def draw(self, count: int, depth: int, generator: torch.Generator) -> Tensor:
        """Indices int64 [count, depth] into the M images."""
        first = torch.randint(len(self.condition), (count, 1), generator=generator)
        shared = self.condition[first]
        fraction = torch.rand((count, depth - 1), generator=generator, dtype=torch.float64)
        others = self.order[self.starts[shared] + (fraction * self.counts[shared]).long()]
        return torch.cat([first, others], dim=1)


class Buckets:
    """Each batch from one of several sources, chosen with probability in proportion to `weights` (None: equal)."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None) -> None:
        self.sources = list(sources)
        self.weights = torch.tensor([1.0] * len(self.sources) if weights is None else weights, dtype=torch.float64)
        good = len(self.weights) == len(self.sources) and bool((self.weights >= 0).all()) and self.weights.sum() > 0
        if not good or not self.weights.isfinite().all():
            raise ValueError(f"weights: got {weights}; expected {len(self.sources)} numbers >= 0, not all 0")

    def draw(self, generator: torch.Generator) -> Batch:
        """What the chosen source draws, and bucket, its index."""
        index = int(torch.multinomial(self.weights, 1, generator=generator))
        return {"bucket": index, **self.sources[index].draw(generator)}

    def load(self, batch: Batch) -> Batch:
        """What the chosen source loads, and bucket."""
        return {"bucket": batch["bucket"], **self.sources[batch["bucket"]].load(batch)}


class LatentSource:
    """Joint batches over latents (paper, section 3.2): `batch - images` clips and `images` stacks of 1 + t images.

    The images of a stack share what `condition` names, as in `PixelSource`. With `text`, batches also have features.
    """

    def __init__(
        self,
        latents: LatentStore,
        batch: int,
        images: int = 0,
        *,
        condition: str = "label",
        text: TextFeatures | None = None,
    ) -> None:
        if not 0 <= images <= batch or batch < 1:
            raise ValueError(f"images: got {images} of a batch of {batch}; expected 0 .. {batch}, and a batch >= 1")
        for count, kind, held in ((batch - images, "clip", latents.video), (images, "image", latents.image)):
            if count and not len(held):
                raise WaltError(f"{latents.folder} holds no {kind}, but batches are to have some")
        self.latents, self.text = latents, text
        self.batch, self.images = batch, images
        self.depth = latents.video.shape[2] if len(latents.video) else 1
        self._rows = torch.from_numpy(latents.video_rows), torch.from_numpy(latents.image_rows)
        self._stacks = Stacks(conditions(latents.clips, self._rows[1], condition)) if images else None

    def draw(self, generator: torch.Generator) -> Batch:
        """image bool [B], and index int64 [B, 1+t] into the latents: of one clip, repeated, or of 1+t images."""
        clips = self.batch - self.images
        index = torch.zeros((self.batch, self.depth), dtype=torch.int64)
        if clips:
            index[:clips] = torch.randint(len(self.latents.video), (clips, 1), generator=generator)
        if self._stacks is not None:
            index[clips:] = self._stacks.draw(self.images, self.depth, generator)
        return {"index": index, "image": torch.arange(self.batch) >= clips}

    def load(self, batch: Batch) -> Batch:
        """latent float32 [B, c, 1+t, h, w], image bool [B], label int64 [B] and caption B texts as in `PixelSource`;
        with text features also text float32 [B, L, D] and text_mask bool [B, L]."""
        samples, items = [], []
        for index, image in zip(batch["index"], batch["image"].tolist(), strict=True):
            if image:
                samples.append(self.latents.image[index.numpy()].swapaxes(0, 1))
            else:
                samples.append(self.latents.video[int(index[0])])
            items.append(int(self._rows[image][index[0], 0]))
        loaded = {
            "latent": torch.from_numpy(np.stack(samples).astype(np.float32)),
            "image": batch["image"],
            **described(self.latents.clips, torch.tensor(items)),
        }
        if self.text is not None:
            loaded["text"], loaded["text_mask"] = self.text(loaded["caption"])
        return loaded
