"""Configurations of the tokenizer, the transformer and the diffusion process, and the named presets.

A configuration is a frozen dataclass, checked when it is made, that turns into plain JSON values and back.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["PRESETS", "DiffusionConfig", "TokenizerConfig", "TokenizerLossConfig", "TransformerConfig"]

Self = TypeVar("Self", bound="Config")

# One entry per transition between tokenizer stages: factors in (time, height, width). Space is halved three times and
# time twice, late (MAGVIT-v2): 8x8 pixels and 4 frames per latent site.
TRANSITIONS: tuple[tuple[int, int, int], ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
TIME_FACTOR = math.prod(factor[0] for factor in TRANSITIONS)
SPACE_FACTOR = math.prod(factor[1] for factor in TRANSITIONS)


def _expect(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}: got {value!r}; expected {expected}")


def _expect_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _expect(isinstance(value, int) and not isinstance(value, bool) and value >= 1, name, value, "an int >= 1")


def _expect_ints(config: object, name: str, length: int) -> None:
    value = getattr(config, name)
    good = isinstance(value, tuple) and len(value) == length and all(isinstance(n, int) and n >= 1 for n in value)
    _expect(good, name, value, f"{length} ints >= 1")


class Config:
    """What the configurations share: `to_dict` and `from_dict`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values (tuples become lists)."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls: type[Self], values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Absent fields take their defaults; unknown ones raise ValueError."""
        _expect(isinstance(values, dict), cls.__name__, values, "a dict of fields")
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        _expect(not unknown, cls.__name__, ", ".join(map(str, unknown)), f"only the fields {', '.join(sorted(known))}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


@dataclass(frozen=True)
class TokenizerConfig(Config):
    """Causal video autoencoder (paper section 3.1, MAGVIT-v2). Stage i is `channels` * `multipliers[i]` wide.

    `kind` "image" codes each frame alone: no kernel reaches over time, and there are as many latent frames as frames.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    blocks: int = 4  # residual blocks of a stage
    middle_blocks: int = 4  # residual blocks at the latent resolution, in each of encoder and decoder
    latent_channels: int = 8
    groups: int = 32  # of the per-frame GroupNorm
    time_padding: str = "first_frame"  # the papers leave both padding modes open
    space_padding: str = "zeros"
    adaptive_norm: bool = True  # decoder norms modulated by the latent; their form is ours
    kind: str = "video"  # or "image", which `inflate` can turn into a "video" one

    def __post_init__(self) -> None:
        _expect(self.kind in ("video", "image"), "kind", self.kind, "video or image")
        _expect(isinstance(self.adaptive_norm, bool), "adaptive_norm", self.adaptive_norm, "True or False")
        _expect_positive(self, "channels", "blocks", "latent_channels", "groups")
        _expect_ints(self, "multipliers", len(TRANSITIONS) + 1)
        good = isinstance(self.middle_blocks, int) and self.middle_blocks >= 0
        _expect(good, "middle_blocks", self.middle_blocks, "an int >= 0")
        widths = [self.channels * multiplier for multiplier in self.multipliers]
        good = all(width % self.groups == 0 for width in widths)
        _expect(good, "groups", self.groups, f"a divisor of the stage widths {widths}")
        time_modes, space_modes = ("zeros", "first_frame"), ("zeros", "replicate", "reflect")
        _expect(self.time_padding in time_modes, "time_padding", self.time_padding, " or ".join(time_modes))
        _expect(self.space_padding in space_modes, "space_padding", self.space_padding, " or ".join(space_modes))

    @property
    def transitions(self) -> tuple[tuple[int, int, int], ...]:
        """Factors in (time, height, width) between the stages; those in time are 1 for images."""
        return TRANSITIONS if self.kind == "video" else tuple((1, *factor[1:]) for factor in TRANSITIONS)

    @property
    def time_factor(self) -> int:
        """Frames per latent frame after the first: 4, for images 1."""
        return TIME_FACTOR if self.kind == "video" else 1

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Pixels (1 + 4k, H, W) -> latent (channels, 1 + k, H / 8, W / 8); other sizes raise ValueError.

        For images, any number of frames T -> as many latent frames.
        """
        check_frames(frames, time_factor=self.time_factor)
        for name, size in (("height", height), ("width", width)):
            if size < SPACE_FACTOR or size % SPACE_FACTOR:
                below = size // SPACE_FACTOR * SPACE_FACTOR
                nearest = f"{below} or {below + SPACE_FACTOR}" if below else f"{SPACE_FACTOR}"
                raise ValueError(f"{name}: got {size} pixels; expected a multiple of {SPACE_FACTOR}, such as {nearest}")
        return self.latent_channels, 1 + (frames - 1) // self.time_factor, height // SPACE_FACTOR, width // SPACE_FACTOR

    def video_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latent (1 + k, h, w) -> pixels (3, 1 + 4k, 8 h, 8 w); images keep their number."""
        return 3, 1 + (frames - 1) * self.time_factor, height * SPACE_FACTOR, width * SPACE_FACTOR


def check_frames(frames: int, name: str = "video", *, time_factor: int = TIME_FACTOR) -> None:
    """Raise ValueError unless `frames` is 1 + time_factor * k."""
    if frames < 1 or (frames - 1) % time_factor:
        below = 1 + (frames - 1) // time_factor * time_factor
        nearest = f"{below} or {below + time_factor}" if below >= 1 else "1"
        raise ValueError(f"{name}: got {frames} frames; expected 1 + {time_factor}k, the nearest being {nearest}")


@dataclass(frozen=True)
class TokenizerLossConfig(Config):
    """Weights of the first stage's losses. MAGVIT-v2's, but for those marked as ours."""

    reconstruction: float = 5.0
    absolute: float = 0.1  # of the absolute error within the reconstruction loss; ours
    perceptual: float = 0.1
    perceptual_frames: int = 8  # drawn from a batch for the perceptual loss, which bounds its cost; ours
    adversarial: float = 0.1
    decorrelation: float = 0.02  # ours
    r1: float = 10.0
    r1_every: int = 16  # discriminator steps for one with the penalty, which then weighs as many times more; ours
    lecam: float = 0.001
    lecam_decay: float = 0.999

    def __post_init__(self) -> None:
        for name in ("reconstruction", "absolute", "perceptual", "adversarial", "decorrelation", "r1", "lecam"):
            value = getattr(self, name)
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
            _expect(good, name, value, "a number of at least 0")
        _expect_positive(self, "perceptual_frames", "r1_every")
        good = isinstance(self.lecam_decay, (int, float)) and 0 <= self.lecam_decay < 1
        _expect(good, "lecam_decay", self.lecam_decay, "a number from 0, below 1")


@dataclass(frozen=True)
class TransformerConfig(Config):
    """Denoiser (paper sections 3.2 to 3.4). Windows count tokens: patches of latent frames."""

    layers: int = 24
    width: int = 1024
    heads: int = 16
    mlp_ratio: int = 4
    latent_channels: int = 8
    latent_size: tuple[int, int, int] = (5, 16, 16)  # frames, height, width
    patch: int = 1
    spatial_window: tuple[int, int, int] = (1, 16, 16)  # layers 0, 2, ...
    spacetime_window: tuple[int, int, int] = (5, 8, 8)  # layers 1, 3, ...
    qk_norm: bool = True
    bias_tables: bool = True
    adaln: str = "lora"  # or "separate": each layer has its own modulation
    adaln_rank: int = 2
    classes: int = 0  # 0: no labels
    self_condition: bool = True
    time_features: int = 256

    def __post_init__(self) -> None:
        _expect_positive(self, "layers", "width", "heads", "mlp_ratio", "latent_channels", "patch", "adaln_rank")
        _expect_positive(self, "time_features")
        for name in ("latent_size", "spatial_window", "spacetime_window"):
            _expect_ints(self, name, 3)
        _expect(self.width % self.heads == 0, "heads", self.heads, f"a divisor of width={self.width}")
        height, width = self.latent_size[1:]
        good = height % self.patch == 0 and width % self.patch == 0
        _expect(good, "patch", self.patch, f"a divisor of the latent's {height} rows and {width} columns")
        _expect(self.spatial_window[0] == 1, "spatial_window", self.spatial_window, "one frame: (1, height, width)")
        _expect(self.adaln in ("lora", "separate"), "adaln", self.adaln, "lora or separate")
        _expect(isinstance(self.classes, int) and self.classes >= 0, "classes", self.classes, "an int >= 0")
        _expect(self.time_features % 2 == 0, "time_features", self.time_features, "an even int")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along (time, height, width)."""
        frames, height, width = self.latent_size
        return frames, height // self.patch, width // self.patch

    @property
    def tokens(self) -> int:
        """Tokens of a sample."""
        return math.prod(self.grid)

    @property
    def input_channels(self) -> int:
        """Channels that the first projection sees: the noisy latent and, beside it, the self-conditioning estimate."""
        return self.latent_channels * (2 if self.self_condition else 1)

    def windows(self) -> list[tuple[int, int, int]]:
        """The window of each layer: spatial and spacetime in turn."""
        return [self.spacetime_window if i % 2 else self.spatial_window for i in range(self.layers)]

    def flops(self) -> dict[str, int]:
        """Floating-point operations of one forward pass over one video sample, by part.

        Matrix products only, one multiply-add being 2 operations; norms, activations, softmax, biases and residuals
        are not counted. A training step costs three times as much (forward, and two products backward for each), plus
        one forward pass for each sample that is self-conditioned.
        """
        d, n = self.width, self.tokens
        pixels = self.patch**2
        # A window of a x b x c tokens has (a b c)^2 scores; windows cut by the edge are smaller. The sum over all
        # windows of the product is the product over the axes of the sums.
        scores = sum(math.prod(map(_sum_of_squares, self.grid, window)) for window in self.windows())
        modulations = 1 if self.adaln == "lora" else self.layers
        lora = 14 * self.adaln_rank * d * self.layers if self.adaln == "lora" else 0
        return {
            "attention projections": self.layers * n * 8 * d * d,
            "attention windows": 4 * scores * d,
            "mlp": self.layers * n * 4 * self.mlp_ratio * d * d,
            "adaln": modulations * 12 * d * d + lora + 4 * d * d,
            "time embedding": 2 * (self.time_features * d + d * d),
            "input and output": n * 2 * pixels * (self.input_channels + self.latent_channels) * d,
        }


def _sum_of_squares(size: int, side: int) -> int:
    """Sum of squared lengths of the pieces when `size` is cut into pieces of `side`, the last one smaller."""
    return size // side * side**2 + (size % side) ** 2


@dataclass(frozen=True)
class DiffusionConfig(Config):
    """Noise schedule and training of the denoiser (paper sections 3.3 and 4)."""

    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    zero_terminal_snr: bool = True
    self_condition_probability: float = 0.9

    def __post_init__(self) -> None:
        _expect(isinstance(self.steps, int) and self.steps >= 2, "steps", self.steps, "an int >= 2")
        for name in ("beta_start", "beta_end"):
            _expect(0 < getattr(self, name) < 1, name, getattr(self, name), "a number between 0 and 1")
        good = 0 <= self.self_condition_probability <= 1
        _expect(good, "self_condition_probability", self.self_condition_probability, "a number from 0 to 1")


# "L" and "XL" are the class-conditional UCF-101 models, 17x128x128 pixels; "tiny" learns 17x64x64 clips on two cores;
# "minimal" learns nothing worth seeing and runs wherever an interpreter does.
PRESETS: dict[str, tuple[TokenizerConfig, TransformerConfig]] = {
    "tiny": (
        TokenizerConfig(channels=8, multipliers=(1, 2, 4, 8), blocks=1, middle_blocks=1, groups=2, adaptive_norm=False),
        TransformerConfig(
            layers=6,
            width=192,
            heads=3,
            latent_size=(5, 8, 8),
            patch=2,
            spatial_window=(1, 4, 4),
            spacetime_window=(5, 4, 4),
            adaln_rank=8,
            classes=8,
        ),
    ),
    "L": (TokenizerConfig(), TransformerConfig(classes=101)),
    "XL": (TokenizerConfig(), TransformerConfig(layers=28, width=1152, classes=101)),
    "minimal": (
        TokenizerConfig(
            channels=4,
            multipliers=(1, 1, 1, 1),
            blocks=1,
            middle_blocks=0,
            latent_channels=4,
            groups=2,
            adaptive_norm=False,
        ),
        TransformerConfig(
            layers=2,
            width=32,
            heads=2,
            latent_size=(2, 2, 2),
            latent_channels=4,
            patch=1,
            spatial_window=(1, 2, 2),
            spacetime_window=(2, 2, 2),
            adaln_rank=2,
            classes=2,
        ),
    ),
}
