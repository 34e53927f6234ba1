"""One change at a time to a small W.A.L.T, and what the paper measured for the same change (its tables on UCF-101)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from walt.model.config import DiffusionConfig, TransformerConfig

PAPER_TIE = 4.0  # of FVD: the paper's runs "differ by about 2", so it, too, cannot tell such pairs apart
RATE_TIE = 1.05  # steps a second

# The paper's windows on 16x16 latents, halved with the latents: S is a whole frame, ST a quarter of every frame.
BASE = TransformerConfig(
    layers=4,
    width=96,
    heads=3,
    latent_size=(5, 8, 8),
    patch=1,
    spatial_window=(1, 8, 8),
    spacetime_window=(5, 4, 4),
    adaln_rank=2,
)


class FullAttention(TransformerConfig):
    """Every layer attends to the whole sample."""

    def windows(self) -> list[tuple[int, int, int]]:
        return [self.grid] * self.layers


@dataclass(frozen=True)
class Variant:
    """The baseline with one change. `paper` is FVD of the change and of what it was compared with, in the paper."""

    group: str
    name: str
    paper: tuple[float, float] | None = None
    paper_rate: tuple[float, float] | None = None  # steps a second, likewise
    trend: str = ""  # what the paper says where it prints no number
    transformer: Mapping[str, Any] = field(default_factory=dict)
    diffusion: Mapping[str, Any] = field(default_factory=dict)
    full_attention: bool = False
    normalised: bool = True  # latents
    images: bool = False  # a quarter of every batch are stacks of images
    same_loss: bool = True  # whether the held-out loss is of the same quantity as the baseline's

    @property
    def expected(self) -> str:
        """ "better", "worse" or "same": where the paper's FVD went."""
        if self.trend:
            return self.trend
        assert self.paper is not None
        change = self.paper[0] - self.paper[1]
        return "same" if abs(change) <= PAPER_TIE else "worse" if change > 0 else "better"

    @property
    def expected_rate(self) -> str:
        """ "faster", "slower" or "same"; "" where the paper gives no speed."""
        return "" if self.paper_rate is None else rate_change(self.paper_rate[0] / self.paper_rate[1])

    def config(self, base: TransformerConfig) -> TransformerConfig:
        """The changed configuration; windows larger than its grid of tokens are cut down to it."""
        changed = replace(base, **self.transformer)
        grid = changed.grid

        def inside(window: tuple[int, int, int]) -> tuple[int, int, int]:
            return min(window[0], grid[0]), min(window[1], grid[1]), min(window[2], grid[2])

        windows = inside(changed.spatial_window), inside(changed.spacetime_window)
        changed = replace(changed, spatial_window=windows[0], spacetime_window=windows[1])
        if not self.full_attention:
            return changed
        return FullAttention(**{item.name: getattr(changed, item.name) for item in fields(changed)})

    def diffusion_config(self) -> DiffusionConfig:
        return DiffusionConfig(**self.diffusion)


def rate_change(ratio: float) -> str:
    return "faster" if ratio > RATE_TIE else "slower" if ratio < 1 / RATE_TIE else "same"


BASELINE = Variant("baseline", "patch 1, ST window 5x4x4, p_sc 0.9, zero SNR, QK norm, LoRA r = 2, videos only")
VARIANTS = (
    BASELINE,
    Variant("patch size", "2", (134.4, 60.7), transformer={"patch": 2}),
    Variant("patch size", "4", (461.8, 60.7), transformer={"patch": 4}),
    Variant("ST window", "5x2x2", (56.9, 59.6), (2.24, 2.00), transformer={"spacetime_window": (5, 2, 2)}),
    Variant("ST window", "5x8x8", (55.3, 59.6), (1.75, 2.00), transformer={"spacetime_window": (5, 8, 8)}),
    Variant("ST window", "none: full attention in every layer", (59.9, 59.6), (1.20, 2.00), full_attention=True),
    Variant(
        "self-conditioning",
        "p_sc 0",
        (109.9, 61.4),
        transformer={"self_condition": False},
        diffusion={"self_condition_probability": 0.0},
    ),
    Variant("zero terminal SNR", "off", (91.0, 60.7), diffusion={"zero_terminal_snr": False}, same_loss=False),
    Variant("QK norm", "off", (59.0, 60.7), transformer={"qk_norm": False}),
    Variant("latent normalisation", "off", (67.9, 60.7), normalised=False, same_loss=False),
    Variant("AdaLN", "LoRA r = 16", (55.5, 60.7), transformer={"adaln_rank": 16}),
    Variant("AdaLN", "LoRA r = 64", (54.4, 60.7), transformer={"adaln_rank": 64}),
    # No FVD is printed for separate modulations; it falls with the rank, to 52.5 at r = 256.
    Variant("AdaLN", "separate", trend="better", transformer={"adaln": "separate"}),
    # Of a 419M text-to-video model, zero-shot, with images of which there were no videos; here both are the same data.
    Variant("joint training", "a quarter of each batch images", (344.5, 598.8), images=True),
)


def variants_of(groups: Collection[str]) -> tuple[Variant, ...]:
    """The baseline and the variants of these groups; of none, all."""
    return tuple(variant for variant in VARIANTS if variant is BASELINE or not groups or variant.group in groups)
