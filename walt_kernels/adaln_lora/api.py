"""What users call: documentation, validation, choice of the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dispatch import select
from .._library import autocast_enabled
from ..values import plain
from . import op, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def adaln_lora(cond: Tensor, base: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Modulation of all layers in one call: a shared projection plus a low-rank term per layer.

    ``out[i] = base + up[i] @ (down[i] @ cond)``  (W.A.L.T, section 3.3: A^i = A^1 + W_b^i W_a^i (c + t))

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
    inputs = prepare_lora(cond, base, down, up)
    chosen = select("adaln_lora", inputs)
    if chosen == "reference":
        return reference.adaln_lora(**inputs)
    return torch.ops.walt_kernels.adaln_lora(*inputs.values(), chosen)[0]


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    """LayerNorm without weight and bias, then scale and shift, in one pass.

    ``h = LayerNorm(x, eps) * (1 + scale) + shift``  (DiT's adaLN; W.A.L.T, section 3.3)

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
    inputs = prepare_modulate(x, shift, scale, eps=eps)
    chosen = select("adaln_modulate", inputs)
    if chosen == "reference":
        return reference.adaln_modulate(**inputs)
    return torch.ops.walt_kernels.adaln_modulate(*inputs.values(), chosen)[0]


def adaln_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Gated residual: ``x_new = x + gate * branch``  (DiT's adaLN-Zero; W.A.L.T, section 3.3)

    Args:
        x, branch: ``[B, N, D]``, any strides, one dtype (under autocast branch is cast to x's).
        gate: ``[B, D]`` or ``[B, F, D]`` with F dividing N, as in :func:`adaln_modulate`.

    Returns:
        ``[B, N, D]``, contiguous, x's dtype. A gate of zero returns x bit for bit.

    Gradients for x, branch and gate; deterministic.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    inputs = prepare_residual(x, branch, gate)
    chosen = select("adaln_residual", inputs)
    if chosen == "reference":
        return reference.adaln_residual(**inputs)
    return torch.ops.walt_kernels.adaln_residual(*inputs.values(), chosen)


def adaln_residual_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """What stands between two sub-blocks, in one pass: gated residual, LayerNorm, scale and shift.

    ``x_new = x + gate * branch``;  ``h = LayerNorm(x_new, eps) * (1 + scale) + shift``

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
    inputs = prepare_residual_modulate(x, branch, gate, shift, scale, eps=eps)
    chosen = select("adaln_residual_modulate", inputs)
    if chosen == "reference":
        return reference.adaln_residual_modulate(**inputs)
    return torch.ops.walt_kernels.adaln_residual_modulate(*inputs.values(), chosen)[:2]


# ---- validation -----------------------------------------------------------------------------------------------------


# A message is written only when it is raised: under torch.compile a formatted size becomes a constant of the graph.


def prepare_lora(cond: Tensor, base: Tensor, down: Tensor, up: Tensor) -> dict[str, Any]:
    tensors = {"cond": cond, "base": base, "down": down, "up": up}
    expected = {"cond": "[B, D]", "base": "[B, K]", "down": "[layers, r, D]", "up": "[layers, K, r]"}
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, expected[name])
        _check_device(name, tensor, "cond", cond)
    if base.shape[0] != cond.shape[0]:
        raise _shape_error("base", base, f"[B, K] with B = {cond.shape[0]} as in cond")
    if down.shape[2] != cond.shape[1]:
        raise _shape_error("down", down, f"[layers, r, D] with D = {cond.shape[1]} as in cond")
    if up.shape[0] != down.shape[0] or up.shape[1] != base.shape[1] or up.shape[2] != down.shape[1]:
        sizes = [down.shape[0], base.shape[1], down.shape[1]]
        raise _shape_error("up", up, f"[layers, K, r] = {sizes} as in base and down")
    if autocast_enabled(cond.device.type):
        widest = cond.dtype
        for tensor in tensors.values():
            widest = torch.promote_types(widest, tensor.dtype)
        return {name: tensor.to(widest) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        _check_dtype(name, tensor, (cond.dtype,), "cond")
    return tensors


def prepare_modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> dict[str, Any]:
    _check_tokens(x, None)
    shift, scale = _modulation(x, shift=shift, scale=scale)
    return {"x": x, "shift": shift, "scale": scale, "eps": _check_eps(eps)}


def prepare_residual(x: Tensor, branch: Tensor, gate: Tensor) -> dict[str, Any]:
    branch = _check_tokens(x, branch)
    (gate,) = _modulation(x, gate=gate)
    return {"x": x, "branch": branch, "gate": gate}


def prepare_residual_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> dict[str, Any]:
    branch = _check_tokens(x, branch)
    gate, shift, scale = _modulation(x, gate=gate, shift=shift, scale=scale)
    return {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale, "eps": _check_eps(eps)}


def _check_tensor(name: str, tensor: Any, expected: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor {expected}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if tensor.dim() != expected.count(",") + 1:
        raise _shape_error(name, tensor, expected)


def _shape_error(name: str, tensor: Tensor, expected: str) -> ValueError:
    return ValueError(f"{name} has shape {list(tensor.shape)}, expected {expected}")


def _check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {other.device} as {other_name}")


def _check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...], other_name: str) -> None:
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {' or '.join(map(str, allowed))} as {other_name}")


def _check_eps(eps: float) -> float:
    eps = plain(eps)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps is a {type(eps).__name__}, expected a number")
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps is {eps}, expected a positive number")
    return float(eps)


def _check_tokens(x: Tensor, branch: Any) -> Any:
    """Validates x and, where it is given, branch; returns branch (in x's dtype under autocast)."""
    _check_tensor("x", x, "[B, N, D]")
    if x.shape[2] == 0:
        raise _shape_error("x", x, "[B, N, D] with D of at least 1")
    if branch is None:
        return None
    _check_tensor("branch", branch, "[B, N, D]")
    if branch.shape != x.shape:
        raise _shape_error("branch", branch, f"{list(x.shape)} as x")
    _check_device("branch", branch, "x", x)
    if autocast_enabled(x.device.type):
        return branch.to(x.dtype)
    _check_dtype("branch", branch, (x.dtype,), "x")
    return branch


def _rows_of(x: Tensor) -> str:
    return f"[B, D] = [{x.shape[0]}, {x.shape[2]}] or [B, F, D] with F dividing N = {x.shape[1]}"


def _modulation(x: Tensor, **rows: Any) -> list[Tensor]:
    """Validates modulation tensors against x: one dtype for all of them, x's or float32 beside a 16-bit x."""
    batch, tokens, width = x.shape
    for name, tensor in rows.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor {_rows_of(x)}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected {x.dtype} as x")
        good = tensor.dim() in (2, 3) and tensor.shape[0] == batch and tensor.shape[-1] == width
        if good and tensor.dim() == 3:
            good = tensor.shape[1] > 0 and tokens % tensor.shape[1] == 0
        if not good:
            raise _shape_error(name, tensor, _rows_of(x))
        _check_device(name, tensor, "x", x)
    allowed = (x.dtype,) if x.dtype in (torch.float32, torch.float64) else (x.dtype, torch.float32)
    first_name, first = next(iter(rows.items()))
    if autocast_enabled(x.device.type):
        fits = first.dtype in allowed and all(tensor.dtype == first.dtype for tensor in rows.values())
        common = first.dtype if fits else torch.promote_types(x.dtype, torch.float32)
        return [tensor.to(common) for tensor in rows.values()]
    _check_dtype(first_name, first, allowed, "x" if len(allowed) == 1 else "x has, or wider")
    for name, tensor in rows.items():
        _check_dtype(name, tensor, (first.dtype,), first_name)
    return list(rows.values())


op.register_ops(
    adaln_lora=prepare_lora,
    adaln_modulate=prepare_modulate,
    adaln_residual=prepare_residual,
    adaln_residual_modulate=prepare_residual_modulate,
)
