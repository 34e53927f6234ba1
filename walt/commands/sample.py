"""`walt sample`, `walt extend` and `walt upscale`: videos and pictures from a trained model."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from walt.commands.model import ModelCommand
from walt.commands.options import Natural, Positive, Rate, Real, Repeated, one_of, value
from walt.data.pixels import fill
from walt.data.video import (
    IMAGE_SUFFIXES,
    check_output,
    check_size,
    frame_rate,
    keeping,
    read_image,
    read_video,
    sheet_size,
    tile,
    tiles_of,
    write_png,
    write_video,
)
from walt.errors import WaltError, WaltWarning, as_user_error, say
from walt.rates import check_rate
from walt.sample.pipeline import OVERLAP


@dataclass(kw_only=True)
class SamplingCommand(ModelCommand):
    """Options of all commands that sample."""

    class_: Repeated = field(default_factory=list)  # name or number
    text: Repeated = field(default_factory=list)  # a sentence, for models with text; "" is no text and no class
    guidance: Real = 1.0  # weight of the class or text; 1 is none
    guidance_power: Real | None = None  # raise it from 1 to W on a power-cosine schedule of this power
    steps: Positive = 50  # DDIM steps
    seed: Natural = 0  # of the noise
    batch: Positive = 16  # samples at a time
    fps: Rate | None = None  # frames a second, such as 24 or 30000/1001 (default: the video's)

    def sampling(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("steps", "seed", "guidance", "guidance_power", "batch")}

    def conditions(self) -> dict[str, Any]:
        """The class and the sentence for the one video."""
        for option, values in (("--class", self.class_), ("--text", self.text)):
            if len(values) > 1:
                raise WaltError(f"{option}: given again; expected one, for the one video")
        return {"label": next(iter(self.class_), None), "text": next(iter(self.text), None)}

    def rate(self, video: Path, default: float) -> float:
        """Frames a second of what is made from a video: --fps, or else the video's."""
        fps = float(self.fps or frame_rate(video) or default)
        check_rate(fps)
        return fps


@dataclass(kw_only=True)
class Sample(SamplingCommand):
    class_: Repeated = field(default_factory=list)  # name or number; given again, a clip of each
    # A sentence, for models with text; "" is no text and no class; given again, a clip of each.
    text: Repeated = field(default_factory=list)
    out: Path | None = None  # .mp4, .gif, or .png for pictures (default: samples.mp4)
    # Frames a second, such as 24 or 30000/1001 (default: the training data's; with --given 5, the video's).
    fps: Rate | None = None
    first_frames: Path | None = None  # picture, or video to take them from
    given: Annotated[int, value(one_of(1, 5), "{1,5}")] = 1  # frames of it
    num: Positive | None = None  # samples (default: one, or one of each class); several are a grid in one file
    separate: bool = False  # a file for each sample instead of a grid: samples-1.mp4, samples-2.mp4 ...
    images: bool = False  # independent pictures instead of clips

    examples = ("walt sample --from runs/mine --class basic --num 4 --out basic.mp4",)

    def run(self) -> None:
        images, labels, texts = self.images, self.class_, self.text
        out = self.out or Path("samples.png" if images else "samples.mp4")
        if out.suffix.lower() == ".png" and not images:
            raise WaltError(f"cannot write {out}: pictures are made with --images, clips are .mp4 or .gif")
        check_output(out, (".png",) if images else (".mp4", ".gif"))
        for option, values in (("--class", labels), ("--text", texts)):
            if self.num and len(values) > self.num:
                raise WaltError(f"{option}: given {len(values)} times; expected {self.num} at most (--num)")
        pipeline = self.pipeline()
        clip, frames, fps = pipeline.clip, None, self.fps or pipeline.clip.fps
        if self.first_frames is not None:
            frames = _first_frames(self.first_frames, self.given, clip.height, clip.width)
            if self.given > 1:  # they have a rate, which a single frame has not
                fps = self.rate(self.first_frames, clip.fps)
        if not labels and not texts:
            labels = list(pipeline.classes)
        num = self.num or max(len(labels), len(texts), 1)
        columns = min(num, max(8 if images else 4, math.isqrt(num - 1) + 1))
        if not self.separate and (num > 1 or images):
            check_size(out, *sheet_size(num, columns, clip.height, clip.width))
        label, text = _in_turn(labels, num), _in_turn(texts, num)
        made = pipeline.generate(label, num, text=text, frames=frames, images=images, **self.sampling())
        clips = made[:, None] if images else made
        if self.separate:
            digits = len(str(num))
            files = {out.with_stem(f"{out.stem}-{i:0{digits}}"): clip for i, clip in enumerate(clips, 1)}
        else:
            files = {out: tile(clips, columns) if num > 1 or images else clips[0]}
        with keeping(made, out):
            for path, clip in files.items():
                if images:
                    write_png(path, clip[0])
                else:
                    write_video(path, clip, fps)
        names = [*labels[:num], *(" ".join(sentence.split()) or "no text" for sentence in texts[:num])]
        kind = ("picture" if images else "clip") + "s" * (num > 1)
        grid = "a grid of " if num > len(files) else ""
        where = " to ".join(map(str, [*files][:: max(1, len(files) - 1)]))  # the first and the last
        print(f"{where}: {grid}{num} {kind} of {', '.join(names) or 'no class'}")


