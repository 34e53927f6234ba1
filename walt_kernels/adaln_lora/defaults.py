"""What the ops on tokens run on by default on a GPU, and the row that says so. The three are one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._defaults import Defaults, Fastest


def classify(x: Tensor, **inputs: Any) -> str | None:
    """What decides which backend is the fastest."""
    return "16 bits" if x.dtype is torch.bfloat16 or x.dtype is torch.float16 else None


SM_90 = {"16 bits": Fastest("triton", "cuda-sm90.json: L block, 16 x 1280 x 1024")}
DEFAULTS = Defaults(classify, {"sm_90": SM_90})
