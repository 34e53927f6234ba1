"""What video_norm runs on by default on a GPU, and the rows that say so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._defaults import Defaults, Fastest


def classify(x: Tensor, over: str, **inputs: Any) -> str | None:
    """What decides which backend is the fastest."""
    return over if x.dtype is torch.bfloat16 or x.dtype is torch.float16 else None


SM_90 = {
    "frame": Fastest("triton", "cuda-sm90.json: L C 128, 17x128x128"),
    "clip": Fastest("triton", "HunyuanVideo C 128, 20x256x256: 0.80 ms, on an H200"),
    "pixel": Fastest("triton", "Wan C 96, 4x256x256: 0.11 ms, on an H200"),
}
DEFAULTS = Defaults(classify, {"sm_90": SM_90})
