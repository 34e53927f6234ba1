"""Tensors to addresses: calls native kernels, on the CPU here and on a GPU in cuda.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._native import NAMES, C, view
from .layout import unit

ROWS = {"gate", "shift", "scale", "grad_gate", "grad_shift", "grad_scale"}  # [B, F, D], for F = 1 also [B, D]


def _rows(tensor: Tensor | None) -> Any:
    """The view of modulation rows as [B, F, D]."""
    if tensor is None or tensor.dim() == 3:
        return view(tensor)
    batch, width = tensor.shape
    shape, stride = (batch, 1, width), (tensor.stride(0), 0, tensor.stride(1))
    return C.TensorView(tensor.data_ptr(), NAMES[tensor.dtype], shape, stride)


class Kernels:
    """Forward and backward of the ops, through ``call(name, device, **arguments)`` that takes tensors as ``_C`` does.

    The names of kernels and of their arguments are those of csrc/adaln_lora/arguments.h.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call
        self.modulation = self._forward, self._backward
        self.lora = self._lora_forward, self._lora_backward

    def _run(self, name: str, tensors: Mapping[str, Tensor | None], **options: float) -> None:
        views = {key: (_rows if key in ROWS else view)(tensor) for key, tensor in tensors.items()}
        device = next(tensor.device for tensor in tensors.values() if tensor is not None)
        self._call(name, device, **views, **options)

    def _forward(self, eps: float = 0.0, **tensors: Tensor | None) -> None:
        self._run("adaln_forward", {name: unit(tensor) for name, tensor in tensors.items()}, eps=eps)

    def _backward(self, shift: Tensor | None = None, **tensors: Tensor | None) -> None:
        self._run("adaln_backward", {name: unit(tensor) for name, tensor in tensors.items()})

    def _lora_forward(self, **tensors: Tensor) -> None:
        self._run("adaln_lora_forward", {name: tensor.contiguous() for name, tensor in tensors.items()})

    def _lora_backward(self, grad_out: Tensor, **tensors: Tensor) -> None:
        tensors["grad"] = grad_out
        self._run("adaln_lora_backward", {name: tensor.contiguous() for name, tensor in tensors.items()})


def _call(name: str, device: torch.device, **arguments: Any) -> None:
    getattr(C, name)(**arguments, threads=torch.get_num_threads())


KERNELS = Kernels(_call)