def _in_turn(values: list[str], num: int) -> list[str] | None:
    """`num` of them, in turn."""
    return [values[i % len(values)] for i in range(num)] if values else None


def _first_frames(path: Path, count: int, height: int, width: int) -> np.ndarray:
    """The first frames of a video, or a picture, as large as the model's: [count, height, width, 3]."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        frames = read_image(path)[None]
        if count > 1:
            raise WaltError(f"--given {count}: {path} is a single picture")
    else:
        frames = read_video(path, frames=count)
    warn_of_grid(path, frames[0], height, width)
    with as_user_error(str(path)):
        filled = fill(frames, height, width)
    rows, columns = frames.shape[1:3]
    if rows * width != columns * height:
        scale = min(rows / height, columns / width)
        say(f"{path}: the middle {scale * height:.0f}x{scale * width:.0f} of its {rows}x{columns} pixels is taken")
    return filled


def warn_of_grid(path: Path, picture: np.ndarray, height: int, width: int) -> None:
    """WaltWarning if it looks like what `walt sample` writes of several samples of that size."""
    if count := tiles_of(picture, height, width):
        message = f"{path} looks like a grid with place for {count}; walt sample --separate writes one in each file"
        warnings.warn(message, WaltWarning, stacklevel=2)


def check_frames(path: Path, video: np.ndarray, height: int, width: int) -> None:
    """WaltError, or WaltWarning for a grid before it, unless the film's frames are of that size."""
    warn_of_grid(path, video[0], height, width)
    if video.shape[1:3] != (height, width):
        size = f"{video.shape[2]}x{video.shape[1]}"
        raise WaltError(f"{path} has frames of {size} pixels; the model takes {width}x{height}: resize it before")


@dataclass(kw_only=True)
class Extend(SamplingCommand):
    video: Path  # of the model's size
    frames: Positive = 41  # at least
    out: Path = Path("extended.mp4")  # .mp4 or .gif

    examples = ("walt extend --from runs/mine --video basic.mp4 --frames 41 --out longer.mp4",)

    def run(self) -> None:
        conditions = self.conditions()
        check_output(self.out)
        pipeline, video = self.pipeline(), read_video(self.video)
        check_frames(self.video, video, pipeline.clip.height, pipeline.clip.width)
        fps = self.rate(self.video, pipeline.clip.fps)
        missing = self.frames - len(video)
        if missing <= 0:
            raise WaltError(f"--frames {self.frames}: {self.video} has {len(video)} already")
        if pipeline.clip.frames == 1:
            raise WaltError(f"{self.from_} makes pictures, which cannot be extended; train one with --frames 17")
        chunks = chunks_for(missing, pipeline.clip.frames)
        longer = pipeline.extend(video, chunks, **conditions, **self.sampling())
        with keeping(longer, self.out):
            write_video(self.out, longer, fps)
        print(f"{self.out}: {len(video)} -> {len(longer)} frames, {fps:g} a second")


def chunks_for(missing: int, clip: int) -> int:
    """How many clips of `clip` frames to add for at least `missing` new frames."""
    return -(-missing // (clip - (OVERLAP if clip > OVERLAP else 1)))


@dataclass(kw_only=True)
class Upscale(SamplingCommand):
    video: Path  # of the base model's size
    stages: Positive | None = None  # stages to use (default: all that are trained)
    out: Path = Path("upscaled.mp4")  # .mp4 or .gif

    examples = ("walt upscale --from runs/mine --video longer.mp4 --stages 2 --out large.mp4",)

    def run(self) -> None:
        conditions = self.conditions()
        check_output(self.out)
        pipeline, video = self.pipeline(), read_video(self.video)
        check_frames(self.video, video, pipeline.clip.height, pipeline.clip.width)
        fps = self.rate(self.video, pipeline.clip.fps)
        stages = len(pipeline.upscalers)
        scale = 2 ** min(self.stages or stages, stages)
        check_size(self.out, scale * video.shape[1], scale * video.shape[2])
        larger = pipeline.upscale(video, stages=self.stages, **conditions, **self.sampling())
        with keeping(larger, self.out):
            write_video(self.out, larger, fps)
        print(f"{self.out}: {video.shape[2]}x{video.shape[1]} -> {larger.shape[2]}x{larger.shape[1]} pixels")
