"""What the model in this package makes, as sections of the demo's report."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from walt.data.clips import ClipStore
from walt.data.pixels import enlarge
from walt.data.simulator import CAPTIONED
from walt.demo.clips import ClipSet
from walt.demo.reconstructed import measure, pairs
from walt.demo.report import Report, command, paragraph
from walt.evaluate.evaluate import reconstructions
from walt.pretrained import TINY_DOOM
from walt.sample.pipeline import WaltPipeline
from walt.sample.sampler import Options

SAMPLES = "Samples of the model in this package"
LONGER = "Longer clips"
SENTENCE = "A sentence"
LARGER = "Twice as large"
RECONSTRUCTIONS = "Held-out clips, and what its tokenizer keeps of them"
SECTIONS = (SAMPLES, LONGER, SENTENCE, LARGER, RECONSTRUCTIONS)
COLUMNS = 4
LONG = ("my_way_home", "deadly_corridor", "health_gathering", "defend_the_center")  # what is made longer
TEXT = f"turning left {CAPTIONED['deadly_corridor'][0]}"


class Packaged:
    """Shows tiny-doom."""

    def __init__(self, report: Report, seed: int, steps: int) -> None:
        self.report = report
        self.options: Options = {"seed": seed, "steps": steps, "progress": False}

    @cached_property
    def pipeline(self) -> WaltPipeline:
        return WaltPipeline.from_pretrained(TINY_DOOM)

    def samples(self) -> None:
        """A clip of each class."""
        classes = self.pipeline.classes
        made = self.pipeline.generate(classes, len(classes), **self.options)
        self.report.show(
            SAMPLES,
            paragraph(f"One clip of each class, the first and not the best: {', '.join(classes)}."),
            self._video("samples", made, COLUMNS, "a sample of each class"),
            command("walt sample --class basic --out basic.mp4"),
        )

    def longer(self) -> None:
        """Clips, each with two continuations from its last five frames."""
        clips = self.pipeline.generate(LONG, len(LONG), **self.options)
        longer = self.pipeline.extend(clips, 2, label=LONG, **self.options)
        self.report.show(
            LONGER,
            paragraph(f"From {clips.shape[1]} frames to {longer.shape[1]}: each goes on from its last five, twice."),
            self._video("longer", longer, COLUMNS, "clips made longer"),
            command(f"walt extend --class basic --video basic.mp4 --frames {longer.shape[1]}"),
        )

    def sentence(self) -> None:
        """Four clips of a sentence."""
        made = self.pipeline.generate(num=COLUMNS, text=TEXT, **self.options)
        self.report.show(
            SENTENCE,
            paragraph(f"Four clips of “{TEXT}”."),
            self._video("sentence", made, COLUMNS, TEXT),
            command(f'walt sample --text "{TEXT}"'),
        )

    def larger(self) -> None:
        """A clip enlarged by bicubic interpolation and by super-resolution."""
        other: Options = {**self.options, "seed": self.options["seed"] + 1}  # than the one among the samples
        clip = self.pipeline.generate("basic", 1, **other)
        large = self.pipeline.upscale(clip, **self.options)
        height, width = large.shape[2:4]
        pair = np.concatenate([enlarge(clip[0], height, width)[None], large])
        self.report.show(
            LARGER,
            paragraph(
                f"A sample at {width}x{height} pixels by bicubic interpolation, and beside it by the super-resolution"
                " stage, which is there to be tried: interpolation is nearer to real clips, and the card says why."
            ),
            self._video("larger", pair, 2, "a sample enlarged by interpolation and by super-resolution"),
            command("walt upscale --video basic.mp4"),
            command("walt info tiny-doom"),
        )

    def reconstructions(self, store: ClipStore, clips: ClipSet) -> dict[str, Any]:
        """PSNR and colours of held-out clips, and one of each class."""
        real = clips.read(store)
        made = reconstructions(self.pipeline.tokenizer, real)
        figures = measure(real, made, store)
        self.report.show(RECONSTRUCTIONS, *pairs(self.report, "reconstructions", real, made, store, figures))
        return {"packaged": figures}

    def _video(self, name: str, videos: np.ndarray, columns: int, text: str) -> str:
        return self.report.video(name, videos, min(columns, len(videos)), self.pipeline.clip.fps, text)
