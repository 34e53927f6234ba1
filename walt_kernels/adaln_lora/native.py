"""Tensors to addresses: calls native kernels, on the CPU here and on a GPU in cuda.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._native import NAMES, C
from .layout import unit

ROWS = {"gate", "shift", "scale", "grad_gate", "grad_shift", "grad_scale"}  # [B, F, D], for F = 1 also [B, D]


def _views(tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    """The tensors as ``_C`` takes them, with rows of unit stride; copies join ``tensors``, which keeps them alive."""
    views = {}
    for name, given in tensors.items():
        if given is not None:
            tensor = given if given.stride(-1) == 1 else unit(given)
            tensors[name] = tensor
            shape: tuple[int, ...] = tensor.shape
            stride = tensor.stride()
            if name in ROWS and len(shape) == 2:
                shape, stride = (shape[0], 1, shape[1]), (stride[0], 0, stride[1])
            views[name] = C.TensorView(tensor.data_ptr(), NAMES[tensor.dtype], shape, stride)
    return views


class Kernels:
    """Forward and backward of the ops, through ``call(name, device, arguments)``, which runs a kernel.

    The names of kernels and of their arguments are those of csrc/adaln_lora/arguments.h.
    """

    def __init__(self, call: Callable[[str, torch.device, dict[str, Any]], None]) -> None:
        self._call = call

    def forward(self, eps: float = 0.0, **tensors: Tensor | None) -> None:
        self._run("adaln_forward", tensors, eps=eps)

    def backward(self, shift: Tensor | None = None, **tensors: Tensor | None) -> None:
        self._run("adaln_backward", tensors)

    def lora_forward(self, **tensors: Tensor) -> None:
        self._run("adaln_lora_forward", {name: tensor.contiguous() for name, tensor in tensors.items()})

    def lora_backward(self, grad_out: Tensor, **tensors: Tensor) -> None:
        tensors["grad"] = grad_out
        self._run("adaln_lora_backward", {name: tensor.contiguous() for name, tensor in tensors.items()})

    def _run(self, name: str, tensors: dict[str, Tensor | None], **options: float) -> None:
        views = _views(tensors)
        some = tensors[next(iter(views))]
        assert some is not None
        self._call(name, some.device, views | options)


def _call(name: str, device: torch.device, arguments: dict[str, Any]) -> None:
    getattr(C, name)(**arguments, threads=torch.get_num_threads())


KERNELS: Kernels = Kernels(_call)
