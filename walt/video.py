"""Video and image files: read with PyAV and Pillow, write mp4, gif and png. A video is uint8 [T, H, W, 3], RGB."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from walt.errors import WaltError, require
from walt.files import check_writable, replacing

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".mpg", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SIDES = {".mp4": 16384, ".gif": 65535, ".png": 2**31 - 1}  # pixels of a side, at most


def iterate_video(path: str | Path) -> Iterator[np.ndarray]:
    """The frames of a video one by one, uint8 [H, W, 3], the way up a player shows them. None is kept.

    Raises WaltError if the file is missing, is no video, or changes its size on the way.
    """
    av = require("av", "video")
    path = Path(path)
    if not path.is_file():
        raise WaltError(f"no such video: {path}")
    shape = None
    try:
        with _open_stream(av, path) as (container, _):
            for index, frame in enumerate(container.decode(video=0)):
                picture = frame.to_ndarray(format="rgb24")
                # A telephone held upright writes lying frames and a rotation (known to PyAV from version 14 on).
                picture = np.rot90(picture, round(getattr(frame, "rotation", 0) / 90))
                shape = picture.shape if shape is None else shape
                if picture.shape != shape:
                    raise WaltError(f"{path} changes its size from {shape[:2]} to {picture.shape[:2]} at frame {index}")
                yield picture
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WaltError(f"{path} is not a video that can be decoded: {reason}") from error


def read_video(path: str | Path, *, start: int = 0, frames: int | None = None) -> np.ndarray:
    """Frames start .. start + frames - 1 (all that follow if frames is None) as uint8 [T, H, W, 3].

    Raises WaltError if the file is missing, is no video, or holds too few frames.
    """
    stop = None if frames is None else start + frames
    pictures = list(islice(iterate_video(path), start, stop))
    if not pictures or (frames is not None and len(pictures) < frames):
        wanted = "at least 1" if frames is None else str(frames)
        raise WaltError(f"{path} gives {len(pictures)} frames from frame {start} on, but {wanted} are needed")
    return np.stack(pictures)


def frame_rate(path: str | Path) -> float:
    """Frames a second, on average; 0 if the file does not say."""
    av = require("av", "video")
    try:
        with _open_stream(av, Path(path)) as (_, stream):
            return float(stream.average_rate or 0)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WaltError(f"{path} is not a video that can be decoded: {reason}") from error


@contextlib.contextmanager
def _open_stream(av: ModuleType, path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream. Names in it that are no UTF-8 do no harm."""
    with av.open(str(path), metadata_errors="ignore") as container:
        if not container.streams.video:
            raise WaltError(f"{path} has no video stream")
        yield container, container.streams.video[0]


def read_image(path: str | Path) -> np.ndarray:
    """A picture as uint8 [H, W, 3], turned the way up its EXIF orientation says. Transparency is dropped."""
    image: Any = require("PIL.Image", "video")
    ops: Any = require("PIL.ImageOps", "video")
    if not Path(path).is_file():
        raise WaltError(f"no such image: {path}")
    try:
        with image.open(path) as picture:
            return np.array(ops.exif_transpose(picture).convert("RGB"))
    except Exception as error:  # on broken files, Pillow's formats raise what they like
        raise WaltError(f"{path} is not an image that can be decoded: {error}") from error


def check_output(path: str | Path, allowed: Sequence[str] = (".mp4", ".gif")) -> None:
    """WaltError, before the work that `path` is for, if its name ends in something else or it cannot be written."""
    if Path(path).suffix.lower() not in allowed:
        raise WaltError(f"cannot write {path}: the name must end in {' or '.join(allowed)}")
    check_writable(path)


def check_size(path: str | Path, height: int, width: int) -> None:
    """WaltError if frames of that many pixels are more than the format that `path` ends in takes."""
    suffix = Path(path).suffix.lower()
    if max(height, width) > (side := SIDES.get(suffix, SIDES[".mp4"])):
        limit = f"{suffix} takes at most {side} a side"
        raise WaltError(f"cannot write {path}: it would have {height}x{width} pixels; {limit}")


def check_rate(fps: float) -> None:
    """WaltError unless a video can have so many frames a second."""
    if not 1e-3 <= fps <= 1e6:
        raise WaltError(f"fps: got {fps}; expected 0.001 to 1000000 frames a second")


