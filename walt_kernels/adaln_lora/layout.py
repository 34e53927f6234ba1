"""Memory for what the adaln ops return, the same for real and fake tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .._layout import accumulate_dtype, like


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean and rstd, one of each per token."""
    mean = torch.empty(x.shape[:2], dtype=accumulate_dtype(x.dtype), device=x.device)
    return mean, torch.empty_like(mean)


def hidden_like(cond: Tensor, down: Tensor) -> Tensor:
    layers, rank, _ = down.shape
    return torch.empty((layers, cond.shape[0], rank), dtype=accumulate_dtype(cond.dtype), device=cond.device)


def lora_output(base: Tensor, down: Tensor) -> Tensor:
    return torch.empty((down.shape[0], *base.shape), dtype=base.dtype, device=base.device)


def lora_gradients(grad_out: Tensor, cond: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    grad_base = torch.empty(grad_out.shape[1:], dtype=grad_out.dtype, device=grad_out.device)
    return like(cond), grad_base, like(down), like(up)


def unit(tensor: Tensor) -> Tensor:
    """The kernels walk rows of unit stride; only a tensor whose last dimension is scattered in memory is copied."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # to contiguous() an empty tensor is so as it is
