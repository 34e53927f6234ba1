"""Tensors to addresses: calls the C++ kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._native import C, view
from .layout import wide_dtype

PARAMETERS = ("bias_table", "q_norm", "k_norm")


def _call(name: str, q: Tensor, **arguments: Any) -> None:
    wide = wide_dtype(q)
    tensors = arguments | {"q": q}
    for parameter in PARAMETERS:
        if (tensor := arguments[parameter]) is not None:
            tensors[parameter] = tensor.detach().to(wide).contiguous()
    views = {key: view(value) if isinstance(value, Tensor) else value for key, value in tensors.items()}
    getattr(C, name)(**views, threads=torch.get_num_threads())


def forward(out: Tensor, **arguments: Any) -> None:
    if out.numel() > 0:
        _call("window_attention", out=out, **arguments)


def backward(grad_out: Tensor, out: Tensor, **arguments: Any) -> None:
    """The kernel sums gradients of the table and the norms in ``wide_dtype``."""
    wide = wide_dtype(grad_out)
    gradients = {name: value for name, value in arguments.items() if name.startswith("grad_") and value is not None}
    if grad_out.numel() == 0:
        for gradient in gradients.values():
            gradient.zero_()
        return
    sums = {
        name: torch.empty(gradient.shape, dtype=wide)
        for name, gradient in gradients.items()
        if name.removeprefix("grad_") in PARAMETERS and gradient.dtype != wide
    }
    _call("window_attention_backward", grad_out=grad_out, out=out, **(arguments | sums))
    for name, total in sums.items():
        gradients[name].copy_(total)
