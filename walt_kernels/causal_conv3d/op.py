"""Schema, fake, autograd and FLOPs of causal_conv3d, and its backend table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Backend, backend, register
from .._flops import count_flops
from .._library import decompose, define
from . import native, reference
from .layout import gradients_like, output_like

OPTIONS = (
    "int[3] stride, int[3] dilation, SymInt[4] padding, str time_padding, str space_padding, int groups, str backend"
)


def _unsupported(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, **options: Any) -> str | None:
    return _native.unsupported(x, weight, bias, history)


def _triton_unsupported(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, **_: Any) -> str | None:
    return _triton.unsupported(x, weight, bias, history)


def register_op(prepare: Any) -> None:
    triton = _triton.kernels(__package__, "causal_conv3d")
    register(
        "causal_conv3d",
        prepare,
        [
            Backend("triton", _triton_unsupported, *triton, opt_in=_triton.OPT_IN),
            Backend("cpu", _unsupported, native.causal_conv3d, native.causal_conv3d_backward),
            Backend("reference", lambda **inputs: None, reference.causal_conv3d),
        ],
    )


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, *options: Any) -> Tensor:
    return backend("causal_conv3d", options[-1]).forward(x, weight, bias, history, *options[:-1])


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, *options: Any) -> Tensor:
    return output_like(x, weight, *options[:3])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, history, *ctx.options = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, history)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (4 + len(ctx.options))
    wanted = list(ctx.needs_input_grad[:4])
    if grad is None or not any(wanted):
        return nothing
    x, weight, history = ctx.saved_tensors
    grads = torch.ops.walt_kernels.causal_conv3d_backward(
        grad, x, weight, history, *ctx.options[:-1], wanted, ctx.options[-1]
    )
    return *(g if w else None for g, w in zip(grads, wanted, strict=True)), *nothing[4:]


define(
    "causal_conv3d",
    f"(Tensor x, Tensor weight, Tensor? bias, Tensor? history, {OPTIONS}) -> Tensor",
    impl=_forward,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
)
decompose("causal_conv3d", reference.causal_conv3d, outputs=1)


def _backward_impl(grad: Tensor, x: Tensor, weight: Tensor, history: Tensor | None, *options: Any) -> Any:
    return backend("causal_conv3d", options[-1]).backward(grad, x, weight, history, *options[:-1])


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, history: Tensor | None, *options: Any) -> Any:
    return gradients_like(x, weight, history, options[-2])


define(
    "causal_conv3d_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? history, "
    + OPTIONS.replace("str backend", "bool[4] wanted, str backend")
    + ") -> (Tensor, Tensor, Tensor, Tensor)",
    impl=_backward_impl,
    fake=_backward_fake,
)


BACKWARD = 2.0  # times the FLOPs of the forward pass: the gradients of x and of weight


def flops(y: Sequence[int], weight: Sequence[int]) -> int:
    """Of the forward pass, by the shapes of y and weight."""
    return 2 * math.prod(y) * math.prod(weight[1:])


def _backward_flops(grad: Any, x: Any, weight: Any, history: Any, *options: Any, out_shape: Any = None) -> int:
    of_x, of_weight, _, of_history = options[-2]
    return flops(grad, weight) * ((of_x or of_history) + of_weight)


count_flops("causal_conv3d", lambda x, weight, *_, out_shape: flops(out_shape, weight), _backward_flops)
