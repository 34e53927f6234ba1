"""Tensors to addresses: calls native kernels, on the CPU here and on a GPU in cuda.py, and allocates what they write.

The ``*like`` functions and their neighbours allocate; the fakes of op.py use the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._native import NAMES, C, view

ROWS = {"gate", "shift", "scale", "grad_gate", "grad_shift", "grad_scale"}  # [B, F, D], for F = 1 also [B, D]


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
    if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] <= 1:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # to contiguous() an empty tensor is so as it is


def _rows(tensor: Tensor | None) -> Any:
    """The view of modulation rows as [B, F, D]."""
    if tensor is None or tensor.dim() == 3:
        return view(tensor)
    batch, width = tensor.shape
    shape, stride = (batch, 1, width), (tensor.stride(0), 0, tensor.stride(1))
    return C.TensorView(tensor.data_ptr(), NAMES[tensor.dtype], shape, stride)


def _unit(**tensors: Tensor | None) -> dict[str, Tensor | None]:
    return {name: unit(tensor) for name, tensor in tensors.items()}


def _contiguous(**tensors: Tensor) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def lora_output(base: Tensor, down: Tensor) -> Tensor:
    return torch.empty((down.shape[0], *base.shape), dtype=base.dtype, device=base.device)


def lora_gradients(grad: Tensor, cond: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    grad_base = torch.empty(grad.shape[1:], dtype=grad.dtype, device=grad.device)
    return like(cond), grad_base, like(down), like(up)


class Kernels:
    """Forward and backward of every op, given what runs a kernel on tensors: ``run(name, inputs, outputs, **options)``.

    The names of kernels and of their arguments are those of csrc/adaln_lora/params.h.
    """

    def __init__(self, run: Callable[..., None]) -> None:
        self._run = run

    def adaln_modulate(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, ...]:
        h, (mean, rstd) = like(x), statistics(x)
        outputs = {"h": h, "mean": mean, "rstd": rstd}
        self._run("adaln_forward", _unit(x=x, shift=shift, scale=scale), outputs, eps=eps)
        return h, mean, rstd

    def adaln_residual(self, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        x_new = like(x)
        self._run("adaln_forward", _unit(x=x, branch=branch, gate=gate), {"x_new": x_new}, eps=0.0)
        return x_new

    def adaln_residual_modulate(
        self, x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, ...]:
        x_new, h, (mean, rstd) = like(x), like(x), statistics(x)
        inputs = _unit(x=x, branch=branch, gate=gate, shift=shift, scale=scale)
        self._run("adaln_forward", inputs, {"x_new": x_new, "h": h, "mean": mean, "rstd": rstd}, eps=eps)
        return x_new, h, mean, rstd

    def adaln_modulate_backward(
        self, grad_h: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, shift_frames: int
    ) -> tuple[Tensor, ...]:
        inputs = _unit(grad_h=grad_h, x=x, scale=scale, mean=mean, rstd=rstd)
        grads = {"grad_x": like(x), "grad_shift": rows_like(scale, shift_frames), "grad_scale": like(scale)}
        self._run("adaln_backward", inputs, grads)
        return tuple(grads.values())

    def adaln_residual_backward(self, grad: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
        grads = {"grad_branch": like(branch), "grad_gate": like(gate)}
        self._run("adaln_backward", _unit(grad_x_new=grad, branch=branch, gate=gate), grads)
        return tuple(grads.values())

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
        inputs = _unit(grad_x_new=grad_x_new, grad_h=grad_h, x=x, branch=branch, gate=gate, scale=scale)
        grads = {"grad_x": like(x), "grad_branch": like(branch), "grad_gate": like(gate)}
        grads |= {"grad_shift": rows_like(scale, shift_frames), "grad_scale": like(scale)}
        self._run("adaln_backward", inputs | {"mean": mean, "rstd": rstd}, grads)
        return tuple(grads.values())

    def adaln_lora(self, cond: Tensor, base: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        hidden, out = hidden_like(cond, down), lora_output(base, down)
        inputs = _contiguous(cond=cond, base=base, down=down, up=up)
        self._run("adaln_lora_forward", inputs, {"hidden": hidden, "out": out})
        return out, hidden

    def adaln_lora_backward(
        self, grad: Tensor, hidden: Tensor, cond: Tensor, down: Tensor, up: Tensor
    ) -> tuple[Tensor, ...]:
        grads = lora_gradients(grad, cond, down, up)
        inputs = _contiguous(grad=grad, hidden=hidden, cond=cond, down=down, up=up)
        names = "grad_cond", "grad_base", "grad_down", "grad_up"
        self._run("adaln_lora_backward", inputs, dict(zip(names, grads, strict=True)))
        return grads


def with_views(call: Callable[..., None]) -> Kernels:
    """The kernels of a backend whose ``call(name, device, **arguments)`` takes the tensors as ``_C`` sees them."""

    def run(name: str, inputs: dict[str, Tensor | None], outputs: dict[str, Tensor], **options: float) -> None:
        views = {key: (_rows if key in ROWS else view)(tensor) for key, tensor in (inputs | outputs).items()}
        call(name, next(iter(outputs.values())).device, **views, **options)

    return Kernels(run)


def _call(name: str, device: torch.device, **arguments: Any) -> None:
    getattr(C, name)(**arguments, threads=torch.get_num_threads())


KERNELS = with_views(_call)
