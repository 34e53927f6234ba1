"""Schema, fake and autograd of causal_conv3d, and its backend table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._dispatch import Backend, backend, register
from .._library import define
from . import reference

OPTIONS = (
    "int[3] stride, int[3] dilation, SymInt[4] padding, str time_padding, str space_padding, int groups, str backend"
)


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last_3d for x and slices of such tensors."""
    if x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous():
        return torch.channels_last_3d
    return torch.contiguous_format


def output_shape(
    x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    """[B, C_out, ceil(T / st), H', W']"""
    frames = (x.shape[2] - 1) // stride[0] + 1
    top, bottom, left, right = padding
    height = (x.shape[3] + top + bottom - (weight.shape[3] - 1) * dilation[1] - 1) // stride[1] + 1
    width = (x.shape[4] + left + right - (weight.shape[4] - 1) * dilation[2] - 1) // stride[2] + 1
    return x.shape[0], weight.shape[0], frames, height, width


def output_like(
    x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], padding: Sequence[int]
) -> Tensor:
    shape = output_shape(x, weight, stride, dilation, padding)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def gradients_like(
    x: Tensor, weight: Tensor, history: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for the gradients of x, weight, bias and history; zero elements for those not wanted."""

    def empty(shape: Sequence[int], like: Tensor, wanted: bool) -> Tensor:
        if not wanted:
            return torch.empty((0,), dtype=like.dtype, device=like.device)
        format = memory_format(like) if len(shape) == 5 else torch.contiguous_format
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=format)

    past = x if history is None else history
    return (
        empty(x.shape, x, wanted[0]),
        empty(weight.shape, weight, wanted[1]),
        empty(weight.shape[:1], weight, wanted[2]),
        empty(past.shape, past, wanted[3]),
    )


def _unsupported(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, **options: Any) -> str | None:
    return _native.unsupported(x, weight, bias, history)


def register_op(prepare: Any) -> None:
    register(
        "causal_conv3d",
        prepare,
        [
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
