"""Configurations of the tokenizer, the transformer and the diffusion process, and the descriptions in checkpoints.

A configuration is a frozen dataclass, checked when made, that turns into plain JSON values and back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from walt_kernels.values import is_int, plain

__all__ = ["ClipShape", "DiffusionConfig", "TokenizerConfig", "TransformerConfig"]

Self = TypeVar("Self", bound="Config")

# One entry per transition between tokenizer stages: factors in (time, height, width). Space is halved three times and
# time twice, late (MAGVIT-v2): 8x8 pixels and 4 frames per latent site.
TRANSITIONS: tuple[tuple[int, int, int], ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
TIME_FACTOR = math.prod(factor[0] for factor in TRANSITIONS)
SPACE_FACTOR = math.prod(factor[1] for factor in TRANSITIONS)


def expect(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}: got {value!r}; expected {expected}")


def as_int(name: str, value: Any) -> int:
    """Python's int of an integer of any kind (NumPy's, a tensor); ValueError for anything else, a bool or float too."""
    number = plain(value)
    expect(is_int(number), name, value, "an int")
    return number


def plain_fields(config: Any) -> None:
    """Turn NumPy's and tensors' numbers in a frozen dataclass into Python's, for JSON, and lists into tuples."""
    for field in dataclasses.fields(config):
        value = plain(getattr(config, field.name))
        object.__setattr__(config, field.name, tuple(value) if isinstance(value, list) else value)


