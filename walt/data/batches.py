"""Sources of batches, over the pixels and the latents of the training data.

A source makes each sample from its own random numbers (`walt.data.loading`). A bucket is
one shape of batches: videos of one resolution and length, or stacks of 1 + t independent images, with t the latent
frames that follow a video's first (paper, section 3.2). `Buckets` takes each batch from one of several buckets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from walt.data.clips import ClipStore
from walt.data.latents import LatentStore
from walt.data.loading import Batch, Source
from walt.data.pixels import to_model
from walt.data.text_features import TextFeatures
from walt.errors import WaltError
from walt.model.config import TIME_FACTOR, check_frames

CONDITIONS = ("label", "caption")


@dataclass(frozen=True)
class Bucket:
    """Videos of `frames` = 1 + 4t frames, every `stride`-th of a film, or stacks of 1 + t images: the image files, and
    every `image_every`-th frame of the videos (None: of none)."""

    frames: int
    height: int
    width: int
    images: bool = False
    stride: int = 1
    image_every: int | None = 4

    def __post_init__(self) -> None:
        check_frames(self.frames, "frames")
        for name in ("height", "width", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; expected an int >= 1")

    @property
    def depth(self) -> int:
        """Images of a stack, as many as latent frames of a video."""
        return 1 + self.frames // TIME_FACTOR


class PixelSource:
    """Clips or image stacks of a store in the shape of one bucket, cropped at random places.

    With `flip` half of them are mirrored: not for captions that tell left from right. The images of a stack share
    what `condition` names, a label or a caption, since one sample is trained on one condition.
    """

    def __init__(
        self,
        store: ClipStore,
        bucket: Bucket,
        *,
        condition: str = "label",
        flip: bool = False,
    ) -> None:
        self.store, self.bucket, self.flip = store, bucket, flip
        if bucket.height > store.height or bucket.width > store.width:
            raise WaltError(
                f"a bucket of {bucket.height}x{bucket.width} pixels needs more than {store.folder} was prepared for,"
                f" {store.height}x{store.width}"
            )
        if bucket.images:
            self.indices = torch.from_numpy(store.images(bucket.image_every))
        else:
            self.indices = torch.from_numpy(store.windows(bucket.frames, stride=bucket.stride))
        if not len(self.indices):
            raise WaltError(f"{store.folder} holds {_shortage(store, bucket)}")
        self._stacks = Stacks(condition_ids(store, self.indices, condition)) if bucket.images else None

    def sample_indices(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Of one sample, indices int64 [2] or [1+t, 2], offset float32 of the same shape, flip bool [] or [1+t]."""
        if self._stacks is None:
            chosen = torch.randint(len(self.indices), (), generator=generator)
        else:
            chosen = self._stacks.sample_indices(self.bucket.depth, generator)
        offset = torch.rand((*chosen.shape, 2), generator=generator)
        return self.indices[chosen], offset, (torch.rand(chosen.shape, generator=generator) < 0.5) & self.flip

    def __call__(self, shared: torch.Generator, samples: Mapping[int, torch.Generator]) -> Batch:
        """video float32 [B, 3, T, H, W] in [-1, 1] (T = 1+t independent images in a stack), label int64 [B] (after the
        last class: none), caption B texts (of a stack, its first image's; "": none) and image bool [B]."""
        drawn = map(self.sample_indices, samples.values())
        indices, offset, flip = (torch.stack(tensors) for tensors in zip(*drawn, strict=True))
        bucket = self.bucket
        pixels = self.store.read(
            indices.flatten(0, -2).numpy(),
            1 if bucket.images else bucket.frames,
            stride=bucket.stride,
            crop=(bucket.height, bucket.width),
            offset=offset.flatten(0, -2).numpy(),
            flip=flip.flatten().numpy(),
        )
        video = to_model(pixels.reshape(len(indices), -1, *pixels.shape[2:]))
        items = (indices[:, 0] if bucket.images else indices)[:, 0]
        image = torch.full((len(indices),), bucket.images)
        return {"video": video, "image": image, **label_and_caption(self.store, items)}


def _shortage(store: ClipStore, bucket: Bucket) -> str:
    if bucket.images:
        return "no image"
    shots = [stop - first for item in store.items if item.kind == "video" for first, stop in item.shots]
    needed, longest = (bucket.frames - 1) * bucket.stride + 1, max(shots, default=0)
    return f"no clip of {bucket.frames} frames: it takes {needed} frames of a shot, and the longest has {longest}"


def label_and_caption(store: ClipStore, items: Tensor) -> Batch:
    """Label and caption of items int64 [B]."""
    captions = [store.caption[index] or "" for index in items.tolist()]
    return {"label": torch.from_numpy(store.label)[items], "caption": captions}


def condition_ids(store: ClipStore, indices: Tensor, condition: str) -> Tensor:
    """int64 [M], equal for those of indices [M, 2] that share their label or caption."""
    if condition not in CONDITIONS:
        raise ValueError(f"condition: got {condition!r}; expected {' or '.join(CONDITIONS)}")
    known = store.label if condition == "label" else np.array([text or "" for text in store.caption])
    return torch.from_numpy(np.unique(known, return_inverse=True)[1])[indices[:, 0]]


