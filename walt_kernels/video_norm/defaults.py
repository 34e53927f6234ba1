"""What video_norm runs on by default on a GPU, and the times that say so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._defaults import Defaults, Measured


def classify(x: Tensor, over: str, **inputs: Any) -> str | None:
    """What decides which backend is the fastest."""
    return f"over a {over}" if x.dtype in (torch.bfloat16, torch.float16) else None


SM_90: dict[str, Measured] = {}  # not yet measured
DEFAULTS = Defaults(classify, {"backward": ("x", "weight", "bias", "scale", "shift")}, {"sm_90": SM_90})
