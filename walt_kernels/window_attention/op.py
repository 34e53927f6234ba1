"""Schema, fake, autograd and FLOPs of window_attention, and its backend table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Backend, backend, register
from .._flops import count_flops
from .._library import define
from . import flash, native, reference

ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, int[3] window, Tensor? bias_table, Tensor? image, Tensor? q_norm, Tensor? k_norm, "
    "float norm_eps, Tensor? context_k, Tensor? context_v, Tensor? context_mask, float scale"
)
NAMES = tuple(argument.split()[-1] for argument in ARGUMENTS.split(", "))
# The arguments that get a gradient, in the order of the backward's outputs.
DIFFERENTIABLE = ("q", "k", "v", "bias_table", "q_norm", "k_norm", "context_k", "context_v")
# Triton's kernels save the log-sum-exp unsummed: the largest score of a row, and the logarithm of the rest.
LSE_PARTS = {"triton": (2,)}


def _triton_unsupported(**inputs: Any) -> str | None:
    return _triton.unsupported(*(value for value in inputs.values() if isinstance(value, Tensor)))


def _unsupported(**inputs: Any) -> str | None:
    return _native.unsupported(*(value for value in inputs.values() if isinstance(value, Tensor)))


def register_op(prepare: Any) -> None:
    triton = _triton.kernels(__package__, "window_attention")
    register(
        "window_attention",
        prepare,
        [
            Backend("flash", flash.unsupported, flash.window_attention, opt_in=flash.OPT_IN),
            Backend("triton", _triton_unsupported, *triton, opt_in=_triton.OPT_IN),
            Backend("cpu", _unsupported, native.window_attention, native.window_attention_backward),
            Backend("reference", lambda **inputs: None, reference.window_attention),
        ],
    )


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, chosen = arguments
    return backend("window_attention", chosen).forward(**dict(zip(NAMES, inputs, strict=True)))


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    return native.outputs_like(arguments[0], LSE_PARTS.get(arguments[-1], ()))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = [value if isinstance(value, Tensor) else None for value in inputs]
    ctx.save_for_backward(*tensors, *output)
    ctx.options = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = dict(zip(NAMES, ctx.needs_input_grad, strict=False))
    wanted = [needed[name] for name in DIFFERENTIABLE]
    if grad is None or not any(wanted):
        return (None,) * len(ctx.options)
    *tensors, out, lse = ctx.saved_tensors
    inputs = [option if tensor is None else tensor for tensor, option in zip(tensors, ctx.options, strict=True)]
    grads = torch.ops.walt_kernels.window_attention_backward(grad, out, lse, *inputs[:-1], wanted, inputs[-1])
    result = {name: g for name, g, w in zip(DIFFERENTIABLE, grads, wanted, strict=True) if w}
    return tuple(result.get(name) for name in (*NAMES, "backend"))


define(
    "window_attention",
    f"({ARGUMENTS}, str backend) -> (Tensor, Tensor)",
    impl=_forward,
    fake=_fake,
    reference=lambda *inputs: reference.window_attention(**dict(zip(NAMES, inputs, strict=True))),
    setup_context=_setup,
    backward=_backward,
)


def _backward_impl(grad: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *values, wanted, chosen = arguments
    inputs = dict(zip(NAMES, values, strict=True))
    return tuple(backend("window_attention", chosen).backward(grad, out, lse, inputs, DIFFERENTIABLE, wanted))


def _backward_fake(grad: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *values, wanted, _ = arguments
    inputs = dict(zip(NAMES, values, strict=True))
    return tuple(native.gradients_like([inputs[name] for name in DIFFERENTIABLE], wanted))


define(
    "window_attention_backward",
    f"(Tensor grad, Tensor out, Tensor lse, {ARGUMENTS}, bool[8] wanted, str backend) -> ("
    + ", ".join(["Tensor"] * len(DIFFERENTIABLE))
    + ")",
    impl=_backward_impl,
    fake=_backward_fake,
)


BACKWARD = 2.5  # times the FLOPs of the forward pass: 5 products for 2, since the scores are computed again


def flops(q: Sequence[int], window: Sequence[int], context: int = 0) -> int:
    """Of the forward pass, by q's shape and the length of the context; images count as video, shapes don't tell."""
    batch, *sizes, heads, dim = q
    squares = [size // extent * extent**2 + (size % extent) ** 2 for size, extent in zip(sizes, window, strict=True)]
    pairs = math.prod(squares) + math.prod(sizes) * context  # of a token and a key that it sees
    return 4 * batch * heads * dim * pairs


def _forward_flops(*arguments: Any, out_shape: Any = None) -> int:
    inputs = dict(zip(NAMES, arguments, strict=False))
    context = inputs["context_k"]
    return flops(inputs["q"], inputs["window"], 0 if context is None else context[1])


def _backward_flops(grad: Any, out: Any, lse: Any, *arguments: Any, out_shape: Any = None) -> int:
    return int(BACKWARD * _forward_flops(*arguments))


count_flops("window_attention", _forward_flops, _backward_flops)
