"""Loads the native module ``_C`` once, and remembers why it could not.

torch is imported first on purpose: its OpenMP runtime then serves ``_C`` too, so both share one thread pool.
"""

from __future__ import annotations

import os
from typing import Any

import torch

C: Any = None
reason: str | None = None

try:
    from . import _C as C  # type: ignore[attr-defined,no-redef]

    if os.environ.get("WALT_KERNELS_ISA"):
        C.set_isa(os.environ["WALT_KERNELS_ISA"])
except ImportError as error:
    reason = f"the native module is not built or does not load ({error})"

# What the CPU kernels compute in: float64 as it is, everything else in float32.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unsupported(*tensors: torch.Tensor | None) -> str | None:
    """Why the native CPU kernels cannot take these tensors, or None."""
    if C is None:
        return reason
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"runs on CPU tensors; this one is on {tensor.device}"
        if tensor.dtype not in DTYPES and tensor.dtype is not torch.bool:
            return f"no native kernel for {tensor.dtype}"
    return None


def view(tensor: torch.Tensor | None) -> Any:
    """The tensor as ``_C`` sees it: address, dtype, sizes, strides. The caller keeps the tensor alive."""
    if tensor is None:
        return None
    return C.TensorView(tensor.data_ptr(), str(tensor.dtype)[len("torch.") :], tensor.shape, tensor.stride())
