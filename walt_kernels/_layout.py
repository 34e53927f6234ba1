"""Memory of what the ops return, the same for real and fake tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last_3d for x and slices of such tensors."""
    if x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous():
        return torch.channels_last_3d
    return torch.contiguous_format


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels compute in, and keep statistics in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def like(tensor: Tensor) -> Tensor:
    """Contiguous, whatever the tensor is. ``empty_like``, here and below, takes less than half of ``empty``'s time."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def like_video(x: Tensor) -> Tensor:
    """[B, C, T, H, W] in x's memory format."""
    return torch.empty_like(x, memory_format=memory_format(x))
