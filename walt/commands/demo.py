"""`walt demo`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from walt.commands.options import Command
from walt.demo import demo
from walt.demo.card import describe_model
from walt.demo.config import DemoConfig
from walt.demo.release import Release
from walt.errors import WaltError


@dataclass(kw_only=True)
class Demo(DemoConfig, Command):
    out: Path = Path("runs/demo")  # output folder; re-running goes on with what is not finished
    # Instead of a demo, make the model in this package there, with its card: hours on a CPU; re-running resumes.
    release: Path | None = None

    examples = ("walt demo --out runs/demo --minutes 10", "walt demo --release runs/release")

    @classmethod
    def default(cls, arguments: Sequence[str]) -> None:
        """WaltError for options of the demo beside --release, which would be passed over."""
        given = [word.partition("=")[0] for word in arguments]
        others = {f"--{option.name.replace('_', '-')}" for option in fields(cls)} - {"--release", "--seed"}
        if "--release" in given and (wrong := [word for word in given if word in others]):
            raise WaltError(f"{wrong[0]}: --release takes no option but --seed; leave it out")

    def run(self) -> None:
        if self.release is not None:
            print(describe_model(Release(self.release, self.seed).run()))
            return
        config = DemoConfig(**{option.name: getattr(self, option.name) for option in fields(DemoConfig)})
        metrics = demo.Demo(config, self.out).run()
        print("\n".join(demo.summary(metrics, self.out)))
