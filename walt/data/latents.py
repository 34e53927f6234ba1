"""Latents of the clips and images of a prepared folder, encoded once (`walt.data.encoded`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from walt.atomic import flush, write_json
from walt.data.clips import ClipStore
from walt.data.encoded import DTYPES, INDEX, VERSION, holds, map_numbers, read_index
from walt.data.pixels import to_model
from walt.distributed import all_max, is_rank0, raise_on_all_ranks, rank, world_size
from walt.errors import WaltError
from walt.terminal import progress_bar

LATENTS = "walt-latents"
DONE = ".done"  # ending of the list of batches that are written

Encode = Callable[[Tensor], Tensor]


class LatentStore:
    """Latents: video [N, c, 1+t, h, w] of the clips at video_indices [N, 2], image [M, c, h, w] at image_indices.

    Labels and captions are those of `clips`, the store that the indices belong to.
    """

    def __init__(self, folder: Path, clips: ClipStore, index: dict[str, Any]) -> None:
        self.folder, self.clips, self.index = folder, clips, index
        self.video_indices, self.image_indices = _indices(clips, index)
        self.video = map_numbers(folder / "video.raw", (len(self.video_indices), *index["video_shape"]), index["dtype"])
        self.image = map_numbers(folder / "image.raw", (len(self.image_indices), *index["image_shape"]), index["dtype"])

    @classmethod
    def open(cls, folder: str | Path, clips: ClipStore, *, key: str | None = None) -> LatentStore:
        """WaltError if the folder is missing, foreign or broken, or belongs to other clips, or to another tokenizer
        than `key` (None: any)."""
        folder = Path(folder)
        index = read_index(folder, LATENTS)
        if key is not None and index.get("key") != key:
            raise WaltError(f"{folder} was made by another tokenizer; encode again")
        if index.get("data") != clips.fingerprint:
            raise WaltError(f"{folder} was made from other data than {clips.folder} holds; encode again")
        try:
            return cls(folder, clips, index)
        except (KeyError, TypeError, ValueError) as error:
            raise WaltError(f"{folder / INDEX} is broken: {error}") from error


@torch.inference_mode()
def encode_latents(
    clips: ClipStore,
    folder: str | Path,
    encode: Encode,
    *,
    key: str,
    frames: int,
    height: int,
    width: int,
    stride: int = 1,
    hop: int | None = None,
    image_every: int | None = 4,
    batch: int = 8,
    dtype: str = "float16",
    progress: bool = True,
) -> LatentStore:
    """Encode the middle crops of all clips that start `hop` frames apart (None: end to end), and of images as videos of
    one frame, unless `folder` has them already.

    `encode` maps float32 [B, 3, T, H, W] in [-1, 1] to [B, c, t', h, w]; `key` stands for its weights. All ranks call
    this, on one file system: of the batches that are missing, rank r of n encodes number r, r + n, ... Re-running
    resumes after the last complete batches, with any number of ranks. WaltError on every rank if nothing can be encoded
    or a latent is not finite.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}; expected {' or '.join(DTYPES)}")
    folder = Path(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    plan = {
        "format": LATENTS,
        "version": VERSION,
        "key": key,
        "data": clips.fingerprint,
        "frames": frames,
        "height": height,
        "width": width,
        "stride": stride,
        "hop": frames * stride if hop is None else hop,
        "image_every": image_every,
        "dtype": dtype,
    }
    done = False
    with raise_on_all_ranks(f"cannot write {folder}"):
        if is_rank0():
            done = holds(folder, LATENTS, plan)
            if not done and not ((partial / INDEX).is_file() and holds(partial, LATENTS, plan)):
                shutil.rmtree(partial, ignore_errors=True)
                write_json(partial / INDEX, plan)
    if all_max(float(done))[0]:
        return LatentStore.open(folder, clips)
    video_indices, image_indices = _indices(clips, plan)
    if not len(video_indices) and not len(image_indices):
        raise WaltError(f"{clips.folder} holds no image, and no shot of {(frames - 1) * stride + 1} frames")

    def video(indices: np.ndarray) -> np.ndarray:
        latent = encode(to_model(clips.read(indices, frames, stride=stride, crop=(height, width))))
        return _finite(latent, dtype, clips, indices)

    def image(indices: np.ndarray) -> np.ndarray:
        return _finite(encode(to_model(clips.read(indices, crop=(height, width))))[:, :, 0], dtype, clips, indices)

    shapes = {
        "video_shape": _encode(partial / "video.raw", video_indices, batch, video, "encode clips", progress),
        "image_shape": _encode(partial / "image.raw", image_indices, batch, image, "encode images", progress),
    }
    with raise_on_all_ranks(f"cannot write {folder}"):
        if is_rank0():
            write_json(partial / INDEX, {**plan, **shapes})
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            for path in folder.glob(f"*{DONE}"):
                path.unlink()
    return LatentStore.open(folder, clips)


def _finite(latent: Tensor, dtype: str, clips: ClipStore, indices: np.ndarray) -> np.ndarray:
    numbers = latent.to(getattr(torch, dtype)).cpu().numpy()
    if not np.isfinite(numbers).all():
        names = sorted({clips.items[index].name for index in indices[:, 0]})
        raise WaltError(f"the tokenizer gives latents that are not finite in {dtype}, for one of {', '.join(names)}")
    return numbers


def _indices(clips: ClipStore, plan: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    videos = clips.windows(plan["frames"], stride=plan["stride"], hop=plan["hop"])
    return videos, clips.images(plan["image_every"])


def _encode(
    path: Path, indices: np.ndarray, batch: int, latents: Callable[[np.ndarray], np.ndarray], desc: str, progress: bool
) -> list[int]:
    """Write this rank's share of the latents that the file does not hold yet -> the shape of one.

    Complete batches only, so that the batches, and with them the bits, do not depend on kills and ranks. A second file
    has a byte for each batch of that size, 1 when it is written.
    """
    marks = path.with_suffix(f".{batch}{DONE}")
    with raise_on_all_ranks(f"cannot write {path}"):
        path.touch()
        marks.touch()
        if not len(indices):
            return []
        one = latents(indices[:1])
        starts = np.arange(0, len(indices), batch)
        written = np.zeros(len(starts), bool)
        marked = np.fromfile(marks, np.uint8)[: len(starts)]
        written[: len(marked)] = marked == 1
    # Every rank has read the marks; from here on they change.
    mine = np.flatnonzero(~written)[rank() :: world_size()].tolist()
    with raise_on_all_ranks(f"cannot write {path}"):
        with path.open("r+b") as file, marks.open("r+b") as done:
            for index in progress_bar(mine, desc=desc, unit="batch", shown=progress and is_rank0()):
                file.seek(int(starts[index]) * one.nbytes)
                file.write(latents(indices[starts[index] : starts[index] + batch]).tobytes())
                file.flush()
                os.fsync(file.fileno())  # else a power cut could leave the mark without the data
                done.seek(index)
                done.write(b"\1")
                done.flush()
            if is_rank0():
                file.truncate(len(indices) * one.nbytes)
        flush(path)
    return list(one.shape[1:])
