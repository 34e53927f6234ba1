"""What the ops on tokens run on by default on a GPU, and the times that say so. adaln_lora was not measured on one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._defaults import Defaults, Measured


def classify(x: Tensor, **inputs: Any) -> str | None:
    """The three ops are one kernel."""
    return "16 bits" if x.dtype in (torch.bfloat16, torch.float16) else None


# H200.
SM_90 = {
    "16 bits": Measured(
        "gpu-h200.json: L block, 16 x 1280 x 1024",
        {"triton": 0.048, "cuda": 0.069, "reference": 0.523},
        {"backward": {"triton": 0.123, "cuda": 0.083, "reference": 0.671}},
    ),
}


def defaults(*differentiable: str) -> Defaults:
    """Of an op whose inputs of these names have gradients."""
    return Defaults(classify, {"backward": differentiable}, {"sm_90": SM_90})
