"""Real clips for `walt evaluate` to compare a model's with: at the model's frame rate, from a folder or a film."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from walt.atomic import reading
from walt.checkpoint import checkpoint_folder, load_description
from walt.data.pixels import fill
from walt.data.video import VIDEO_SUFFIXES, frame_rate, iterate_video
from walt.errors import WaltError, as_user_error
from walt.rates import same_rate
from walt.settings import load_settings
from walt.train.run import open_data, tell, tell_other_rate


def trained_on(model: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Frames, height, width and fps (0 if unknown) of the clips that the denoiser was trained on, or else the
    tokenizer; and the settings `data` of its run, {} if it had none."""
    kind = "transformer" if checkpoint_folder(model / "transformer") else "tokenizer"
    description = load_description(model / kind, kind)[1]
    clip = {"frames": 17, "height": 64, "width": 64, "fps": 0.0, **description.get("clip", {})}
    return clip, description.get("data", {})


def real_clips(
    source: Path, count: int, frames: int, size: tuple[int, int], model: Path
) -> tuple[np.ndarray, list[str], list[str]]:
    """At most `count` clips spread over a folder, or from the beginning of a film -> uint8 [N, frames, *size, 3], and
    of those from a folder the classes and captions.

    As in the model's training, films are taken at data.fps, and every data.stride-th of their frames. If the clips have
    another rate than those of training all the same, that is told; of a folder that was prepared so it is a WaltError.
    """
    clip, data = trained_on(model)
    fps, stride = data.get("fps", 0.0), data.get("stride", 1)
    rate = clip["fps"] if min(frames, clip["frames"]) > 1 else 0.0  # pictures have none
    needed = (frames - 1) * stride + 1
    with reading(source):
        is_film = source.is_file()
    if is_film:
        if source.suffix.lower() not in VIDEO_SUFFIXES:
            raise WaltError(f"{source} is not a video; expected one of {', '.join(VIDEO_SUFFIXES)}")
        with as_user_error(str(source)):
            film = np.stack([fill(frame[None], *size)[0] for frame in iterate_video(source, fps)])
        starts = range(0, len(film) - needed + 1, frames * stride)
        if not starts:
            raise WaltError(f"{source} has {len(film)} frames; clips of {needed} are wanted")
        tell_other_rate(source, (fps or frame_rate(source)) / stride, model, rate)
        return np.stack([film[start : start + needed : stride] for start in starts][:count]), [], []
    overrides = {"data.height": size[0], "data.width": size[1], "data.fps": fps}
    cache = open_data(source, model / "evaluation", load_settings("base", overrides=overrides))
    prepared = cache.settings.fps
    if rate and prepared != fps and not same_rate(prepared, rate * stride):
        raise WaltError(
            f"{source} was prepared at {prepared:g} frames a second, but {model} was trained on films of"
            f" {rate * stride:g}: prepare it without --fps"
        )
    tell_other_rate(source, cache.rate / stride, model, rate)
    rows = cache.windows(frames, stride=stride, hop=frames * stride)
    if not len(rows):
        raise WaltError(f"{source} holds no clip of {frames} frames")
    tell(cache.too_short(frames, stride=stride).lines())
    rows = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
    items = [cache.items[index] for index, _ in rows]
    clips = cache.read(rows, frames, stride=stride, crop=size)
    return clips, [item.label or "" for item in items], [item.caption or "" for item in items]
