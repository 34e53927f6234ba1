"""What window_attention runs on by default on a GPU, and the rows that say so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._defaults import Defaults, Fastest

SMALLEST = 64  # tokens of a window: one tile


def classify(
    q: Tensor,
    window: Sequence[int],
    bias_table: Tensor | None,
    image: Tensor | None,
    q_norm: Tensor | None,
    context_k: Tensor | None,
    **inputs: Any,
) -> str | None:
    """What decides which backend is the fastest."""
    if (q.dtype is not torch.bfloat16 and q.dtype is not torch.float16) or math.prod(window) < SMALLEST:
        return None
    if image is not None:
        return "with images"
    return "plain" if bias_table is None and q_norm is None and context_k is None else "with bias, norm or context"


SM_90 = {
    "with bias, norm or context": Fastest(
        "triton", "L spatiotemporal 5x8x8: 0.99 ms against 3.5 of PyTorch, on an H200"
    ),
    "with images": Fastest("triton", "L 5x8x8, half the batch images: 0.84 ms against 2.6 of SDPA, on an H200"),
    "plain": Fastest("triton", "L 5x8x8, no table, no norm: 0.62 ms against 1.2 of SDPA, on an H200"),
}
DEFAULTS = Defaults(classify, {"sm_90": SM_90})
