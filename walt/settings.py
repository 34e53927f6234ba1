"""Settings of a training run: a preset, a YAML file over it, dotted overrides over both; saved with the run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from walt.atomic import atomic_write
from walt.errors import WaltError, as_user_error
from walt.model.config import Config, DiffusionConfig, TokenizerConfig, TransformerConfig, expect, expect_positive
from walt.presets import PRESETS
from walt.rates import expect_rate
from walt_kernels.values import is_int

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
    "strategy": ("ddp", "fsdp"),
    "tensorboard": (None, True, False),
}
COUNTS = {"steps": 1, "warmup": 0, "accumulate": 1, "save_every": 1, "log_every": 1, "preview_every": 0, "keep": 1}
COUNTS |= {"seed": 0, "workers": 1, "profile": 0}
# How a run is spread over memory and devices, and what it writes: free to change when it is resumed.
SPREAD = ("accumulate", "compile", "checkpointing", "strategy", "workers")
WRITTEN = ("save_every", "log_every", "preview_every", "keep", "tensorboard", "profile", "peak_tflops")
FREE = frozenset((*SPREAD, *WRITTEN))


@dataclass(frozen=True)
class TokenizerLossConfig(Config):
    """Weights of the first stage's losses. MAGVIT-v2's, but for those marked as ours."""

    reconstruction: float = 5.0
    absolute: float = 0.1  # of the absolute error within the reconstruction loss; ours
    perceptual: float = 0.1
    perceptual_frames: int = 2  # drawn from each video for the perceptual loss, which bounds its cost; ours
    adversarial: float = 0.1
    decorrelation: float = 0.02  # ours
    r1: float = 10.0
    r1_every: int = 16  # discriminator steps for one with the penalty, which then weighs as many times more; ours
    lecam: float = 0.001
    lecam_decay: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("reconstruction", "absolute", "perceptual", "adversarial", "decorrelation", "r1", "lecam"):
            value = getattr(self, name)
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
            expect(good, name, value, "a number of at least 0")
        expect_positive(self, "perceptual_frames", "r1_every")
        good = isinstance(self.lecam_decay, (int, float)) and 0 <= self.lecam_decay < 1
        expect(good, "lecam_decay", self.lecam_decay, "a number from 0, below 1")


@dataclass(frozen=True)
class TrainingConfig(Config):
    """How to train. Rates and weights are per step, whatever the batch.

    lr rises linearly over `warmup` steps; "cosine" then takes it down to 2 % of itself at the last step.
    weight_decay is decoupled, for every parameter. "adafactor" is torch's: its step is min(lr, 1 / sqrt(step)) times
    the root mean square of the parameter (Shazeer and Stern 2018), so lr is relative; it has no betas.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0  # of the gradient of each network; 0: no clipping
    ema_decay: float = 0.99  # of the averaged weights, which are kept in float32; 0: none
    save_every: int = 200
    log_every: int = 10
    seed: int = 0  # of weights and batches
    schedule: str = "cosine"  # or "constant"
    optimizer: str = "adamw"  # or "adafactor"
    accumulate: int = 1  # microbatches into which each process cuts its samples, one after the other
    precision: str = "float32"  # or "bfloat16": autocast; parameters and optimizer stay as they are
    compile: bool = False
    checkpointing: bool = False  # set on every module that has an attribute of this name
    strategy: str = "ddp"  # or "fsdp": parameters, optimizer and averages sharded; for one process both are the same
    preview_every: int = 0  # 0: never
    keep: int = 1  # checkpoints that stay on the disk, the last one included
    tensorboard: bool | None = None  # None: if it is installed
    workers: int = 1  # threads that make batches ready while the device computes
    profile: int = 0  # steps to trace into a file beside the log; 0: none
    peak_tflops: float = 0.0  # TFLOP/s that the device could do, for the log's mfu; 0: stated or measured where known

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in COUNTS.items():
            value = getattr(self, name)
            good = is_int(value) and value >= least
            self._expect(good, name, f"an int >= {least}")
        for name, choices in CHOICES.items():
            self._expect(getattr(self, name) in choices, name, " or ".join(map(str, choices)))
        for name in ("compile", "checkpointing"):
            self._expect(isinstance(getattr(self, name), bool), name, "true or false")
        self._expect(_is_number(self.lr) and self.lr > 0, "lr", "a number > 0")
        for name in ("weight_decay", "clip_norm", "peak_tflops"):
            value = getattr(self, name)
            self._expect(_is_number(value) and value >= 0, name, "a number >= 0")
        self._expect(_is_number(self.ema_decay) and 0 <= self.ema_decay < 1, "ema_decay", "a number in [0, 1)")
        good = isinstance(self.betas, tuple) and len(self.betas) == 2
        good = good and all(_is_number(beta) and 0 <= beta < 1 for beta in self.betas)
        self._expect(good, "betas", "two numbers in [0, 1)")

    def _expect(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise ValueError(f"{name}: got {getattr(self, name)!r}; expected {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class DataConfig(Config):
    """Which clips a stage sees. Sizes are in pixels and frames; `batch` counts samples of a step, over all ranks."""

    frames: int = 17
    height: int = 64
    width: int = 64
    stride: int = 1  # every stride-th frame of a film
    fps: float = 0.0  # films are taken at this rate by their time stamps; 0: every frame
    batch: int = 4
    images: int = 1  # of the batch: stacks of 1+t images; for the tokenizer the share of steps with single images
    flip: bool = False  # mirror half of the clips
    shots: bool = True  # no clip crosses a cut
    text: str = ""  # the text encoder: bytes, minilm or hf:FOLDER; "" for none

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_positive(self, "frames", "height", "width", "stride", "batch")
        object.__setattr__(self, "fps", expect_rate(self.fps))
        good = is_int(self.images) and 0 <= self.images <= self.batch
        expect(good, "images", self.images, f"an int from 0 to batch={self.batch}")
        for name in ("flip", "shots"):
            expect(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        expect(isinstance(self.text, str), "text", self.text, "the name of a text encoder")


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a stage's training does, beside the data and the machine."""

    preset: str
    tokenizer: TokenizerConfig
    transformer: TransformerConfig
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    losses: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(1000))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, section by section."""
        sections = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "preset"}
        return {"preset": self.preset, **{name: section.to_dict() for name, section in sections.items()}}

    def save(self, path: Path) -> None:
        """Write the YAML file that `load_settings` reads back to the same settings."""
        with atomic_write(path) as temporary:
            temporary.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))


def load_settings(
    stage: str, *, preset: str | None = None, file: Path | None = None, overrides: Iterable[str] = ()
) -> Settings:
    """The settings of a stage: defaults of the preset, then the file's sections, then `section.field=value` overrides.

    Values are YAML. Raises WaltError that names the file or override and the field, for unknown and for bad ones.
    """
    given = _read(file) if file is not None else {}
    name = preset or given.get("preset") or ("tiny-sr" if stage.startswith("sr") else "tiny")
    if not isinstance(name, str) or name not in PRESETS:
        raise WaltError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    tokenizer, transformer = PRESETS[name]
    settings = Settings(name, tokenizer, transformer, **_recipe(name, stage))
    settings = _apply(settings, {k: v for k, v in given.items() if k != "preset"}, str(file))
    # Those of a section together: fields that must fit one another can then change in any order.
    sections: dict[str, dict[str, Any]] = {}
    texts: dict[str, list[str]] = {}
    for text in overrides:
        section, field_name, value = _override(text)
        sections.setdefault(section, {})[field_name] = value
        texts.setdefault(section, []).append(text)
    for section, values in sections.items():
        settings = _apply(settings, {section: values}, " ".join(texts[section]))
    _check(settings, stage)
    return settings


def _check(settings: Settings, stage: str) -> None:
    """What no section can check alone: clips that the tokenizer takes, and a model for the stage."""
    data = settings.data
    with as_user_error("data"):
        settings.tokenizer.latent_shape(data.frames, data.height, data.width)
    if stage != "tokenizer" and settings.transformer.low_resolution != stage.startswith("sr"):
        raise WaltError(
            f"transformer.low_resolution is {str(settings.transformer.low_resolution).lower()}, which does not fit the"
            f" stage {stage}; give it another --preset than {settings.preset} (walt info --all)"
        )


def _recipe(preset: str, stage: str) -> dict[str, Any]:
    """What a stage begins with: the paper's settings (table 8; MAGVIT-v2 for the tokenizer) for the full-size presets.

    The small ones get ours, for minutes on a CPU: no adversary, no perceptual loss, and for the tokenizer short clips,
    from which a causal network learns what it would from long ones.
    """
    tokenizer, transformer = PRESETS[preset]
    _, frames, height, width = tokenizer.video_shape(*transformer.latent_size)
    full = transformer.width >= 1024
    text = "bytes" if transformer.text_vocabulary else ""
    if stage == "tokenizer":
        if not full:
            training = TrainingConfig(1000, lr=2e-3, warmup=100)
            losses = TokenizerLossConfig(reconstruction=1.0, adversarial=0.0, perceptual=0.0)
            return {"data": DataConfig(min(frames, 5), height, width), "losses": losses, "training": training}
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


def _override(text: str) -> tuple[str, str, Any]:
    """ "section.field=value" -> section, field, value."""
    path, equals, value = text.partition("=")
    section, dot, name = path.partition(".")
    if not (equals and dot and section and name):
        raise WaltError(f"{text!r} is no override; expected section.field=value, such as training.lr=1e-4")
    try:
        return section, name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise WaltError(f"{text!r}: the value is not YAML") from error


def _apply(settings: Settings, sections: Mapping[str, Any], origin: str) -> Settings:
    known = [f.name for f in dataclasses.fields(settings) if f.name != "preset"]
    changed = {}
    for name, values in sections.items():
        if name not in known:
            raise WaltError(f"{origin}: unknown section {name!r}; there are {', '.join(known)}")
        if not isinstance(values, dict):
            raise WaltError(f"{origin}: section {name} holds {values!r}, expected fields with values")
        section = getattr(settings, name)
        hints = get_type_hints(type(section))
        with as_user_error(origin):
            typed = {key: _typed(f"{name}.{key}", value, hints.get(key)) for key, value in values.items()}
            changed[name] = type(section).from_dict({**section.to_dict(), **typed})
    return dataclasses.replace(settings, **changed)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value as a field of this type has it; the section then checks what it may be.

    YAML reads 1e-4 as text and 1 as an int; a float means numbers by both. ValueError where there is no number.
    """
    if kind is float:
        try:
            return float(value if not isinstance(value, bool) else "")
        except (TypeError, ValueError):
            raise ValueError(f"{name}: got {value!r}; expected a number") from None
    if kind is int:
        expect(is_int(value), name, value, "a whole number")
    if get_origin(kind) is tuple and isinstance(value, list):
        return [_typed(name, item, get_args(kind)[0]) for item in value]
    return value
