"""The Triton backend of causal_conv3d: what native.py is to the C++ kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .layout import gradients_like
from .triton_data import backward_data
from .triton_forward import causal_conv3d
from .triton_weight import backward_bias, backward_weight


def causal_conv3d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, history: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *options, wanted = options  # type: ignore[assignment]
    grads = gradients_like(x, weight, history, wanted)
    grad_x, grad_weight, grad_bias, grad_history = (g if w else None for g, w in zip(grads, wanted, strict=True))
    if grad_x is not None or grad_history is not None:
        backward_data(grad, x, weight, history, grad_x, grad_history, *options)
    if grad_weight is not None:
        backward_weight(grad, x, weight, history, grad_weight, *options)
    if grad_bias is not None:
        backward_bias(grad, grad_bias)
    return grads


__all__ = ["causal_conv3d", "causal_conv3d_backward"]
