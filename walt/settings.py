"""Settings of a training run: a preset, a YAML file over it, dotted overrides over both; saved with the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from walt.config import (
    PRESETS,
    Config,
    DiffusionConfig,
    TokenizerConfig,
    TokenizerLossConfig,
    TransformerConfig,
    expect,
    expect_positive,
)
from walt.errors import WaltError, user_values
from walt.files import replacing
from walt.training import TrainingConfig
from walt.video import expect_rate
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
        with replacing(path) as temporary:
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
    with user_values("data"):
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
        with user_values(origin):
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