class Stacks:
    """Stacks of images that share a condition: one of M ids int64 [M], one for each image.

    The first image is any, so conditions come as often as their images do; the others are drawn with replacement.
    """

    def __init__(self, condition: Tensor) -> None:
        self.condition = condition
        self.order = condition.argsort(stable=True)
        self.counts = condition.bincount()
        self.starts = self.counts.cumsum(0) - self.counts

    def sample_indices(self, depth: int, generator: torch.Generator) -> Tensor:
        """Of one stack, int64 [depth] into the M images."""
        first = torch.randint(len(self.condition), (1,), generator=generator)
        condition = self.condition[first]
        fraction = torch.rand(depth - 1, generator=generator, dtype=torch.float64)
        others = self.order[self.starts[condition] + (fraction * self.counts[condition]).long()]
        return torch.cat([first, others])


class Buckets:
    """Each batch from one of several sources, chosen with probability in proportion to `weights` (None: equal)."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None) -> None:
        self.sources = list(sources)
        self.weights = torch.tensor([1.0] * len(self.sources) if weights is None else weights, dtype=torch.float64)
        good = len(self.weights) == len(self.sources) and bool((self.weights >= 0).all()) and self.weights.sum() > 0
        if not good or not self.weights.isfinite().all():
            raise ValueError(f"weights: got {weights}; expected {len(self.sources)} numbers >= 0, not all 0")

    def __call__(self, shared: torch.Generator, samples: Mapping[int, torch.Generator]) -> Batch:
        """A batch of the step's bucket, and "bucket", its index."""
        index = int(torch.multinomial(self.weights, 1, generator=shared))
        return {"bucket": index, **self.sources[index](shared, samples)}


class LatentSource:
    """Joint batches over latents (paper, section 3.2): `batch - images` clips, then `images` stacks of 1 + t images.

    The images of a stack share what `condition` names, as in `PixelSource`. With `text`, batches also have features;
    with `low`, the latents of the same clips and images at half the size.
    """

    def __init__(
        self,
        latents: LatentStore,
        batch: int,
        images: int = 0,
        *,
        condition: str = "label",
        text: TextFeatures | None = None,
        low: LatentStore | None = None,
    ) -> None:
        if not 0 <= images <= batch or batch < 1:
            raise ValueError(f"images: got {images} of a batch of {batch}; expected 0 .. {batch}, and a batch >= 1")
        for store in filter(None, (latents, low)):
            for count, kind, held in ((batch - images, "clip", store.video), (images, "image", store.image)):
                if count and not len(held):
                    raise WaltError(f"{store.folder} holds no {kind}, but batches are to have some")
        self.latents, self.text, self.low = latents, text, low
        self.clips, self.images = batch - images, images
        self.depth = latents.video.shape[2] if len(latents.video) else 1
        self._indices = torch.from_numpy(latents.video_indices), torch.from_numpy(latents.image_indices)
        self._stacks = Stacks(condition_ids(latents.clips, self._indices[1], condition)) if images else None

    def sample_indices(self, number: int, generator: torch.Generator) -> Tensor:
        """int64 [1] of sample `number`'s clip, or [1+t] of its images."""
        if number < self.clips or self._stacks is None:
            return torch.randint(len(self.latents.video), (1,), generator=generator)
        return self._stacks.sample_indices(self.depth, generator)

    def __call__(self, shared: torch.Generator, samples: Mapping[int, torch.Generator]) -> Batch:
        """latent float32 [B, c, 1+t, h, w], image bool [B], label int64 [B] and caption B texts as in `PixelSource`;
        with low also low_resolution [B, c, 1+t, h/2, w/2]; with text features also text float32 [B, L, D] and
        text_mask bool [B, L]."""
        indices = [self.sample_indices(number, generator) for number, generator in samples.items()]
        images = [number >= self.clips for number in samples]
        items = [int(self._indices[image][index[0], 0]) for index, image in zip(indices, images, strict=True)]
        batch = {
            "latent": _latents(self.latents, indices, images),
            "image": torch.tensor(images),
            **label_and_caption(self.latents.clips, torch.tensor(items)),
        }
        if self.low is not None:
            batch["low_resolution"] = _latents(self.low, indices, images)
        if self.text is not None:
            batch["text"], batch["text_mask"] = self.text(batch["caption"])
        return batch


def _latents(store: LatentStore, indices: Sequence[Tensor], images: Sequence[bool]) -> Tensor:
    """float32 [B, c, 1+t, h, w]: of each sample a clip, or a stack of images."""
    stacked = [
        store.image[index.numpy()].swapaxes(0, 1) if image else store.video[int(index[0])]
        for index, image in zip(indices, images, strict=True)
    ]
    return torch.from_numpy(np.stack(stacked).astype(np.float32))
