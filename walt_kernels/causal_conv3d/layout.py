"""Shapes and memory formats of what causal_conv3d returns, the same for real and fake tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last_3d for x and slices of such tensors."""
    if x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous():
        return torch.channels_last_3d
    return torch.contiguous_format


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

    def like(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format(tensor))

    of_x, of_weight, of_bias, of_history = wanted
    return (
        like(x) if of_x else None,
        like(weight) if of_weight else None,
        torch.empty(weight.shape[:1], dtype=weight.dtype, device=weight.device) if of_bias else None,
        like(history) if of_history and history is not None else None,
    )
