"""Schemas, fakes, autograd and FLOPs of the adaln ops, and their backend tables.

The ops return what their backward passes need beside what users get: mean and rstd of the norm, ``hidden`` of the
low-rank pair. adaln_residual_modulate saves x, not x_new: from x, branch and gate, all of which backward reads anyway,
the unrounded x_new is computed again. The rounded one would not fit the statistics, least of all where the mean is
large beside the spread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from .._dispatch import Backend, backend, register
from .._flops import count_flops
from .._library import define
from . import cuda, native, reference

_ops = torch.ops.walt_kernels


def _cpu_unsupported(**inputs: Any) -> str | None:
    return _native.unsupported(*(value for value in inputs.values() if isinstance(value, Tensor)))


def _cuda_unsupported(**inputs: Any) -> str | None:
    return _native.cuda_unsupported(*(value for value in inputs.values() if isinstance(value, Tensor)))


def _triton_unsupported(**inputs: Any) -> str | None:
    return _triton.unsupported(*(value for value in inputs.values() if isinstance(value, Tensor)))


def _kernels(functions: Any, name: str) -> tuple[Any, Any]:
    """An op's forward and backward."""
    return getattr(functions, name), getattr(functions, f"{name}_backward")


def register_ops(**prepare: Callable[..., dict[str, Any]]) -> None:
    """Registers the backends of every op with the function that validates its calls."""
    for name, validate in prepare.items():
        backends = [
            Backend("cuda", _cuda_unsupported, *_kernels(cuda.KERNELS, name), opt_in=_native.CUDA_OPT_IN),
            Backend("triton", _triton_unsupported, *_triton.kernels(__package__, name), opt_in=_triton.OPT_IN),
            Backend("cpu", _cpu_unsupported, *_kernels(native.KERNELS, name)),
            Backend("reference", lambda **inputs: None, getattr(reference, name)),
        ]
        register(name, validate, backends)


def _frames(rows: Tensor) -> int:
    return rows.shape[1] if rows.dim() == 3 else 0


def _forward_impl(name: str) -> Callable[..., Any]:
    return lambda *args: backend(name, args[-1]).forward(*args[:-1])


def _backward_impl(name: str) -> Callable[..., Any]:
    return lambda *args: backend(name, args[-1]).backward(*args[:-1])


# ---- adaln_modulate -------------------------------------------------------------------------------------------------


