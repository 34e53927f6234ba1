"""The adaln ops: what users read of them, the checks of a call, and what they are made of.

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
from .._checks import (
    check_dtype,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    fits,
    one_dtype,
    positive_number,
    shape_error,
)
from .._define import define_op
from .._dispatch import Backend
from .._layout import like
from .._library import autocast_enabled
from . import cuda, native, reference
from .defaults import DEFAULTS
from .layout import hidden_like, lora_gradients, lora_output, statistics

_CPU, _CUDA = native.KERNELS, cuda.KERNELS

BACKWARD = 2.0  # times the FLOPs of adaln_lora's forward pass: two products for each of its two


def lora_flops(cond: Sequence[int], base: Sequence[int], down: Sequence[int]) -> int:
    """Of adaln_lora's forward pass, by the shapes of the arguments."""
    layers, rank, width = down
    return 2 * cond[0] * layers * rank * (width + base[1])


_LORA_LAYOUTS = {"cond": "[B, D]", "base": "[B, K]", "down": "[layers, r, D]", "up": "[layers, K, r]"}


def _lora_sample(tensor: Callable[..., Tensor], batch: int) -> dict[str, Any]:
    return {"cond": tensor(batch, 64), "base": tensor(batch, 384), "down": tensor(4, 2, 64), "up": tensor(4, 384, 2)}


