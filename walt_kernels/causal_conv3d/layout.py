"""Shapes and memory formats of what causal_conv3d returns, the same for real and fake tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._layout import like_video, memory_format


def output_shape(
    x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    """[B, C_out, ceil(T / st), H', W']"""
    (B, _, T, H, W), (C_out, _, _, kh, kw) = x.shape, weight.shape
    top, bottom, left, right = padding
    height = (H + top + bottom - (kh - 1) * dilation[1] - 1) // stride[1] + 1
    width = (W + left + right - (kw - 1) * dilation[2] - 1) // stride[2] + 1
    return B, C_out, (T - 1) // stride[0] + 1, height, width


def output_like(
    x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], padding: Sequence[int]
) -> Tensor:
    shape = output_shape(x, weight, stride, dilation, padding)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def gradients_like(
    x: Tensor, weight: Tensor, history: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Memory for those of the gradients of x, weight, bias and history that are wanted."""
    of_x, of_weight, of_bias, of_history = wanted
    return (
        like_video(x) if of_x else None,
        like_video(weight) if of_weight else None,
        torch.empty(weight.shape[:1], dtype=weight.dtype, device=weight.device) if of_bias else None,
        like_video(history) if of_history and history is not None else None,
    )
