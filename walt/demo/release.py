"""`walt demo --release OUT`: the model in this package, made from nothing, and its card.

OUT holds the clips, every stage's training as `walt train` leaves it, and in OUT/tiny-doom what the package ships. Each
part that is there already is kept, so a run that was stopped goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from walt.atomic import read_json
from walt.commands.evaluate import SETS, Evaluate
from walt.commands.model import find_device
from walt.data.clips import ClipStore
from walt.data.simulator import RELEASED, SCENARIOS
from walt.demo.card import CARD, machine, save_card
from walt.demo.clips import FOLDERS, ClipSet
from walt.demo.progress import HeldOut
from walt.evaluate.networks import FrameFeatures
from walt.locks import locked
from walt.model.cost import count
from walt.pretrained import TINY_DOOM
from walt.sample.pipeline import WaltPipeline
from walt.sample.preview import denoiser_preview
from walt.settings import Settings, load_settings
from walt.train.denoiser import train_denoiser
from walt.train.log import read_log
from walt.train.run import Run
from walt.train.tokenizer import train_tokenizer

FRAMES, SIZE = 17, 64  # of the base model's clips; super-resolution doubles the size
CLIPS, HELD_OUT = RELEASED, 9  # a class
# Stage: its preset, and what is set beside that. 1.6 hours on two cores.
RECIPE: dict[str, tuple[str, dict[str, Any]]] = {
    # Squared error first; then sharpness, by features and at last by a discriminator.
    "tokenizer": (
        "tiny",
        {
            "training.steps": 20_000,
            "training.preview_every": 1_000,
            "losses.perceptual": 0.012,
            "losses.perceptual_start": 12_500,
            "losses.adversarial": 0.002,
            "losses.adversarial_start": 19_000,
            "losses.r1": 1.0,
        },
    ),
    "base": (
        "tiny",
        {
            "training.steps": 13_000,
            "transformer.layers": 4,
            "transformer.text_width": 64,
            "transformer.text_vocabulary": 256,
            "transformer.frame_condition": True,
            "data.text": "bytes",
            "data.batch": 16,
            "data.images": 2,
        },
    ),
    "sr1": (
        "tiny-sr",
        {
            "training.steps": 20_000,
            "transformer.layers": 3,
            "transformer.width": 128,
            "transformer.heads": 2,
            "data.batch": 8,
        },
    ),
}
PROGRESS = "held-out.jsonl"
EVALUATION = "evaluation.json"
METRICS = ("psnr", "ssim", "colour", "frechet_image_distance")
DATA = {
    "data": f"{CLIPS} clips of each class, rendered by ViZDoom or cut from the film; held out are {HELD_OUT} more:"
    " other episodes, and the last frames of the film",
    "licences": "ViZDoom is MIT, Freedoom's assets are BSD; Big Buck Bunny (Blender Foundation) is CC-BY 3.0",
}
FAULTS = (
    "walls lose their textures, most of all in my_way_home, and flat surfaces have a fine pattern that is not there",
    "monsters and things far away are blots, or vanish",
    "turning and walking are right; what comes into view later in a long clip is made up anew",
    "it knows seven rooms and five seconds of a film, and captions of their kind alone",
    "super-resolution makes worse what it enlarges, since the tokenizer knows frames of 64x64 alone: at 128x128 some"
    " colours are wrong, weapons and monsters smear; bicubic interpolation is nearer to the clip",
)


def stage_settings(stage: str, seed: int) -> Settings:
    """A stage's settings, as `walt train` has them with these options."""
    preset, options = RECIPE[stage]
    size = SIZE * (2 if stage == "sr1" else 1)
    shared: dict[str, Any] = {
        "data.frames": FRAMES,
        "data.height": size,
        "data.width": size,
        "training.seed": seed,
        "training.save_every": 500,
    }
    shared |= {"training.precision": "bfloat16", "training.ema_decay": 0.999}
    return load_settings(stage, preset=preset, overrides={**shared, **options})


