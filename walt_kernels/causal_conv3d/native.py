"""Tensors to addresses: calls the C++ kernels and allocates what they write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._native import NAMES, C, view
from .layout import gradients_like, output_like

OPTIONS = ("stride", "dilation", "padding", "time_padding", "space_padding", "groups")


def _options(options: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(OPTIONS, options, strict=True), threads=torch.get_num_threads())


def causal_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, *options: Any) -> Tensor:
    y = output_like(x, weight, *options[:3])
    inputs = {"x": view(x), "weight": view(weight), "bias": view(bias), "history": view(history)}
    C.causal_conv3d(**inputs, y=view(y), **_options(options))
    return y


def causal_conv3d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, history: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted, arguments = options[-1], {"grad_y": view(grad), **_options(options[:-1])}
    grads = gradients_like(x, weight, history, wanted)
    grad_x, grad_weight, grad_bias, grad_history = (view(g) if w else None for g, w in zip(grads, wanted, strict=True))
    if grad_x is not None or grad_history is not None:
        if grad_x is None:  # only sizes are read
            grad_x = C.TensorView(0, NAMES[x.dtype], x.shape, x.stride())
        outputs = {"grad_x": grad_x, "grad_history": grad_history}
        C.causal_conv3d_backward_data(weight=view(weight), has_history=history is not None, **outputs, **arguments)
    if grad_weight is not None or grad_bias is not None:
        inputs = {"x": view(x), "history": view(history), "kernel": weight.shape[2:]}
        C.causal_conv3d_backward_weight(**inputs, grad_weight=grad_weight, grad_bias=grad_bias, **arguments)
    return grads
