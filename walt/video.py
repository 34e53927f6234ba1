"""Video files: read with PyAV, write mp4, gif and png. A video is uint8 [T, H, W, 3], RGB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from walt.errors import WaltError, require
from walt.files import replacing

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".mpg", ".gif")


def read_video(path: str | Path, *, start: int = 0, frames: int | None = None) -> np.ndarray:
    """Frames start .. start + frames - 1 (all that follow if frames is None) as uint8 [T, H, W, 3].

    Raises WaltError if the file is missing, is no video, or holds too few frames.
    """
    av = require("av", "video")
    path = Path(path)
    if not path.is_file():
        raise WaltError(f"no such video: {path}")
    stop = None if frames is None else start + frames
    pictures: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise WaltError(f"{path} has no video stream")
            for index, frame in enumerate(container.decode(video=0)):
                if index == stop:
                    break
                if index >= start:
                    pictures.append(frame.to_ndarray(format="rgb24"))
    except (av.error.FFmpegError, OSError) as error:
        raise WaltError(f"{path} is not a video that can be decoded: {error.strerror or error}") from error
    if not pictures or (frames is not None and len(pictures) < frames):
        wanted = "at least 1" if frames is None else str(frames)
        raise WaltError(f"{path} gives {len(pictures)} frames from frame {start} on, but {wanted} are needed")
    return np.stack(pictures)


def write_mp4(path: str | Path, video: np.ndarray, fps: int = 12) -> None:
    """H.264, 4:2:0. Odd heights and widths get one more row or column (a copy of the edge), as 4:2:0 needs."""
    av = require("av", "video")
    video = _check(video)
    _, height, width, _ = video.shape
    video = np.pad(video, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with replacing(path) as temporary:
        try:
            with av.open(str(temporary), "w") as container:
                stream = container.add_stream("libx264", rate=fps)
                stream.height, stream.width = video.shape[1:3]
                stream.pix_fmt = "yuv420p"
                stream.options = {"crf": "14"}
                for picture in video:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))))
                container.mux(stream.encode())
        except av.error.FFmpegError as error:
            raise WaltError(f"cannot write {path}: {error.strerror or error}") from error


def write_gif(path: str | Path, video: np.ndarray, fps: int = 12) -> None:
    """An endless GIF with one palette for all frames (adaptive palettes flicker and are 40 times slower)."""
    image = require("PIL.Image", "video")
    video = _check(video)
    sampled = video[:: max(1, len(video) // 4)]
    palette = image.fromarray(sampled.reshape(-1, *video.shape[2:])).quantize(256, dither=image.Dither.NONE)
    pictures = [image.fromarray(p).quantize(palette=palette, dither=image.Dither.NONE) for p in video]
    with replacing(path) as temporary:
        pictures[0].save(
            temporary, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0, optimize=False
        )


def write_png(path: str | Path, picture: np.ndarray) -> None:
    """uint8 [H, W, 3]."""
    image: Any = require("PIL.Image", "video")
    with replacing(path) as temporary:
        image.fromarray(picture).save(temporary)


def write_video(path: str | Path, video: np.ndarray, fps: int = 12) -> None:
    """By suffix: .mp4 or .gif."""
    suffix = Path(path).suffix.lower()
    writers = {".mp4": write_mp4, ".gif": write_gif}
    if suffix not in writers:
        raise WaltError(f"cannot write {path}: the name must end in {' or '.join(writers)}")
    writers[suffix](path, video, fps)


def tile(videos: np.ndarray, columns: int, *, margin: int = 2, scale: int = 1) -> np.ndarray:
    """Videos [N, T, H, W, 3] side by side in rows of `columns`, each pixel repeated `scale` times -> [T, H', W', 3]."""
    videos = np.asarray(videos).repeat(scale, axis=2).repeat(scale, axis=3)
    count, frames, height, width, _ = videos.shape
    rows = -(-count // columns)
    sheet = np.full((frames, rows * (height + margin) + margin, columns * (width + margin) + margin, 3), 24, np.uint8)
    for index, video in enumerate(videos):
        top = margin + index // columns * (height + margin)
        left = margin + index % columns * (width + margin)
        sheet[:, top : top + height, left : left + width] = video
    return sheet


def _check(video: np.ndarray) -> np.ndarray:
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or not len(video):
        raise WaltError(f"a video must be uint8 [T, H, W, 3] with T >= 1, got {video.dtype} {list(video.shape)}")
    return video
