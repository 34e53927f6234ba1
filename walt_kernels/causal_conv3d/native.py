"""Tensors to addresses: calls the C++ kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._native import NAMES, C, view


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, y: Tensor, **options: Any) -> None:
    tensors = {"x": view(x), "weight": view(weight), "bias": view(bias), "history": view(history), "y": view(y)}
    C.causal_conv3d(**tensors, **options, threads=torch.get_num_threads())


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    history: Tensor | None,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_history: Tensor | None,
    **options: Any,
) -> None:
    arguments = {"grad_y": view(grad_y), **options, "threads": torch.get_num_threads()}
    if grad_x is not None or grad_history is not None:
        # Without grad_x, its sizes are read all the same.
        to_x = C.TensorView(0, NAMES[x.dtype], x.shape, x.stride()) if grad_x is None else view(grad_x)
        outputs = {"grad_x": to_x, "grad_history": view(grad_history)}
        C.causal_conv3d_backward_data(weight=view(weight), has_history=history is not None, **outputs, **arguments)
    if grad_weight is not None or grad_bias is not None:
        inputs = {"x": view(x), "history": view(history), "kernel": weight.shape[2:]}
        outputs = {"grad_weight": view(grad_weight), "grad_bias": view(grad_bias)}
        C.causal_conv3d_backward_weight(**inputs, **outputs, **arguments)
