"""Memory for what video_norm returns, the same for real and fake tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._layout import accumulate_dtype, like, like_video


def statistics_shape(x: Tensor, over: str, groups: int) -> tuple[int, ...]:
    """[B, T, groups] over a frame, [B, groups] over a clip, [B, T, H * W] over a pixel."""
    B, _, T, H, W = x.shape
    if over == "frame":
        return B, T, groups
    return (B, groups) if over == "clip" else (B, T, H * W)


def outputs_like(x: Tensor, over: str, groups: int, center: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean (nothing where the norm does not centre) and rstd."""
    rstd = torch.empty(statistics_shape(x, over, groups), dtype=accumulate_dtype(x.dtype), device=x.device)
    return like_video(x), torch.empty_like(rstd) if center else rstd.new_empty(0), rstd


def gradients_like(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Memory for those of the gradients that are wanted."""
    given = (x, weight, bias, scale, shift)
    makers = (like_video, like, like, like, like)
    return [
        make(tensor) if want and tensor is not None else None
        for make, tensor, want in zip(makers, given, wanted, strict=True)
    ]
