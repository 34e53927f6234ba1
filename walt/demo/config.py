"""Settings of `walt demo`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from walt.commands.options import Natural, Positive, Real, one_of, value, words
from walt.data.simulator import SCENARIOS
from walt.presets import PRESETS
from walt.settings import Settings, load_settings

BATCH, IMAGES = 16, 4  # samples of a step of the transformer, and the stacks of images among them


@dataclass(kw_only=True)
class DemoConfig:
    """Settings of a demo. The budget of minutes may end a stage before its last step."""

    scenarios: Annotated[tuple[str, ...], words("NAME ...")] = SCENARIOS  # ViZDoom's, each one a class
    preset: Annotated[str, value(one_of(*PRESETS), "NAME")] = "tiny"  # sizes of the models
    minutes: Real = 10.0  # budget of wall-clock time
    clips: Positive = 96  # training clips a class
    samples: Positive = 9  # held-out clips a class
    frames: Positive = 17  # frames a clip, 1 + 4k
    size: Positive = 64  # height and width in pixels, a multiple of 8
    tokenizer_steps: Positive = 20_000  # training steps of the tokenizer, at most
    transformer_steps: Positive = 20_000  # training steps of the transformer, at most
    sampling_steps: Positive = 50  # DDIM steps
    preview_seconds: Real = 60.0  # from preview to preview of a training
    seed: Natural = 0  # of data, weights, batches and samples

    def settings(self, stage: str) -> Settings:
        """The preset's settings of a stage, as `walt train` has them, with the demo's steps, batch and sizes."""
        base = load_settings(stage, preset=self.preset)
        if stage == "tokenizer":
            steps, batch, images = self.tokenizer_steps, base.data.batch, 0
        else:
            steps, batch, images = self.transformer_steps, BATCH, IMAGES
        # How often it is asked whether a preview is due.
        training = replace(base.training, steps=steps, save_every=500, preview_every=20, seed=self.seed)
        data = replace(base.data, frames=self.frames, height=self.size, width=self.size, batch=batch, images=images)
        return replace(base, data=data, training=training)
