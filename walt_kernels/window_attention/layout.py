"""Memory for what window_attention returns, the same for real and fake tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .._layout import like

# Triton's kernels save the log-sum-exp unsummed: the largest score of a row, and the logarithm of the rest.
LSE_PARTS = {"triton": (2,)}


def wide_dtype(q: Tensor) -> torch.dtype:
    """What sums, the table and the norms are held in."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def outputs_like(q: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """out [B, T, H, W, heads, dim] and lse [*parts, B, heads, T, H, W], contiguous."""
    B, T, H, W, heads, _ = q.shape
    parts = LSE_PARTS.get(backend, ())
    return like(q), torch.empty((*parts, B, heads, T, H, W), dtype=wide_dtype(q), device=q.device)
