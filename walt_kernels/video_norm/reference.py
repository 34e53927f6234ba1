"""The definition of video_norm in plain PyTorch: right in float64, differentiable any number of times."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .._layout import accumulate_dtype

DIMS = {"frame": (2, 4, 5), "clip": (2, 3, 4, 5), "pixel": (2,)}  # of x [B, groups, C / groups, T, H, W]


def video_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    over: str = "frame",
    groups: int = 1,
    center: bool = True,
    eps: float = 1e-6,
    activation: str | None = None,
) -> Tensor:
    wide = accumulate_dtype(x.dtype)
    y = x.to(wide).unflatten(1, (groups, x.shape[1] // groups))
    if center:
        y = y - y.mean(DIMS[over], keepdim=True)
    y = (y * torch.rsqrt(y.square().mean(DIMS[over], keepdim=True) + eps)).flatten(1, 2)
    if weight is not None:
        y = y * weight.to(wide)[:, None, None, None]
    if bias is not None:
        y = y + bias.to(wide)[:, None, None, None]
    if scale is not None:
        y = y * (1 + _per_frame(scale.to(wide)))
    if shift is not None:
        y = y + _per_frame(shift.to(wide))
    if activation == "silu":
        y = functional.silu(y)
    return y.to(x.dtype)


def _per_frame(rows: Tensor) -> Tensor:
    """[B, C] or [B, C, T] -> [B, C, 1 or T, 1, 1]"""
    return (rows if rows.dim() == 3 else rows[:, :, None])[..., None, None]
