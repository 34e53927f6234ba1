"""What a frozen tokenizer makes of the clips and images of a prepared folder, computed once (`walt.data.encoded`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from walt.atomic import flush, write_json, writing
from walt.data.clips import ClipStore
from walt.data.encoded import DTYPES, INDEX, VERSION, holds, map_numbers, read_index
from walt.data.pixels import to_model
from walt.errors import WaltError

LATENTS = "walt-latents"

Encode = Callable[[Tensor], Tensor]


class LatentStore:
    """Latents of clips, video [N, c, 1+t, h, w] of video_rows [N, 2], and of images, image [M, c, h, w] of image_rows.

    Labels and captions are those of `cache`, which the rows belong to.
    """

    def __init__(self, folder: Path, cache: ClipStore, index: dict[str, Any]) -> None:
        self.folder, self.cache, self.index = folder, cache, index
        self.video_rows, self.image_rows = _rows(cache, index)
        self.video = map_numbers(folder / "video.raw", (len(self.video_rows), *index["video_shape"]), index["dtype"])
        self.image = map_numbers(folder / "image.raw", (len(self.image_rows), *index["image_shape"]), index["dtype"])

    @classmethod
    def open(cls, folder: str | Path, cache: ClipStore, *, key: str | None = None) -> LatentStore:
        """WaltError if the folder is missing, foreign or broken, or belongs to another cache, or to another tokenizer
        than `key` (None: any)."""
        folder = Path(folder)
        index = read_index(folder, LATENTS)
        if key is not None and index.get("key") != key:
            raise WaltError(f"{folder} was made by another tokenizer; encode again")
        if index.get("cache") != cache.fingerprint:
            raise WaltError(f"{folder} was made from other data than {cache.folder} holds; encode again")
        try:
            return cls(folder, cache, index)
        except (KeyError, TypeError, ValueError) as error:
            raise WaltError(f"{folder / INDEX} is broken: {error}") from error


@torch.inference_mode()
def encode_latents(
    cache: ClipStore,
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

    `encode` maps float32 [B, 3, T, H, W] in [-1, 1] to [B, c, t', h, w]; `key` stands for its weights. Work that was
    killed goes on after its last whole batch. WaltError if nothing can be encoded or a latent is not finite.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}; expected {' or '.join(DTYPES)}")
    folder = Path(folder)
    plan = {
        "format": LATENTS,
        "version": VERSION,
        "key": key,
        "cache": cache.fingerprint,
        "frames": frames,
        "height": height,
        "width": width,
        "stride": stride,
        "hop": frames * stride if hop is None else hop,
        "image_every": image_every,
        "dtype": dtype,
    }
    if holds(folder, LATENTS, plan):
        return LatentStore.open(folder, cache)
    partial = folder.with_name(f"{folder.name}.partial")
    if not (partial / INDEX).is_file() or not holds(partial, LATENTS, plan):
        shutil.rmtree(partial, ignore_errors=True)
        write_json(partial / INDEX, plan)
    video_rows, image_rows = _rows(cache, plan)
    if not len(video_rows) and not len(image_rows):
        raise WaltError(f"{cache.folder} holds no image, and no shot of {(frames - 1) * stride + 1} frames")

    def clips(rows: np.ndarray) -> np.ndarray:
        latent = encode(to_model(cache.read(rows, frames, stride=stride, crop=(height, width))))
        return _finite(latent, dtype, cache, rows)

    def images(rows: np.ndarray) -> np.ndarray:
        return _finite(encode(to_model(cache.read(rows, crop=(height, width))))[:, :, 0], dtype, cache, rows)

    shapes = {
        "video_shape": _append(partial / "video.raw", video_rows, batch, clips, "encode clips", progress),
        "image_shape": _append(partial / "image.raw", image_rows, batch, images, "encode images", progress),
    }
    write_json(partial / INDEX, {**plan, **shapes})
    _replace(partial, folder)
    return LatentStore.open(folder, cache)


def _finite(latent: Tensor, dtype: str, cache: ClipStore, rows: np.ndarray) -> np.ndarray:
    numbers = latent.to(getattr(torch, dtype)).cpu().numpy()
    if not np.isfinite(numbers).all():
        names = sorted({cache.items[index].name for index in rows[:, 0]})
        raise WaltError(f"the tokenizer gives latents that are not finite in {dtype}, for one of {', '.join(names)}")
    return numbers


def _rows(cache: ClipStore, plan: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    clips = cache.windows(plan["frames"], stride=plan["stride"], hop=plan["hop"])
    return clips, cache.images(plan["image_every"])


def _append(
    path: Path, rows: np.ndarray, batch: int, latents: Callable[[np.ndarray], np.ndarray], desc: str, progress: bool
) -> list[int]:
    """Append the latents of those rows that the file does not hold yet -> the shape of one."""
    with writing(path):
        path.touch()
    if not len(rows):
        return []
    one = latents(rows[:1])
    # Whole batches only, so that the batches, and with them the bits, are those of a run that was not interrupted.
    done = min(path.stat().st_size // one.nbytes, len(rows)) // batch * batch
    with writing(path):
        os.truncate(path, done * one.nbytes)
        with path.open("ab") as file, tqdm(total=len(rows), initial=done, desc=desc, disable=not progress) as bar:
            for start in range(done, len(rows), batch):
                part = latents(rows[start : start + batch])
                file.write(part.tobytes())
                file.flush()
                bar.update(len(part))
        flush(path)
    return list(one.shape[1:])


def _replace(partial: Path, folder: Path) -> None:
    """Give the complete folder its name. A kill on the way leaves it complete under the first name."""
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