def write_mp4(path: str | Path, video: np.ndarray, fps: float = 12) -> None:
    """H.264, 4:2:0. Odd heights and widths get one more row or column (a copy of the edge), as 4:2:0 needs."""
    av = require("av", "video")
    video = _check(path, video, fps)
    _, height, width, _ = video.shape
    video = np.pad(video, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with replacing(path) as temporary:
        try:
            with av.open(str(temporary), "w") as container:
                # The fraction that was meant: 30000/1001 for 29.97002997002997.
                stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10_000))
                stream.height, stream.width = video.shape[1:3]
                stream.pix_fmt = "yuv420p"
                stream.options = {"crf": "14"}
                for picture in video:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))))
                container.mux(stream.encode())
        except av.error.FFmpegError as error:
            raise WaltError(f"cannot write {path}: {error.strerror or error}") from error


def write_gif(path: str | Path, video: np.ndarray, fps: float = 12) -> None:
    """An endless GIF with one palette for all frames (adaptive palettes flicker and are 40 times slower).

    Its clock ticks 100 times a second: frames take one tick more or less, so that the rate is right on the whole. Above
    50 frames a second each takes 2 ticks, since browsers slow down what is faster.
    """
    image = require("PIL.Image", "video")
    video = _check(path, video, fps)
    sampled = video[:: max(1, len(video) // 4)]
    palette = image.fromarray(sampled.reshape(-1, *video.shape[2:])).quantize(256, dither=image.Dither.NONE)
    pictures = [image.fromarray(p).quantize(palette=palette, dither=image.Dither.NONE) for p in video]
    ticks = [round(100 * i / min(fps, 50)) for i in range(len(video) + 1)]
    durations = [10 * (end - start) for start, end in pairwise(ticks)]
    with replacing(path) as temporary:
        pictures[0].save(
            temporary, save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=False
        )


def write_png(path: str | Path, picture: np.ndarray) -> None:
    """uint8 [H, W, 3]."""
    image: Any = require("PIL.Image", "video")
    with replacing(path) as temporary:
        image.fromarray(picture).save(temporary)


def write_video(path: str | Path, video: np.ndarray, fps: float = 12) -> None:
    """By suffix: .mp4 or .gif."""
    suffix = Path(path).suffix.lower()
    check_output(path)
    (write_gif if suffix == ".gif" else write_mp4)(path, video, fps)


@contextlib.contextmanager
def keeping(samples: np.ndarray, path: str | Path) -> Iterator[None]:
    """Around the writing of samples: if that fails, they go to a NumPy file beside `path`, or else to the folder for
    temporary files, and the WaltError says where they are."""
    try:
        yield
    except Exception as error:  # a codec may raise anything; sampling may have taken hours
        reason = error if isinstance(error, WaltError) else f"cannot write {path}: {error or type(error).__name__}"
        for folder in (Path(path).parent, Path(tempfile.gettempdir())):
            kept = folder / f"{Path(path).name}.npy"
            try:
                with replacing(kept) as temporary:
                    np.save(temporary, samples)
            except WaltError:
                continue
            raise WaltError(f"{reason}; the samples, uint8 {list(samples.shape)}, are kept in {kept}") from error
        raise


def tile(videos: np.ndarray, columns: int, *, margin: int = 2, scale: int = 1) -> np.ndarray:
    """Videos [N, T, H, W, 3] side by side in rows of `columns`, each pixel repeated `scale` times -> [T, H', W', 3]."""
    videos = np.asarray(videos).repeat(scale, axis=2).repeat(scale, axis=3)
    count, frames, height, width, _ = videos.shape
    sheet = np.full((frames, *sheet_size(count, columns, height, width, margin), 3), 24, np.uint8)
    for index, video in enumerate(videos):
        top = margin + index // columns * (height + margin)
        left = margin + index % columns * (width + margin)
        sheet[:, top : top + height, left : left + width] = video
    return sheet


def sheet_size(count: int, columns: int, height: int, width: int, margin: int = 2) -> tuple[int, int]:
    """Height and width of what `tile` makes of `count` videos."""
    return -(-count // columns) * (height + margin) + margin, columns * (width + margin) + margin


def _check(path: str | Path, video: np.ndarray, fps: float) -> np.ndarray:
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or not len(video):
        raise WaltError(f"a video must be uint8 [T, H, W, 3] with T >= 1, got {video.dtype} {list(video.shape)}")
    check_size(path, *video.shape[1:3])
    check_rate(fps)
    return video
