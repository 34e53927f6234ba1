"""What window_attention runs on by default on a GPU, and the times that say so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._defaults import Defaults, Measured


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
    if q.dtype not in (torch.bfloat16, torch.float16) or math.prod(window) < 64:
        return None
    if image is not None:
        return None if context_k is not None else "images"
    if context_k is not None:
        return None
    return "neither bias nor norm" if bias_table is None and q_norm is None else "bias or norm"


# H200.
SM_90 = {
    "bias or norm": Measured(
        "gpu-h200.json: L spatiotemporal 5x8x8",
        {"triton": 0.326, "reference": 3.492},
        {"backward": {"triton": 1.685, "reference": 4.321}},
    ),
    "neither bias nor norm": Measured(
        "gpu-h200.json: L 5x8x8, no table, no norm",
        {"triton": 0.111, "reference": 1.857},
        {"backward": {"triton": 0.551, "reference": 2.762}},
    ),
}
READ = ("q", "k", "v", "bias_table", "q_norm", "k_norm", "context_k", "context_v")
DEFAULTS = Defaults(classify, {"backward": READ}, {"sm_90": SM_90})