def _modulate_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shift, scale, _, ctx.chosen = inputs
    _, mean, rstd = output
    ctx.shift_frames = _frames(shift)
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _modulate_backward(ctx: Any, grad_h: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_h is None:
        return (None,) * 5
    x, scale, mean, rstd = ctx.saved_tensors
    grads = _ops.adaln_modulate_backward(grad_h, x, scale, mean, rstd, ctx.shift_frames, ctx.chosen)
    return (*grads, None, None)


define(
    "adaln_modulate",
    "(Tensor x, Tensor shift, Tensor scale, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    impl=_forward_impl("adaln_modulate"),
    fake=lambda x, shift, scale, eps, backend: (native.like(x), *native.statistics(x)),
    reference=reference.adaln_modulate,
    setup_context=_modulate_setup,
    backward=_modulate_backward,
)

define(
    "adaln_modulate_backward",
    "(Tensor grad_h, Tensor x, Tensor scale, Tensor mean, Tensor rstd, SymInt shift_frames, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    impl=_backward_impl("adaln_modulate"),
    fake=lambda grad_h, x, scale, mean, rstd, shift_frames, backend: (
        native.like(x),
        native.rows_like(scale, shift_frames),
        native.like(scale),
    ),
)


# ---- adaln_residual -------------------------------------------------------------------------------------------------


def _residual_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, branch, gate, ctx.chosen = inputs
    ctx.save_for_backward(branch, gate)
    ctx.set_materialize_grads(False)


def _residual_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    branch, gate = ctx.saved_tensors
    return (grad, *_ops.adaln_residual_backward(grad, branch, gate, ctx.chosen), None)


define(
    "adaln_residual",
    "(Tensor x, Tensor branch, Tensor gate, str backend) -> Tensor",
    impl=_forward_impl("adaln_residual"),
    fake=lambda x, branch, gate, backend: native.like(x),
    reference=reference.adaln_residual,
    setup_context=_residual_setup,
    backward=_residual_backward,
)

define(
    "adaln_residual_backward",
    "(Tensor grad, Tensor branch, Tensor gate, str backend) -> (Tensor, Tensor)",
    impl=_backward_impl("adaln_residual"),
    fake=lambda grad, branch, gate, backend: (native.like(branch), native.like(gate)),
)


# ---- adaln_residual_modulate ----------------------------------------------------------------------------------------


def _residual_modulate_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, gate, shift, scale, _, ctx.chosen = inputs
    _, _, mean, rstd = output
    ctx.shift_frames = _frames(shift)
    ctx.save_for_backward(x, branch, gate, scale, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _residual_modulate_backward(
    ctx: Any, grad_x_new: Tensor | None, grad_h: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, branch, gate, scale, mean, rstd = ctx.saved_tensors
    if grad_h is not None:
        grads = _ops.adaln_residual_modulate_backward(
            grad_x_new, grad_h, x, branch, gate, scale, mean, rstd, ctx.shift_frames, ctx.chosen
        )
        return (*grads, None, None)
    if grad_x_new is None:
        return (None,) * 7
    # The norm took no part: what remains is the residual's own backward pass.
    grads = _ops.adaln_residual_backward(grad_x_new, branch, gate, ctx.chosen)
    return (grad_x_new, *grads, None, None, None, None)


define(
    "adaln_residual_modulate",
    "(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    impl=_forward_impl("adaln_residual_modulate"),
    fake=lambda x, branch, gate, shift, scale, eps, backend: (native.like(x), native.like(x), *native.statistics(x)),
    reference=reference.adaln_residual_modulate,
    setup_context=_residual_modulate_setup,
    backward=_residual_modulate_backward,
)

define(
    "adaln_residual_modulate_backward",
    "(Tensor? grad_x_new, Tensor grad_h, Tensor x, Tensor branch, Tensor gate, Tensor scale, Tensor mean, Tensor rstd,"
    " SymInt shift_frames, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    impl=_backward_impl("adaln_residual_modulate"),
    fake=lambda grad_x_new, grad_h, x, branch, gate, scale, mean, rstd, shift_frames, backend: (
        native.like(x),
        native.like(branch),
        native.like(gate),
        native.rows_like(scale, shift_frames),
        native.like(scale),
    ),
)


# ---- adaln_lora -----------------------------------------------------------------------------------------------------


def _lora_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cond, _, down, up, ctx.chosen = inputs
    _, hidden = output
    ctx.save_for_backward(hidden, cond, down, up)
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)


def _lora_backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    return (*_ops.adaln_lora_backward(grad, *ctx.saved_tensors, ctx.chosen), None)


define(
    "adaln_lora",
    "(Tensor cond, Tensor base, Tensor down, Tensor up, str backend) -> (Tensor, Tensor)",
    impl=_forward_impl("adaln_lora"),
    fake=lambda cond, base, down, up, backend: (native.lora_output(base, down), native.hidden_like(cond, down)),
    reference=reference.adaln_lora,
    setup_context=_lora_setup,
    backward=_lora_backward,
)

define(
    "adaln_lora_backward",
    "(Tensor grad, Tensor hidden, Tensor cond, Tensor down, Tensor up, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    impl=_backward_impl("adaln_lora"),
    fake=lambda grad, hidden, cond, down, up, backend: native.lora_gradients(grad, cond, down, up),
)


BACKWARD = 2.0  # times the FLOPs of adaln_lora's forward pass: two products for each of its two


def lora_flops(cond: Sequence[int], base: Sequence[int], down: Sequence[int]) -> int:
    """Of the forward pass, by the shapes of the arguments."""
    layers, rank, width = down
    return 2 * cond[0] * layers * rank * (width + base[1])


count_flops(
    "adaln_lora",
    lambda cond, base, down, *_, out_shape: lora_flops(cond, base, down),
    lambda grad, hidden, cond, down, *_, out_shape: int(BACKWARD * lora_flops(cond, grad[1:], down)),
)
