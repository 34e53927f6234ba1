"""Settings of a training run: a preset, a YAML file over it, single settings over both; saved with the run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from walt.atomic import atomic_write
from walt.errors import WaltError, as_user_error, did_you_mean, nearest_or_all
from walt.model.config import (
    Config,
    DiffusionConfig,
    TokenizerConfig,
    TransformerConfig,
    expect,
    expect_positive,
    expect_share,
)
from walt.presets import PRESETS
from walt.rates import as_float, expect_rate
from walt_kernels.values import is_int

Section = TypeVar("Section", bound=Config)

# Steps, batch, learning rate, optimizer and whether there is an average: table 8 of the paper, and for the presets that
# it gives in epochs (imagenet-L, k600-L) that number of samples. The decay of the average is ours.
PAPER = {
    "L": (60_000, 256, 5e-4, "adamw", True),
    "k600-L": (275_000, 512, 5e-4, "adamw", True),
    "imagenet-L": (438_000, 1024, 5e-4, "adamw", True),
    "L-T2V": (550_000, 512, 2e-4, "adafactor", False),
    "base-3B": (550_000, 512, 2e-4, "adafactor", False),
    "sr-1.3B": (675_000, 512, 5e-4, "adafactor", False),
    "sr-419M": (275_000, 512, 5e-4, "adafactor", False),
}


CHOICES = {
    "schedule": ("cosine", "constant"),
    "optimizer": ("adamw", "adafactor"),
    "precision": ("float32", "bfloat16"),
    "compile_mode": ("default", "reduce-overhead"),
    "strategy": ("ddp", "fsdp"),
    "tensorboard": (None, True, False),
}
COUNTS = {"steps": 1, "warmup": 0, "accumulate": 1, "save_every": 1, "log_every": 1, "keep": 1}
COUNTS |= {"seed": 0, "workers": 1, "profile": 0}
# What may change when a run is resumed: how it is spread over memory and devices, and what it writes.
SPREAD = ("accumulate", "compile", "compile_mode", "checkpointing", "strategy", "workers")
WRITTEN = ("save_every", "log_every", "preview_every", "keep", "tensorboard", "profile", "peak_tflops")
FREE = frozenset((*SPREAD, *WRITTEN))


@dataclass(frozen=True)
class TokenizerLossConfig(Config):
    """Weights of the tokenizer's losses: MAGVIT-v2's, except those marked as ours."""

    reconstruction: float = 5.0  # squared and absolute error of the pixels
    absolute: float = 0.1  # of the absolute error within the reconstruction loss; ours
    perceptual: float = 0.1  # distance of the features of frames
    perceptual_frames: int = 2  # drawn from each video for the perceptual loss, which bounds its cost; ours
    adversarial: float = 0.1  # of the generator's loss against the discriminator
    decorrelation: float = 0.02  # squared correlations between latent channels; ours
    r1: float = 10.0  # gradient penalty of the discriminator
    r1_every: int = 16  # on average, steps from penalty to penalty, each so many times as heavy; ours
    lecam: float = 0.001  # LeCAM regularisation of the discriminator
    lecam_decay: float = 0.999  # of its averages
    perceptual_start: int = 0  # step from which the perceptual loss counts; ours
    adversarial_start: int = 0  # step from which there is a discriminator; ours, as VQGAN has it

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reconstruction", "absolute", "perceptual", "adversarial", "decorrelation", "r1", "lecam"):
            value = getattr(self, name)
            expect(_is_number(value) and value >= 0, name, value, "a number of at least 0")
        expect_positive(self, "perceptual_frames", "r1_every")
        for name in ("perceptual_start", "adversarial_start"):
            value = getattr(self, name)
            expect(is_int(value) and value >= 0, name, value, "an int >= 0")
        good = _is_number(self.lecam_decay) and 0 <= self.lecam_decay < 1
        expect(good, "lecam_decay", self.lecam_decay, "a number from 0, below 1")


@dataclass(frozen=True)
class TrainingConfig(Config):
    """How to train. Rates and weights are per step, whatever the batch.

    lr rises linearly over `warmup` steps; "cosine" then takes it down to 2 % of itself at the last step.
    weight_decay is decoupled, for every parameter. "adafactor" is torch's: its step is min(lr, 1 / sqrt(step)) times
    the root mean square of the parameter (Shazeer and Stern 2018), so lr is relative; it has no betas.
    """

    steps: int  # in all
    lr: float = 1e-3  # learning rate
    warmup: int = 50  # steps over which lr rises from 0
    weight_decay: float = 0.0  # decoupled
    betas: tuple[float, float] = (0.9, 0.99)  # of AdamW
    clip_norm: float = 1.0  # of the gradient of each network; 0: no clipping
    ema_decay: float = 0.99  # of the averaged weights, which are kept in float32; 0: none
    save_every: int = 200  # steps from checkpoint to checkpoint
    log_every: int = 10  # steps from row to row of the log
    seed: int = 0  # of weights, batches, noise and dropout
    schedule: str = "cosine"  # or "constant"
    optimizer: str = "adamw"  # or "adafactor"
    accumulate: int = 1  # microbatches of each process in a step
    precision: str = "float32"  # or "bfloat16": autocast; parameters and optimizer stay as they are
    compile: bool = False  # torch.compile
    compile_mode: str = "default"  # torch.compile's; on a GPU "reduce-overhead" records CUDA graphs
    checkpointing: bool = False  # transformers compute each layer again in the backward pass
    strategy: str = "ddp"  # or "fsdp": parameters, optimizer and averages sharded; for one process both are the same
    preview_every: int | None = None  # steps from preview to preview; 0: never; null: four previews in a run
    keep: int = 1  # checkpoints that stay on the disk, the last one included
    tensorboard: bool | None = None  # null: if it is installed
    workers: int = 1  # threads that make batches ready while the device computes
    profile: int = 0  # steps to trace into a file beside the log; 0: none
    peak_tflops: float = 0.0  # TFLOP/s that the device could do, for the log's mfu; 0: stated or measured where known

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in COUNTS.items():
            value = getattr(self, name)
            good = is_int(value) and value >= least
            self._expect(good, name, f"an int >= {least}")
        every = self.preview_every
        self._expect(every is None or (is_int(every) and every >= 0), "preview_every", "an int >= 0 or null")
        self._expect(self.seed < 2**63, "seed", "an int below 2^63")
        for name, choices in CHOICES.items():
            self._expect(getattr(self, name) in choices, name, " or ".join(map(str, choices)))
        for name in ("compile", "checkpointing"):
            self._expect(isinstance(getattr(self, name), bool), name, "true or false")
        self._expect(self.compile or self.compile_mode == "default", "compile_mode", "default without compile")
        self._expect(_is_number(self.lr) and self.lr > 0, "lr", "a number > 0")
        for name in ("weight_decay", "clip_norm", "peak_tflops"):
            value = getattr(self, name)
            self._expect(_is_number(value) and value >= 0, name, "a number >= 0")
        self._expect(_is_number(self.ema_decay) and 0 <= self.ema_decay < 1, "ema_decay", "a number in [0, 1)")
        good = isinstance(self.betas, tuple) and len(self.betas) == 2
        good = good and all(_is_number(beta) and 0 <= beta < 1 for beta in self.betas)
        self._expect(good, "betas", "two numbers in [0, 1)")

    def _expect(self, condition: bool, name: str, expected: str) -> None:
        expect(condition, name, getattr(self, name), expected)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class DataConfig(Config):
    """Which clips a stage sees. Sizes are in pixels and frames; `batch` counts samples of a step, over all ranks."""

    frames: int = 17  # of a clip, 1 + 4k
    height: int = 64  # in pixels, a multiple of 8
    width: int = 64  # in pixels, a multiple of 8
    stride: int = 1  # every stride-th frame of a film
    fps: float = 0.0  # films are taken at this rate by their time stamps; 0: every frame
    held_out: float = 0.0  # share of the files that training never sees; 0: that of the prepared folder, or none
    batch: int = 4  # samples of a step, over all ranks
    images: int = 1  # of the batch, stacks of 1+t images; for the tokenizer images/batch of the steps have images
    flip: bool = False  # mirror half of the clips
    shots: bool = True  # no clip crosses a cut
    text: str = ""  # the text encoder: bytes, minilm or hf:FOLDER; "" for none

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_positive(self, "frames", "height", "width", "stride", "batch")
        object.__setattr__(self, "fps", expect_rate(self.fps))
        expect_share("held_out", self.held_out)
        good = is_int(self.images) and 0 <= self.images <= self.batch
        expect(good, "images", self.images, f"an int from 0 to batch={self.batch}")
        for name in ("flip", "shots"):
            expect(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        expect(isinstance(self.text, str), "text", self.text, "the name of a text encoder")


@dataclass(frozen=True)
class Settings:
    """All settings of a stage's training."""

    preset: str
    tokenizer: TokenizerConfig
    transformer: TransformerConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    losses: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(1000))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, section by section."""
        return {"preset": self.preset, **{name: getattr(self, name).to_dict() for name in SECTIONS.values()}}

    def save(self, path: Path) -> None:
        """Write the YAML file that `load_settings` reads back to the same settings."""
        with atomic_write(path) as temporary:
            temporary.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))

    def check(self, stage: str) -> None:
        """WaltError unless the clips fit the tokenizer, and the model the stage."""
        with as_user_error("data"):
            self.tokenizer.latent_shape(self.data.frames, self.data.height, self.data.width)
        if stage != "tokenizer" and self.transformer.low_resolution != stage.startswith("sr"):
            raise WaltError(
                f"transformer.low_resolution is {str(self.transformer.low_resolution).lower()}, which does not fit the"
                f" stage {stage}; give it another --preset than {self.preset} (walt info --all)"
            )


SECTIONS = {kind: name for name, kind in get_type_hints(Settings).items() if name != "preset"}


def load_settings(
    stage: str, *, preset: str | None = None, file: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> Settings:
    """The settings of a stage: defaults of the preset, then the file's sections, then overrides by "section.field".

    Raises WaltError that names the setting, and the file it is in, for unknown and for bad ones.
    """
    settings = merge_settings(stage, preset, file, overrides or {})
    settings.check(stage)
    return settings


def merge_settings(stage: str, preset: str | None, file: Path | None, overrides: Mapping[str, Any]) -> Settings:
    """`load_settings` without the check of the sections against one another, for settings that will still change."""
    document = _read(file) if file is not None else {}
    name = preset or document.get("preset") or ("tiny-sr" if stage.startswith("sr") else "tiny")
    if not isinstance(name, str) or name not in PRESETS:
        origin = f"{file}: " if file is not None and not preset else ""
        raise WaltError(f"{origin}unknown preset {name!r}{nearest_or_all(str(name), PRESETS)}")
    tokenizer, transformer = PRESETS[name]
    settings = Settings(name, tokenizer, transformer, **_recipe(name, stage))
    settings = _apply(settings, {k: v for k, v in document.items() if k != "preset"}, f"{file}: ")
    # All of a section at once: its fields must fit one another.
    sections: dict[str, dict[str, Any]] = {}
    for path, value in overrides.items():
        section_name, _, key = path.partition(".")
        sections.setdefault(section_name, {})[key] = value
    return _apply(settings, sections, "")


def _recipe(preset: str, stage: str) -> dict[str, Any]:
    """A stage's defaults: for the full-size presets the paper's (table 8; MAGVIT-v2 for the tokenizer).

    The small ones get ours, for minutes on a CPU: no adversary and no perceptual loss.
    """
    tokenizer, transformer = PRESETS[preset]
    _, frames, height, width = tokenizer.video_shape(*transformer.latent_size)
    full = transformer.width >= 1024
    text = "bytes" if transformer.text_vocabulary else ""
    if stage == "tokenizer":
        if not full:
            training = TrainingConfig(1000, lr=5e-4, warmup=100)
            losses = TokenizerLossConfig(reconstruction=1.0, adversarial=0.0, perceptual=0.0)
            # Whole clips: one that was trained on 5 frames keeps 29 dB of 5 frames, and 25 of those that come later.
            # No images, since every clip begins with one.
            data = DataConfig(frames, height, width, batch=2, images=0)
            return {"data": data, "losses": losses, "training": training}
        training = TrainingConfig(400_000, lr=1e-4, warmup=2000, betas=(0.0, 0.99), ema_decay=0.999, save_every=1000)
        return {"data": DataConfig(frames, height, width, batch=256, images=32), "training": training}
    if not full:
        images = 0 if transformer.low_resolution else 1
        data = DataConfig(frames, height, width, images=images, text=text)
        return {"data": data, "training": TrainingConfig(1000)}
    steps, batch, lr, optimizer, ema = PAPER.get(preset, PAPER["L"])
    training = TrainingConfig(
        steps, lr=lr, warmup=2000, optimizer=optimizer, ema_decay=0.9999 if ema else 0.0, save_every=1000
    )
    return {"data": DataConfig(frames, height, width, batch=batch, images=0), "training": training}


def _read(file: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(file.read_text())
    except OSError as error:
        raise WaltError(f"cannot read {file}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WaltError(f"{file} is not YAML: {error}") from error
    if not isinstance(document, dict):
        raise WaltError(f"{file} holds a {type(document).__name__}, expected sections such as training: {{lr: 1e-4}}")
    return document


def _apply(settings: Settings, sections: Mapping[str, Any], origin: str) -> Settings:
    names = {name: kind for kind, name in SECTIONS.items()}
    changed = {}
    for name, values in sections.items():
        if name not in names:
            raise WaltError(f"{origin}unknown section {name!r}{nearest_or_all(str(name), names)}")
        if not isinstance(values, dict):
            raise WaltError(f"{origin}section {name} holds {values!r}, expected fields with values")
        changed[name] = section(names[name], {**vars(getattr(settings, name)), **values}, origin)
    return dataclasses.replace(settings, **changed)


def section(kind: type[Section], values: Mapping[str, Any], origin: str) -> Section:
    """A section of settings from values as YAML has them; WaltError that names what is unknown or bad in it.

    `origin` is what comes before the name: the file, or the dashes of an option.
    """
    name, hints = SECTIONS[kind], get_type_hints(kind)
    for key in values:
        if key not in hints:
            nearest = did_you_mean(f"{name}.{key}", [f"{name}.{known}" for known in hints])
            raise WaltError(f"{origin}unknown setting {name}.{key}{nearest or '; walt train --help lists all'}")
    try:
        return kind(**{key: _typed(key, value, hints[key]) for key, value in values.items()})
    except (ValueError, TypeError) as error:
        raise WaltError(f"{origin}{name}.{error}") from error


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A YAML value as the field's type; the section then checks its range.

    YAML reads 1e-4 as text and 1 as an int: a float field takes both, and fractions such as 30000/1001. ValueError
    where there is no number.
    """
    if kind is float:
        try:
            return as_float(value if not isinstance(value, bool) else "")
        except (TypeError, ValueError):
            raise ValueError(f"{name}: got {value!r}; expected a number") from None
    if kind is int:
        expect(is_int(value), name, value, "a whole number")
    if get_origin(kind) is tuple and isinstance(value, list):
        return [_typed(name, item, get_args(kind)[0]) for item in value]
    return value
