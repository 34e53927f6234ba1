"""Tensors to addresses: calls the C++ kernels and allocates what they write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._native import C, view
from .layout import gradients_like, output_like


def _options(
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_padding: str,
    space_padding: str,
    groups: int,
) -> Any:
    return C.ConvOptions(
        stride=stride,
        dilation=dilation,
        padding=padding,
        time_padding=time_padding,
        space_padding=space_padding,
        groups=groups,
        threads=torch.get_num_threads(),
    )


def causal_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, *options: Any) -> Tensor:
    y = output_like(x, weight, *options[:3])
    C.causal_conv3d(view(x), view(weight), view(bias), view(history), view(y), _options(*options))
    return y


def causal_conv3d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, history: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted, native_options = options[-1], _options(*options[:-1])
    grads = gradients_like(x, weight, history, wanted)
    grad_x, grad_weight, grad_bias, grad_history = (view(g) if w else None for g, w in zip(grads, wanted, strict=True))
    if grad_x is not None or grad_history is not None:
        if grad_x is None:  # only sizes are read
            grad_x = C.TensorView(0, str(x.dtype)[len("torch.") :], x.shape, x.stride())
        C.causal_conv3d_backward_data(
            view(grad), view(weight), grad_x, grad_history, has_history=history is not None, options=native_options
        )
    if grad_weight is not None or grad_bias is not None:
        C.causal_conv3d_backward_weight(
            view(grad), view(x), view(history), grad_weight, grad_bias, weight.shape[2:], native_options
        )
    return grads