@define_op(
    reference.adaln_lora,
    returns=("out", "hidden"),
    outputs=lambda cond, base, down: (lora_output(base, down), hidden_like(cond, down)),
    differentiable=("cond", "base", "down", "up"),
    gradients=lora_gradients,
    unread=("base", "out"),
    flops=(lora_flops, lambda grad_out, cond, down: int(BACKWARD * lora_flops(cond, grad_out[1:], down))),
    backends=(
        Backend("cuda", _native.cuda_unsupported, _CUDA.lora_forward, _CUDA.lora_backward, _native.CUDA_OPT_IN),
        _triton.backend(__package__, "lora_forward", "lora_backward"),
        Backend("cpu", _native.unsupported, _CPU.lora_forward, _CPU.lora_backward),
    ),
    sample=_lora_sample,
)
def adaln_lora(cond: Tensor, base: Tensor, down: Tensor, up: Tensor) -> dict[str, Any]:
    """Modulation of all layers in one call: a shared projection plus a low-rank term per layer.

    ``out[i] = base + cond @ down[i].T @ up[i].T``  (W.A.L.T, section 3.3: A^i = A^1 + W_b^i W_a^i (c + t))

    Args:
        cond: ``[B, D]``, conditioning vector (class and time embedding).
        base: ``[B, K]``, the modulation that all layers share; K is usually 6 D.
        down: ``[layers, r, D]``.
        up: ``[layers, K, r]``.

    Returns:
        ``[layers, B, K]``, contiguous. ``out[i].chunk(6, dim=-1)`` are views that the other ops take without a copy.

    All four tensors have one dtype (float32, bfloat16, float16 or float64); products are summed in float32 (float64 for
    float64) and rounded once. Gradients for all four. Under autocast nothing is narrowed: modulation stays as precise
    as its weights; ``cond`` or ``base`` that an autocast layer narrowed are widened to the widest dtype of the four.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    tensors = {"cond": cond, "base": base, "down": down, "up": up}
    for name, layout in _LORA_LAYOUTS.items():
        tensor = tensors[name]
        check_tensor(name, tensor, layout)
        if tensor is cond or tensor.dtype is not cond.dtype or tensor.device != cond.device:
            check_dtype(name, tensor)
            check_same_device(name, tensor, "cond", cond)
    if base.shape[0] != cond.shape[0]:
        raise shape_error("base", base, f"[B, K] with B = {cond.shape[0]} as in cond")
    if down.shape[2] != cond.shape[1]:
        raise shape_error("down", down, f"[layers, r, D] with D = {cond.shape[1]} as in cond")
    check_shape("up", up, (down.shape[0], base.shape[1], down.shape[1]), "[layers, K, r] as in base and down")
    if autocast_enabled(cond.device.type):
        widest = cond.dtype
        for tensor in tensors.values():
            widest = torch.promote_types(widest, tensor.dtype)
        return {name: tensor.to(widest) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        check_same_dtype(name, tensor, "cond", cond)
    return tensors


# One kernel for the other three ops: it does what it has memory for.
_BACKENDS = (
    Backend("cuda", _native.cuda_unsupported, _CUDA.forward, _CUDA.backward, _native.CUDA_OPT_IN),
    _triton.backend(__package__),
    Backend("cpu", _native.unsupported, _CPU.forward, _CPU.backward),
)


def _sample(*names: str) -> Callable[[Callable[..., Tensor], int], dict[str, Any]]:
    """x and branch are tokens, all others rows of modulation."""

    def sample(tensor: Callable[..., Tensor], batch: int) -> dict[str, Any]:
        return {n: tensor(batch, 80, 64) if n in ("x", "branch") else tensor(batch, 64) for n in names}

    return sample


@define_op(
    reference.adaln_modulate,
    returns=("h", "mean", "rstd"),
    outputs=lambda x: (like(x), *statistics(x)),
    differentiable=("x", "shift", "scale"),
    gradients=lambda x, shift, scale: (like(x), like(shift), like(scale)),
    unread=("eps", "h"),
    backends=_BACKENDS,
    sample=_sample("x", "shift", "scale"),
    defaults=DEFAULTS,
)
def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> dict[str, Any]:
    """LayerNorm without weight and bias, then scale and shift, in one pass.

    ``h = F.layer_norm(x, (D,), eps=eps) * (1 + scale[:, None]) + shift[:, None]``  (DiT's adaLN; W.A.L.T, section 3.3)

    Args:
        x: ``[B, N, D]``, any strides.
        shift, scale: ``[B, D]``, or ``[B, F, D]`` with F dividing N: one row for every N / F consecutive tokens. Views
            (chunks of ``[..., k * D]``) are taken by stride, not copied. One dtype: x's, or float32 when x has 16 bits.
        eps: added to the variance.

    Returns:
        ``[B, N, D]``, contiguous, x's dtype, also under autocast.

    Statistics are float32 (float64 for float64). Gradients for x, shift and scale; deterministic.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    _check_tokens(x)
    return {"x": x, **_modulation(x, shift=shift, scale=scale), "eps": positive_number("eps", eps)}


@define_op(
    reference.adaln_residual,
    returns=("x_new",),
    outputs=lambda x: like(x),
    differentiable=("branch", "gate"),
    gradients=lambda branch, gate: (like(branch), like(gate)),
    unread=("x", "x_new"),
    backward=lambda kernels, grad_x_new: {"x": grad_x_new, **kernels()},
    backends=_BACKENDS,
    sample=_sample("x", "branch", "gate"),
    defaults=DEFAULTS,
)
def adaln_residual(x: Tensor, branch: Tensor, gate: Tensor) -> dict[str, Any]:
    """Gated residual: ``x_new = x + gate[:, None] * branch``  (DiT's adaLN-Zero; W.A.L.T, section 3.3)

    Args:
        x, branch: ``[B, N, D]``, any strides, one dtype (under autocast branch is cast to x's).
        gate: ``[B, D]`` or ``[B, F, D]`` with F dividing N, as in :func:`adaln_modulate`.

    Returns:
        ``[B, N, D]``, contiguous, x's dtype. A gate of zero returns x bit for bit.

    Gradients for x, branch and gate; deterministic.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    _check_tokens(x)
    return {"x": x, "branch": _checked_branch(x, branch), **_modulation(x, gate=gate)}


def _residual_alone(
    kernels: Callable[[], dict[str, Tensor]],
    grad_x_new: Tensor,
    grad_h: Tensor | None,
    branch: Tensor,
    gate: Tensor,
    backend: str,
) -> dict[str, Tensor]:
    """Where nothing arrives for h, the norm took no part: what remains is the residual's own backward pass."""
    if grad_h is not None:
        return kernels()
    grad_branch, grad_gate = torch.ops.walt_kernels.adaln_residual_backward(grad_x_new, branch, gate, backend)
    return {"x": grad_x_new, "branch": grad_branch, "gate": grad_gate}


@define_op(
    reference.adaln_residual_modulate,
    returns=("x_new", "h", "mean", "rstd"),
    outputs=lambda x: (like(x), like(x), *statistics(x)),
    differentiable=("x", "branch", "gate", "shift", "scale"),
    gradients=lambda x, branch, gate, shift, scale: tuple(map(like, (x, branch, gate, shift, scale))),
    unread=("eps", "x_new", "h"),
    backward=_residual_alone,
    backends=_BACKENDS,
    sample=_sample("x", "branch", "gate", "shift", "scale"),
    defaults=DEFAULTS,
)
def adaln_residual_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> dict[str, Any]:
    """What stands between two sub-blocks, in one pass: gated residual, LayerNorm, scale and shift.

    ``x_new = x + gate[:, None] * branch``
    ``h = F.layer_norm(x_new, (D,), eps=eps) * (1 + scale[:, None]) + shift[:, None]``

    Args:
        x, branch: ``[B, N, D]``, any strides, one dtype (under autocast branch is cast to x's).
        gate, shift, scale: ``[B, D]`` or ``[B, F, D]`` with F dividing N, as in :func:`adaln_modulate`; one dtype.
        eps: added to the variance.

    Returns:
        ``(x_new, h)``, both ``[B, N, D]``, contiguous, x's dtype. x_new is rounded once, and h is computed from the
        unrounded x_new in float32 (float64 for float64).

    Gradients for all five tensors, through either output or both; deterministic.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    _check_tokens(x)
    rows = _modulation(x, gate=gate, shift=shift, scale=scale)
    return {"x": x, "branch": _checked_branch(x, branch), **rows, "eps": positive_number("eps", eps)}


def _check_tokens(x: Any) -> None:
    check_tensor("x", x, "[B, N, D]")
    check_dtype("x", x)
    if x.shape[2] == 0:
        raise shape_error("x", x, "[B, N, D] with D of at least 1")


def _checked_branch(x: Tensor, branch: Any) -> Tensor:
    """branch, in x's dtype under autocast."""
    if fits(branch, x.shape, x):
        if branch.dtype is x.dtype:
            return branch
    else:
        check_tensor("branch", branch, "[B, N, D]")
        check_dtype("branch", branch)
        check_shape("branch", branch, x.shape, "x's shape")
        check_same_device("branch", branch, "x", x)
    if autocast_enabled(x.device.type):
        return branch.to(x.dtype)
    check_same_dtype("branch", branch, "x", x)
    return branch


def _modulation(x: Tensor, **rows: Any) -> dict[str, Tensor]:
    """Checks rows of modulation against x: one dtype for all of them, x's or float32 beside a 16-bit x."""
    batch, tokens, width = x.shape
    for name, tensor in rows.items():
        if fits(tensor, (batch, width), x):
            continue
        check_tensor(name, tensor, "[B, D] or [B, F, D]", (2, 3))
        check_dtype(name, tensor)
        good = tensor.shape[0] == batch and tensor.shape[-1] == width
        if good and tensor.dim() == 3:
            good = tensor.shape[1] > 0 and tokens % tensor.shape[1] == 0
        if not good:
            either = f"[B, D] = ({batch}, {width}) or [B, F, D] with F dividing N = {tokens}"
            raise shape_error(name, tensor, either)
        check_same_device(name, tensor, "x", x)
    return one_dtype(x, rows)
