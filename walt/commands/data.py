"""`walt demo-data` and `walt prepare`: data sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from walt.commands.options import Command, Natural, Positive, Rate, Share, Size
from walt.data.clips import ClipStore
from walt.data.prepare import prepare
from walt.data.simulator import write_demo_folder
from walt.errors import as_user_error
from walt.model.config import TokenizerConfig
from walt.model.text import ByteEncoder
from walt.train.run import captions_of, warn_of_cut_captions


@dataclass(kw_only=True)
class DemoData(Command):
    out: Path  # a new folder
    num: Positive = 24  # clips a class
    frames: Positive = 17  # of a clip
    size: Positive = 128  # height and width in pixels
    seed: Natural = 0  # of the clips

    examples = ("walt demo-data --out clips --num 24",)

    def run(self) -> None:
        with as_user_error("--frames, --size"):
            write_demo_folder(self.out, clips_per_class=self.num, frames=self.frames, size=self.size, seed=self.seed)
        clips, classes = len(list(self.out.glob("*/*.mp4"))), len(list(self.out.glob("*/")))
        print(f"{self.out}: {clips} clips in {classes} classes, captions.jsonl")


@dataclass(kw_only=True)
class Prepare(Command):
    data: Path  # folder of videos and images; subfolders are classes
    out: Path  # output folder; re-running resumes
    size: Size = (64, 64)  # in pixels, multiples of 8
    fps: Rate | None = None  # read films at this many frames a second (default: every frame)
    captions: Path | None = None  # CSV or JSONL of file, caption (default: one in the folder)
    held_out: Share | None = None  # share of the files that training never sees (default: as before, or 0)
    shots: bool = True  # let clips run across cuts

    examples = ("walt prepare --data clips --out clips-64 --size 64",)

    def run(self) -> None:
        height, width = self.size
        with as_user_error("--size"):
            TokenizerConfig().latent_shape(1, height, width)  # as training asks
        store = prepare(
            self.data,
            self.out,
            height=height,
            width=width,
            captions=captions_of(self.data, self.captions),
            shots=self.shots,
            fps=self.fps or 0.0,
            held_out=self.held_out,
        )
        print(f"{self.out}: {contents(store)}")
        warn_of_cut_captions(store, ByteEncoder())


def contents(store: ClipStore) -> str:
    videos = [item for item in store.items if item.kind == "video"]
    shots = sum(len(item.shots) for item in videos)
    frames = sum(item.frames for item in store.items)
    return (
        f"{len(videos)} videos with {shots} shots and {len(store.items) - len(videos)} images, {frames} frames,"
        f" {len(store.classes)} classes, {sum(map(bool, store.caption))} captions"
    )