def expect_share(name: str, value: Any) -> float:
    """Python's float; ValueError unless it is from 0, below 1."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1
    expect(good, name, value, "a share from 0, below 1")
    return float(value)


def expect_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        expect(is_int(value) and value >= 1, name, value, "an int >= 1")


def expect_ints(config: object, name: str, length: int) -> None:
    value = getattr(config, name)
    good = isinstance(value, tuple) and len(value) == length and all(is_int(n) and n >= 1 for n in value)
    expect(good, name, value, f"{length} ints >= 1")


class Config:
    """Base of the configurations: `to_dict` and `from_dict`, and integers of any kind as Python's."""

    def __post_init__(self) -> None:
        plain_fields(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values (tuples become lists)."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls: type[Self], values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Absent fields take their defaults; unknown ones raise ValueError."""
        expect(isinstance(values, dict), cls.__name__, values, "a dict of fields")
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        expect(not unknown, cls.__name__, ", ".join(map(str, unknown)), f"only the fields {', '.join(sorted(known))}")
        return cls(**values)


@dataclass(frozen=True)
class TokenizerConfig(Config):
    """Causal video autoencoder (paper section 3.1, MAGVIT-v2). Stage i is `channels` * `multipliers[i]` wide.

    `kind` "image" codes each frame alone: no kernel reaches over time, and there are as many latent frames as frames.
    """

    channels: int = 128  # of the first stage
    multipliers: tuple[int, ...] = (1, 2, 2, 4)  # of the channels, one for each stage
    blocks: int = 4  # residual blocks of a stage
    middle_blocks: int = 4  # residual blocks at the latent resolution, in each of encoder and decoder
    latent_channels: int = 8  # of the latent
    groups: int = 32  # of the per-frame GroupNorm
    time_padding: str = "first_frame"  # or "zeros"; the papers leave both padding modes open
    space_padding: str = "zeros"  # or "replicate" or "reflect"
    adaptive_norm: bool = True  # decoder norms modulated by the latent; their form is ours
    kind: str = "video"  # or "image", which `inflate` can turn into a "video" one

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(self.kind in ("video", "image"), "kind", self.kind, "video or image")
        expect(isinstance(self.adaptive_norm, bool), "adaptive_norm", self.adaptive_norm, "True or False")
        expect_positive(self, "channels", "blocks", "latent_channels", "groups")
        expect_ints(self, "multipliers", len(TRANSITIONS) + 1)
        good = is_int(self.middle_blocks) and self.middle_blocks >= 0
        expect(good, "middle_blocks", self.middle_blocks, "an int >= 0")
        widths = [self.channels * multiplier for multiplier in self.multipliers]
        good = all(width % self.groups == 0 for width in widths)
        expect(good, "groups", self.groups, f"a divisor of the stage widths {widths}")
        time_modes, space_modes = ("zeros", "first_frame"), ("zeros", "replicate", "reflect")
        expect(self.time_padding in time_modes, "time_padding", self.time_padding, " or ".join(time_modes))
        expect(self.space_padding in space_modes, "space_padding", self.space_padding, " or ".join(space_modes))

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
class TransformerConfig(Config):
    """Denoiser (paper sections 3.2 to 3.4). Windows count tokens: patches of latent frames.

    cross_attention: with "spatial", every layer attends to the text inside spatial windows, as joint training on images
    and videos needs; with "all", inside the layer's window, and the model takes videos only.
    """

    layers: int = 24  # of attention and MLP each
    width: int = 1024  # of a token
    heads: int = 16  # of attention; they divide the width
    mlp_ratio: int = 4  # hidden width of the MLPs, in widths
    latent_channels: int = 8  # of the tokenizer
    latent_size: tuple[int, int, int] = (5, 16, 16)  # frames, height, width
    patch: int = 1  # height and width of a token, in latent sites
    spatial_window: tuple[int, int, int] = (1, 16, 16)  # layers 0, 2, ...
    spacetime_window: tuple[int, int, int] = (5, 8, 8)  # layers 1, 3, ...
    qk_norm: bool = True  # queries and keys are normalised
    bias_tables: bool = True  # a learned relative bias in each window
    adaln: str = "lora"  # or "separate": each layer has its own modulation
    adaln_rank: int = 2  # of the low-rank part of each layer's modulation
    classes: int = 0  # 0: no labels
    text_width: int = 0  # of a text token; 0: no text
    text_length: int = 256  # text tokens at most; ours, the paper has no number
    text_vocabulary: int = 0  # 0: text comes as features; else as token ids, which the model embeds
    cross_attention: str = "spatial"  # or "all": in which windows tokens see the text
    self_condition: bool = True  # the last estimate of the clean latent is an input
    frame_condition: bool = False  # known first frames are an input (frame prediction)
    low_resolution: bool = False  # the latent at half the height and width is an input (super-resolution)
    time_features: int = 256  # sines and cosines of the diffusion step

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_positive(self, "layers", "width", "heads", "mlp_ratio", "latent_channels", "patch", "adaln_rank")
        expect_positive(self, "time_features")
        for name in ("latent_size", "spatial_window", "spacetime_window"):
            expect_ints(self, name, 3)
        expect(self.width % self.heads == 0, "heads", self.heads, f"a divisor of width={self.width}")
        height, width = self.latent_size[1:]
        good = height % self.patch == 0 and width % self.patch == 0
        expect(good, "patch", self.patch, f"a divisor of the latent's {height} rows and {width} columns")
        expect(self.spatial_window[0] == 1, "spatial_window", self.spatial_window, "one frame: (1, height, width)")
        expect(self.adaln in ("lora", "separate"), "adaln", self.adaln, "lora or separate")
        for name in ("classes", "text_width", "text_vocabulary"):
            value = getattr(self, name)
            expect(is_int(value) and value >= 0, name, value, "an int >= 0")
        expect_positive(self, "text_length")
        for name in ("qk_norm", "bias_tables", "self_condition", "frame_condition", "low_resolution"):
            expect(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        good = self.text_width > 0 or self.text_vocabulary == 0
        expect(good, "text_width", self.text_width, "an int >= 1 with a text_vocabulary")
        expect(self.cross_attention in ("spatial", "all"), "cross_attention", self.cross_attention, "spatial or all")
        good = not self.low_resolution or (height % 2 == 0 and width % 2 == 0)
        expect(good, "latent_size", self.latent_size, "an even height and width with low_resolution")
        expect(self.time_features % 2 == 0, "time_features", self.time_features, "an even int")

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
        """Channels that the first projection sees: the noisy latent and what is joined to it.

        c for the noisy latent, c for the self-conditioning estimate, c + 1 for the known frames and their mask, c for
        the low-resolution latent.
        """
        latents = 1 + self.self_condition + self.frame_condition + self.low_resolution
        return self.latent_channels * latents + self.frame_condition

    @property
    def sublayers(self) -> int:
        """Residual branches of a layer: attention, cross-attention if there is text, MLP. Each has 3d modulations."""
        return 3 if self.text_width else 2

    def windows(self) -> list[tuple[int, int, int]]:
        """The window of each layer: spatial and spacetime in turn."""
        return [self.spacetime_window if i % 2 else self.spatial_window for i in range(self.layers)]

    def cross_windows(self) -> list[tuple[int, int, int]]:
        """The window of each layer's cross-attention."""
        return self.windows() if self.cross_attention == "all" else [self.spatial_window] * self.layers

    def resized(self, latent: tuple[int, int, int, int], classes: int) -> TransformerConfig:
        """For latents (channels, frames, height, width) and this many classes; larger windows shrink to the latent."""
        channels, *size = latent

        def inside(window: tuple[int, int, int]) -> tuple[int, int, int]:
            return min(window[0], size[0]), min(window[1], size[1]), min(window[2], size[2])

        return dataclasses.replace(
            self,
            latent_channels=channels,
            latent_size=(size[0], size[1], size[2]),
            spatial_window=inside(self.spatial_window),
            spacetime_window=inside(self.spacetime_window),
            classes=classes,
        )

    def flops(self) -> dict[str, int]:
        """Floating-point operations of one forward pass over one video sample (and a text of full length), by kind.

        Matrix products only, one multiply-add being 2 operations; norms, activations, softmax, biases and residuals
        are not counted. A training step costs three times as much (forward, and two products backward for each), with
        self-conditioning four times: one forward pass more.
        """
        d, n = self.width, self.tokens
        pixels = self.patch**2
        modulations = 1 if self.adaln == "lora" else self.layers
        chunks = 3 * self.sublayers
        lora = 2 * (1 + chunks) * self.adaln_rank * d * self.layers if self.adaln == "lora" else 0
        embeddings = 2 if self.low_resolution else 1  # of the diffusion step and of the noise level
        flops = {
            "attention projections": self.layers * n * 8 * d * d,
            "attention windows": 4 * self._scores(self.windows()) * d,
            "mlp": self.layers * n * 4 * self.mlp_ratio * d * d,
            "adaln": modulations * 2 * chunks * d * d + lora + 4 * d * d,
            "time embedding": embeddings * 2 * (self.time_features * d + d * d),
            "input and output": n * 2 * pixels * (self.input_channels + self.latent_channels) * d,
        }
        if self.text_width:
            length = self.text_length
            flops["cross-attention projections"] = self.layers * (8 * n + 4 * length) * d * d
            flops["cross-attention windows"] = 4 * (self._scores(self.cross_windows()) + self.layers * n * length) * d
            flops["text projection"] = 2 * length * self.text_width * d
        if self.low_resolution:
            flops["low resolution"] = 2 * 9 * math.prod(self.latent_size) * self.latent_channels**2
        return flops

    def _scores(self, windows: list[tuple[int, int, int]]) -> int:
        """Pairs of tokens that share a window, over all layers.

        A window of a x b x c tokens has (a b c)^2; windows cut by the edge are smaller. The sum over all windows of the
        product is the product over the axes of the sums.
        """
        return sum(math.prod(map(_sum_of_squares, self.grid, window)) for window in windows)


def _sum_of_squares(size: int, side: int) -> int:
    """Sum of squared lengths of the pieces when `size` is cut into pieces of `side`, the last one smaller."""
    return size // side * side**2 + (size % side) ** 2


@dataclass(frozen=True)
class DiffusionConfig(Config):
    """Noise schedule and training of the denoiser (paper sections 3.3 to 3.6 and 4).

    The last three are our values: the paper leaves them open.
    """

    steps: int = 1000  # of noise
    beta_start: float = 1e-4  # noise of the first step
    beta_end: float = 0.02  # and of the last one, on a line
    zero_terminal_snr: bool = True  # the last step is noise alone
    self_condition_probability: float = 0.9  # of training steps with an estimate as input
    drop_probability: float = 0.1  # of all that guidance drops: label, text and known frames at once
    frame_probability: float = 0.9  # of 1 or 2 known frames, where the model takes them and they are not dropped
    low_resolution_noise: float = 0.3  # noise on a low-resolution latent: up to this fraction of the steps

    def __post_init__(self) -> None:
        super().__post_init__()
        expect(is_int(self.steps) and self.steps >= 2, "steps", self.steps, "an int >= 2")
        for name in ("beta_start", "beta_end"):
            expect(0 < getattr(self, name) < 1, name, getattr(self, name), "a number between 0 and 1")
        for name in ("self_condition_probability", "drop_probability", "frame_probability", "low_resolution_noise"):
            value = getattr(self, name)
            expect(isinstance(value, int | float) and 0 <= value <= 1, name, value, "a number from 0 to 1")


@dataclass(frozen=True)
class ClipShape:
    """What the model was trained on, in pixels and frames a second."""

    frames: int
    height: int
    width: int
    fps: float

    def __post_init__(self) -> None:
        plain_fields(self)


def tokenizer_description(config: TokenizerConfig) -> dict[str, Any]:
    return {"config": config.to_dict()}


def transformer_description(
    config: TransformerConfig, diffusion: DiffusionConfig, clip: ClipShape, classes: Sequence[str], text: str = ""
) -> dict[str, Any]:
    """text: the name of the text encoder."""
    return {
        "config": config.to_dict(),
        "diffusion": diffusion.to_dict(),
        "clip": asdict(clip),
        "classes": list(classes),
        "text": text,
    }
