"""What is measured of an op, and what a GPU kernel is to reach: the files of the ops (window_attention.py) list these.

FLOPs count a multiply-add as two, of the direct algorithm. Bytes are the least a perfect kernel moves: inputs read
once, outputs written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Inputs = dict[str, Any]
MODES = ("forward", "forward+backward")
GPU_MODES = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One shape of one op. ``flops`` and ``elements`` (values moved) are for the forward pass; the factors give
    forward + backward.
    """

    op: str
    name: str
    inputs: Callable[[torch.dtype], Inputs]
    flops: float
    elements: float
    flops_factor: float
    elements_factor: float
    terms: int  # of the longest sum: its rounding in float32 grows with their square root
    small: Callable[[], Case]  # the same kind, cut down: what the preflight calls
    quick: bool = True
    fused: bool = False  # the compiler's fusion is its strongest baseline, so --quick asks for it, too
    modes: tuple[str, ...] = MODES

    def work(self, mode: str, dtype: torch.dtype) -> tuple[float, float]:
        """FLOPs and bytes of one call."""
        times = {"forward": (1.0, 1.0), "backward": (self.flops_factor - 1, self.elements_factor - 1)}
        flops, elements = times.get(mode, (self.flops_factor, self.elements_factor))
        return self.flops * flops, self.elements * elements * dtype.itemsize


@dataclass(frozen=True)
class Target:
    """What all rows of ``op`` in ``mode`` whose case begins with one of ``cases`` are to reach.

    ``share`` is of the measured copy or product, or of the case's floor under both ("copy", "product", "floor").
    ``speedup`` is over the fastest baseline whose name contains ``over``. ``lean``: no memory but inputs and outputs.
    ``half_of``: a batch of which half are images takes half the time of that case and that of a copy of its images.
    """

    op: str
    mode: str
    cases: tuple[str, ...]
    share: float = 0.0
    of: str = "floor"
    speedup: float = 0.0
    over: str = ""
    deterministic: bool = False
    lean: bool = False
    half_of: str = ""
