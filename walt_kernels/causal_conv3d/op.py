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
from .._library import Tangents, define
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


def _tangent(arguments: Sequence[Any], tangents: Tangents) -> tuple[Tensor]:
    """The convolution is linear in x with its history, and in weight with bias."""
    x, weight, _, history, *options = arguments
    of_x, of_weight, of_bias, of_history = tangents[:4]
    convolve = torch.ops.walt_kernels.causal_conv3d
    terms = []
    if of_x is not None or of_history is not None:
        past = None if history is None else _or_zeros(of_history, history)
        terms.append(convolve(_or_zeros(of_x, x), weight, None, past, *options))
    if of_weight is not None or of_bias is not None:
        terms.append(convolve(x, _or_zeros(of_weight, weight), of_bias, history, *options))
    return (terms[0] if len(terms) == 1 else terms[0] + terms[1],)


def _or_zeros(tangent: Tensor | None, primal: Tensor) -> Tensor:
    return torch.zeros_like(primal) if tangent is None else tangent


define(
    "causal_conv3d",
    f"(Tensor x, Tensor weight, Tensor? bias, Tensor? history, {OPTIONS}) -> Tensor",
    impl=_forward,
    fake=_fake,
    reference=reference.causal_conv3d,
    setup_context=_setup,
    backward=_backward,
    tangent=_tangent,
)


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
