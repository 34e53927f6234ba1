"""`walt demo`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from walt.commands.options import Command, Natural, Positive, Real, one_of, value, words
from walt.demo import demo
from walt.demo.card import describe_model
from walt.demo.config import DemoConfig
from walt.demo.release import Release
from walt.errors import WaltError
from walt.presets import PRESETS


@dataclass(kw_only=True)
class Demo(Command):
    out: Path = Path("runs/demo")  # output folder; re-running goes on with what is not finished
    scenarios: Annotated[tuple[str, ...], words("NAME ...")] = DemoConfig.scenarios  # ViZDoom's, each one a class
    preset: Annotated[str, value(one_of(*PRESETS), "NAME")] = DemoConfig.preset  # sizes of the models
    minutes: Real = DemoConfig.minutes  # budget of wall-clock time
    clips: Positive = DemoConfig.clips  # training clips a class
    samples: Positive = DemoConfig.samples  # held-out clips a class
    frames: Positive = DemoConfig.frames  # frames a clip, 1 + 4k
    size: Positive = DemoConfig.size  # height and width in pixels, a multiple of 8
    tokenizer_steps: Positive = DemoConfig.tokenizer_steps  # training steps of the tokenizer, at most
    transformer_steps: Positive = DemoConfig.transformer_steps  # training steps of the transformer, at most
    sampling_steps: Positive = DemoConfig.sampling_steps  # DDIM steps
    preview_seconds: Real = DemoConfig.preview_seconds  # from preview to preview of a training
    seed: Natural = DemoConfig.seed  # of data, weights, batches and samples
    # Instead of a demo, make the model in this package there, with its card: hours on a CPU; re-running resumes.
    release: Path | None = None

    examples = ("walt demo --out runs/demo --minutes 10", "walt demo --release runs/release")

    def run(self) -> None:
        if self.release is not None:
            self.check_release()
            print(describe_model(Release(self.release, self.seed).run()))
            return
        options = {**vars(self)}
        del options["release"]
        out = options.pop("out")
        metrics = demo.Demo(DemoConfig(**options), out).run()
        print("\n".join(demo.summary(metrics, out)))

    def check_release(self) -> None:
        """WaltError for options of the demo."""
        for option in fields(self):
            if option.name not in ("release", "seed") and getattr(self, option.name) != option.default:
                name = option.name.replace("_", "-")
                raise WaltError(f"--{name}: --release takes no option but --seed; leave it out")
