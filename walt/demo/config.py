"""Settings of `walt demo`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from walt.data.simulator import SCENARIOS
from walt.settings import Settings, load_settings


@dataclass(frozen=True)
class DemoConfig:
    """Settings of a demo. The budget of minutes may end a stage before its last step."""

    minutes: float = 10.0  # budget of wall-clock time
    preset: str = "tiny"  # sizes of the models
    seed: int = 0  # of data, weights, batches and samples
    scenarios: tuple[str, ...] = SCENARIOS  # of ViZDoom, each one a class
    clips: int = 96  # training clips a class
    samples: int = 9  # held-out clips a class
    frames: int = 17  # of a clip, 1 + 4k
    size: int = 64  # height and width in pixels, a multiple of 8
    tokenizer_steps: int = 20_000  # training steps of the tokenizer, at most
    tokenizer_share: float = 0.7  # of the training time
    transformer_steps: int = 20_000  # training steps of the transformer, at most
    transformer_batch: int = 16  # samples of one of its steps
    transformer_images: int = 4  # stacks of images among them
    sampling_steps: int = 50  # DDIM steps
    preview_seconds: float = 60.0  # from preview to preview of a training

    def settings(self, stage: str) -> Settings:
        """The preset's settings of a stage, as `walt train` has them, with the demo's steps, batch and sizes."""
        base = load_settings(stage, preset=self.preset)
        if stage == "tokenizer":
            steps, batch, images = self.tokenizer_steps, base.data.batch, 0
        else:
            steps, batch, images = self.transformer_steps, self.transformer_batch, self.transformer_images
        # How often it is asked whether a preview is due.
        training = replace(base.training, steps=steps, save_every=500, preview_every=20, seed=self.seed)
        data = replace(base.data, frames=self.frames, height=self.size, width=self.size, batch=batch, images=images)
        return replace(base, data=data, training=training)