class Release:
    """One release in one folder."""

    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.seed = out, seed
        self.clips = ClipSet(seed, CLIPS, HELD_OUT, FRAMES, 2 * SIZE, SCENARIOS)

    @property
    def num(self) -> int:
        """All held-out clips; the film is one more class."""
        return self.clips.held_out * (len(self.clips.scenarios) + 1)

    @property
    def command(self) -> str:
        return f"walt demo --release OUT --seed {self.seed}"

    @property
    def evaluation(self) -> str:
        return (
            f"walt evaluate --data OUT/held-out --reference OUT/data --num {self.num} --metrics {' '.join(METRICS)}"
            f" --of {' '.join(SETS)}"
        )

    def run(self) -> Path:
        """Make what is missing; the folder of the model."""
        FrameFeatures()  # fails now, not after hours, if a package is missing
        with locked(self.out):
            train, test = self.clips.open(self.out)
            stages = {stage: self._train(stage, train, test) for stage in RECIPE}
            model = self.out / TINY_DOOM
            # One of other trainings may be there, of another seed or from before a stage was trained anew; or of
            # other figures.
            card = model / CARD
            if not card.is_file() or not self._is_of(read_json(card), stages):
                pipeline = WaltPipeline.from_pretrained(self.out)
                pipeline.save_pretrained(model, dtype=torch.float16)
                save_card(model, self._card(pipeline, stages, self._evaluate(model)))
        return model

    def _is_of(self, card: dict[str, Any], stages: dict[str, dict[str, float]]) -> bool:
        made = {name: {key: stage.get(key) for key in stages[name]} for name, stage in card.get("stages", {}).items()}
        return made == stages and (card.get("command"), card.get("evaluation")) == (self.command, self.evaluation)

    def _train(self, stage: str, train: ClipStore, test: ClipStore) -> dict[str, float]:
        run = Run(stage, stage_settings(stage, self.seed), train, self.out, find_device(None))
        if stage != "tokenizer":
            return train_denoiser(run, preview=denoiser_preview).progress()
        shown = HeldOut(self.out / PROGRESS, self.clips.read(test, size=SIZE))
        return train_tokenizer(run, preview=shown).progress()

    def _evaluate(self, model: Path) -> dict[str, Any]:
        """What `walt evaluate` finds on the held-out clips."""
        train, test = (self.out / name for name in FOLDERS)
        Evaluate(
            from_=str(model),
            data=test,
            reference=train,
            metrics=METRICS,
            of=SETS,
            num=self.num,
            json=self.out / EVALUATION,
        ).run()
        return read_json(self.out / EVALUATION)

    def _card(
        self, pipeline: WaltPipeline, stages: dict[str, dict[str, float]], held_out: dict[str, Any]
    ) -> dict[str, Any]:
        networks = [pipeline.tokenizer, pipeline.transformer, *(stage.transformer for stage in pipeline.upscalers)]
        parameters = {stage: count(network) for stage, network in zip(stages, networks, strict=True)}
        kept = ("values", "by_class", "real", "fake", "clip")
        return {
            "what": f"{FRAMES} frames of {SIZE}x{SIZE} pixels, and of {2 * SIZE}x{2 * SIZE} by `walt upscale`; on a"
            " class, a sentence, first frames",
            "classes": list(pipeline.classes),
            "command": self.command,
            "machine": machine(find_device(None)),
            "stages": {stage: {**progress, "parameters": parameters[stage]} for stage, progress in stages.items()},
            "data": DATA,
            "evaluation": self.evaluation,
            "held_out": {name: {key: result[key] for key in kept} for name, result in held_out.items()},
            "psnr_by_step": [[row["step"], round(row["psnr"], 2)] for row in read_log(self.out / PROGRESS)],
            "faults": list(FAULTS),
        }
