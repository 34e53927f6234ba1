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
    frames = (x.shape[2] - 1) // stride[0] + 1
    top, bottom, left, right = padding
    height = (x.shape[3] + top + bottom - (weight.shape[3] - 1) * dilation[1] - 1) // stride[1] + 1
    width = (x.shape[4] + left + right - (weight.shape[4] - 1) * dilation[2] - 1) // stride[2] + 1
    return x.shape[0], weight.shape[0], frames, height, width


def output_like(
    x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], padding: Sequence[int]
) -> Tensor:
    shape = output_shape(x, weight, stride, dilation, padding)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def gradients_like(
    x: Tensor, weight: Tensor, history: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for the gradients of x, weight, bias and history; zero elements for those not wanted."""

    def empty(shape: Sequence[int], like: Tensor, wanted: bool) -> Tensor:
        if not wanted:
            return torch.empty((0,), dtype=like.dtype, device=like.device)
        format = memory_format(like) if len(shape) == 5 else torch.contiguous_format
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=format)

    past = x if history is None else history
    return (
        empty(x.shape, x, wanted[0]),
        empty(weight.shape, weight, wanted[1]),
        empty(weight.shape[:1], weight, wanted[2]),
        empty(past.shape, past, wanted[3]),
    )
