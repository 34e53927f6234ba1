"""`walt demo`: what the model in this package does, then a training from nothing, within a budget of minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from walt.atomic import write_json
from walt.data.clips import ClipStore
from walt.data.simulator import check_scenario
from walt.demo import packaged, trained
from walt.demo.clips import ClipSet
from walt.demo.config import DemoConfig
from walt.demo.report import Report
from walt.errors import WaltError, as_user_error
from walt.locks import locked

INTRO = (
    "A causal video tokenizer and a windowed-attention diffusion transformer: first the model that the package"
    " ships, then a training from nothing by the code of <code>walt train</code>. The page refreshes itself."
)
TOKENIZER_SHARE = 0.7  # of the training time


class Demo:
    """A demo in one folder. Re-running resumes each stage from its checkpoint."""

    def __init__(self, config: DemoConfig, out: str | Path) -> None:
        self.config, self.out = config, Path(out)
        self.started = time.monotonic()
        c = config
        self.clips = ClipSet(c.seed, c.clips, c.samples, c.frames, c.size, c.scenarios)
        settings, classes = config.settings("base"), len(config.scenarios) + 1  # the film's
        if not settings.transformer.classes:
            raise WaltError(f"--preset {config.preset} has no classes, which the demo's has to have; give tiny")
        with as_user_error(f"clips of {config.frames} frames at {config.size}x{config.size}"):
            latent = settings.tokenizer.latent_shape(config.frames, config.size, config.size)
            settings.transformer.resized(latent, classes)
        for scenario in config.scenarios:
            check_scenario(scenario)
        trained.check_media(self.out, classes, config.size)
        self.report = Report(self.out, "W.A.L.T: a demo", INTRO, [*packaged.SECTIONS, *trained.SECTIONS])

    def run(self) -> dict[str, Any]:
        """The figures of the demo, which metrics.json holds too; WaltError at the end if a section failed."""
        torch.manual_seed(self.config.seed)
        if self.out.exists() and not self.out.is_dir():
            raise WaltError(f"--out {self.out} is a file, not a folder")
        with locked(self.out):
            self.clips.check_folder(self.out)
            try:
                metrics = self._run()
            finally:
                self.report.finish()
        if failed := self.report.failed():
            raise WaltError(f"not all of the demo worked: {'; '.join(failed)}")
        return metrics

    def _run(self) -> dict[str, Any]:
        metrics: dict[str, Any] = {"settings": asdict(self.config), "threads": torch.get_num_threads(), "seconds": {}}
        stores: dict[str, ClipStore] = {}

        def part(name: str, title: str, work: Callable[[], dict[str, Any] | None]) -> None:
            begun = time.monotonic()
            with self.report.section(title):
                metrics.update(work() or {})
            metrics["seconds"][name] = round(time.monotonic() - begun, 1)

        shown = packaged.Packaged(self.report, self.config.seed, self.config.sampling_steps)
        part("samples", packaged.SAMPLES, shown.samples)
        part("longer", packaged.LONGER, shown.longer)
        part("sentence", packaged.SENTENCE, shown.sentence)
        part("larger", packaged.LARGER, shown.larger)

        def reconstructions() -> dict[str, Any]:
            stores["train"], stores["held-out"] = self.clips.open(self.out)
            return shown.reconstructions(stores["held-out"], self.clips)

        part("reconstructions", packaged.RECONSTRUCTIONS, reconstructions)
        if len(stores) == 2:
            ours = trained.Trained(self.config, self.out, self.report, self.clips, stores["train"], stores["held-out"])
            part("tokenizer", trained.TOKENIZER, lambda: ours.tokenizer(TOKENIZER_SHARE * self.left()))
            part("transformer", trained.BASE, lambda: ours.base(self.left()))
            part("kernels", trained.KERNELS, ours.kernels)
            part("cost", trained.COST, ours.cost)
        metrics["seconds"]["total"] = round(time.monotonic() - self.started, 1)
        write_json(self.out / "metrics.json", metrics)
        return metrics

    def left(self) -> float:
        """Seconds of the budget."""
        return self.config.minutes * 60 - (time.monotonic() - self.started)


def summary(metrics: dict[str, Any], out: Path) -> Sequence[str]:
    """What the demo prints at the end."""
    rows = [
        (f"held-out clips, {name}", f"PSNR {figures['psnr']:.2f} dB, colours off by {figures['colour']:.3f} of 2")
        for name, figures in (("tiny-doom", metrics["packaged"]), ("from nothing", metrics["trained"]))
    ]
    rows += [("time", f"{metrics['seconds']['total']:.0f} s"), ("report", str(out / "report.html"))]
    return [f"{name:<40} {text}" for name, text in rows]
