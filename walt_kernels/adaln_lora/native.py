"""Tensors to addresses: calls native kernels, on the CPU here and on a GPU in cuda.py, and allocates what they write.

The ``*like`` functions and their neighbours allocate; the fakes of op.py use the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._native import C, view


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels compute in, and keep statistics in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean and rstd, one of each per token."""
    dtype = accumulate_dtype(x.dtype)
    mean = torch.empty(x.shape[:2], dtype=dtype, device=x.device)
    return mean, torch.empty(x.shape[:2], dtype=dtype, device=x.device)


def rows_like(scale: Tensor, frames: int) -> Tensor:
    """A gradient of modulation rows: [B, frames, D], or [B, D] for frames = 0, in scale's dtype."""
    shape = (scale.shape[0], frames, scale.shape[-1]) if frames else (scale.shape[0], scale.shape[-1])
    return torch.empty(shape, dtype=scale.dtype, device=scale.device)


def hidden_like(cond: Tensor, down: Tensor) -> Tensor:
    layers, rank, _ = down.shape
    return torch.empty((layers, cond.shape[0], rank), dtype=accumulate_dtype(cond.dtype), device=cond.device)


def unit(tensor: Tensor | None) -> Tensor | None:
    """The kernels walk rows of unit stride; only a tensor whose last dimension is scattered in memory is copied."""
    if tensor is None or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # to contiguous() an empty tensor is so as it is


def _rows(tensor: Tensor | None) -> Any:
    """The view of modulation rows as [B, F, D]."""
    if tensor is None or tensor.dim() == 3:
        return view(tensor)
    batch, width = tensor.shape
    shape, stride = (batch, 1, width), (tensor.stride(0), 0, tensor.stride(1))
    return C.TensorView(tensor.data_ptr(), str(tensor.dtype)[len("torch.") :], shape, stride)


def lora_output(base: Tensor, down: Tensor) -> Tensor:
    return torch.empty((down.shape[0], *base.shape), dtype=base.dtype, device=base.device)


def lora_gradients(grad: Tensor, cond: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    grad_base = torch.empty(grad.shape[1:], dtype=grad.dtype, device=grad.device)
    return like(cond), grad_base, like(down), like(up)


class Kernels:
    """Forward and backward of every op on top of one set of native functions.

    ``call(name, device, *views, **options)`` runs the function of csrc/adaln_lora/params.h on the views, which stand in
    the order of the fields of its parameters. A subclass that launches kernels of its own replaces ``_forward`` and
    ``_backward``.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def adaln_modulate(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
        h, (mean, rstd) = like(x), statistics(x)
        self._forward(x, None, None, shift, scale, None, h, mean, rstd, eps)
        return h, mean, rstd

    def adaln_residual(self, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        x_new = like(x)
        self._forward(x, branch, gate, None, None, x_new, None, None, None, 0.0)
        return x_new

    def adaln_residual_modulate(
        self, x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        x_new, h, (mean, rstd) = like(x), like(x), statistics(x)
        self._forward(x, branch, gate, shift, scale, x_new, h, mean, rstd, eps)
        return x_new, h, mean, rstd

    def _forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
        x_new: Tensor | None,
        h: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor | None,
        eps: float,
    ) -> None:
        tokens = unit(x), unit(branch)  # held until the kernel returns, copies too
        rows = unit(gate), unit(shift), unit(scale)
        outputs = view(x_new), view(h), view(mean), view(rstd)
        self._call("adaln_forward", x.device, *map(view, tokens), *map(_rows, rows), *outputs, eps=eps)

    def adaln_modulate_backward(
        self, grad_h: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, shift_frames: int
    ) -> tuple[Tensor, ...]:
        grad_x, grad_shift, grad_scale = like(x), rows_like(scale, shift_frames), like(scale)
        self._backward(None, grad_h, x, None, None, scale, mean, rstd, grad_x, None, None, grad_shift, grad_scale)
        return grad_x, grad_shift, grad_scale

    def adaln_residual_backward(self, grad: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        grad_branch, grad_gate = like(branch), like(gate)
        self._backward(grad, None, None, branch, gate, None, None, None, None, grad_branch, grad_gate, None, None)
        return grad_branch, grad_gate

    def adaln_residual_modulate_backward(
        self,
        grad_x_new: Tensor | None,
        grad_h: Tensor,
        x: Tensor,
        branch: Tensor,
        gate: Tensor,
        scale: Tensor,
        mean: Tensor,
        rstd: Tensor,
        shift_frames: int,
    ) -> tuple[Tensor, ...]:
        grads = like(x), like(branch), like(gate), rows_like(scale, shift_frames), like(scale)
        self._backward(grad_x_new, grad_h, x, branch, gate, scale, mean, rstd, *grads)
        return grads

    def _backward(
        self,
        grad_x_new: Tensor | None,
        grad_h: Tensor | None,
        x: Tensor | None,
        branch: Tensor | None,
        gate: Tensor | None,
        scale: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor | None,
        grad_x: Tensor | None,
        grad_branch: Tensor | None,
        grad_gate: Tensor | None,
        grad_shift: Tensor | None,
        grad_scale: Tensor | None,
    ) -> None:
        tokens = unit(grad_x_new), unit(grad_h), unit(x), unit(branch)
        rows = unit(gate), unit(scale)
        device = next(tensor.device for tensor in tokens if tensor is not None)
        self._call(
            *("adaln_backward", device, *map(view, tokens), *map(_rows, rows), view(mean), view(rstd)),
            *(view(grad_x), view(grad_branch), _rows(grad_gate), _rows(grad_shift), _rows(grad_scale)),
        )

    def adaln_lora(self, cond: Tensor, base: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        hidden, out = hidden_like(cond, down), lora_output(base, down)
        tensors = cond.contiguous(), base.contiguous(), down.contiguous(), up.contiguous()
        self._call("adaln_lora_forward", cond.device, *map(view, tensors), view(hidden), view(out))
        return out, hidden

    def adaln_lora_backward(
        self, grad: Tensor, hidden: Tensor, cond: Tensor, down: Tensor, up: Tensor
    ) -> tuple[Tensor, ...]:
        grads = lora_gradients(grad, cond, down, up)
        tensors = grad.contiguous(), hidden, cond.contiguous(), down.contiguous(), up.contiguous()
        self._call("adaln_lora_backward", grad.device, *map(view, tensors), *map(view, grads))
        return grads


def _call(name: str, device: torch.device, *views: Any, **options: Any) -> None:
    getattr(C, name)(*views, **options, threads=torch.get_num_threads())


KERNELS = Kernels(_call)
