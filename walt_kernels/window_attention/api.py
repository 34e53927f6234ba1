"""What users read of window attention: the docstring, the checks, the choice of a backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from .._dispatch import select
from .._library import autocast
from ..values import is_int, plain
from . import flash, op, reference

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: Sequence[int],
    bias_table: torch.Tensor | None = None,
    image: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    context_k: torch.Tensor | None = None,
    context_v: torch.Tensor | None = None,
    context_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention inside non-overlapping windows of a video (W.A.L.T, section 3.2; the bias is Swin's).

    For tokens i and j of one window and one head::

        score(i, j) = scale * <norm(q_i) * q_norm, norm(k_j) * k_norm> + bias_table[head, i - j + window - 1]
        out_i       = sum_j softmax_j(score(i, j)) * v_j

    Args:
        q, k, v: ``[B, T, H, W, heads, dim]``, float32, float64, bfloat16 or float16, any strides (views of one packed
            projection are taken as they are); dim from 8 to 256, multiples of 8 are fast.
        window: ``(t, h, w)`` in tokens; a spatial window is ``(1, h, w)``. Sizes that it does not divide leave smaller
            windows at the far edge.
        bias_table: ``[heads, 2t-1, 2h-1, 2w-1]``, added to the scores by relative position.
        image: bool ``[B]`` or ``[B, T]``. Tokens of image frames attend to themselves alone: ``out = v`` bitwise,
            nothing flows into q, k, the norms or the table. Video tokens do not see image frames. Not together with a
            context.
        q_norm, k_norm: ``[dim]``, the scales of a LayerNorm over dim (no bias) of the queries and of all keys, the
            context's included; None leaves them as they are.
        norm_eps: added to the variance in both norms.
        context_k, context_v: ``[B, L, heads, dim]``, keys and values which every window of a sample sees beside its own
            tokens, without bias (the paper's cross-attention).
        context_mask: bool ``[B, L]``, true where the context is visible.
        scale: factor of the scores, ``dim ** -0.5`` by default.

    The table and the norms may be float32 while q is bfloat16 or float16; sums are float32 or wider.

    Returns:
        ``[B, T, H, W, heads, dim]``, contiguous, in q's dtype. Gradients flow into every floating tensor and are
        deterministic.

    Raises:
        ValueError, TypeError: an argument does not fit; the text names it.
    """
    inputs = prepare(
        q,
        k,
        v,
        window=window,
        bias_table=bias_table,
        image=image,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_eps=norm_eps,
        context_k=context_k,
        context_v=context_v,
        context_mask=context_mask,
        scale=scale,
    )
    chosen = select("window_attention", inputs)
    if chosen == "reference":
        return reference.window_attention(**inputs)
    if chosen == "flash":
        return flash.window_attention(**inputs)
    return torch.ops.walt_kernels.window_attention(*inputs.values(), chosen)[0]


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: Sequence[int],
    bias_table: torch.Tensor | None = None,
    image: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    context_k: torch.Tensor | None = None,
    context_v: torch.Tensor | None = None,
    context_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """Validates a call and returns its normalised inputs: cast by autocast, image per frame, scale a number."""
    norm_eps, scale = plain(norm_eps), plain(scale)
    floating = {"q": q, "k": k, "v": v, "context_k": context_k, "context_v": context_v}
    parameters = {"bias_table": bias_table, "q_norm": q_norm, "k_norm": k_norm}
    masks = {"image": image, "context_mask": context_mask}
    _check_tensors(floating | parameters | masks, q)
    q, k, v, context_k, context_v = autocast(q, k, v, context_k, context_v)  # type: ignore[assignment]
    _check_dtypes(
        floating | {"q": q, "k": k, "v": v, "context_k": context_k, "context_v": context_v}, parameters, masks
    )
    if q.dim() != 6:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected 6 dimensions [B, T, H, W, heads, dim]")
    B, T, H, W, heads, dim = q.shape
    if any(size < 1 for size in (T, H, W, heads)):  # one by one: min() would put their order into an exported graph
        raise ValueError(f"q has shape {tuple(q.shape)}, expected at least one frame, row, column and head")
    if not 8 <= dim <= 256:
        raise ValueError(f"q has dim {dim} in its last dimension, expected 8 to 256")
    _check_shape("k", k, (B, T, H, W, heads, dim), "q's shape")
    _check_shape("v", v, (B, T, H, W, heads, dim), "q's shape")
    extent = _check_window(window)
    _check_shape("bias_table", bias_table, (heads, *(2 * s - 1 for s in extent)), "[heads, 2t-1, 2h-1, 2w-1]")
    _check_shape("q_norm", q_norm, (dim,), "[dim]")
    _check_shape("k_norm", k_norm, (dim,), "[dim]")
    _check_number("norm_eps", norm_eps)
    if not norm_eps >= 0:
        raise ValueError(f"norm_eps is {norm_eps}, expected a number >= 0")
    _check_number("scale", 0.0 if scale is None else scale)
    _check_context(context_k, context_v, context_mask, image, (B, heads, dim))
    if image is not None:
        if image.dim() not in (1, 2) or image.shape[0] != B or image.shape[1:] not in ((), (T,)):
            raise ValueError(f"image has shape {tuple(image.shape)}, expected [B] = ({B},) or [B, T] = ({B}, {T})")
        image = image[:, None].expand(B, T) if image.dim() == 1 else image
    return {
        "q": q,
        "k": k,
        "v": v,
        "window": extent,
        "bias_table": bias_table,
        "image": image,
        "q_norm": q_norm,
        "k_norm": k_norm,
        "norm_eps": float(norm_eps),
        "context_k": context_k,
        "context_v": context_v,
        "context_mask": context_mask,
        "scale": dim**-0.5 if scale is None else float(scale),
    }


def _check_tensors(tensors: dict[str, Any], q: Any) -> None:
    for name, tensor in tensors.items():
        if tensor is None and name not in ("q", "k", "v"):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a tensor")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {q.device} as q is")


def _check_dtypes(
    floating: dict[str, torch.Tensor | None],
    parameters: dict[str, torch.Tensor | None],
    masks: dict[str, torch.Tensor | None],
) -> None:
    q = floating["q"]
    assert q is not None
    if q.dtype not in _DTYPES:
        raise TypeError(f"q has dtype {q.dtype}, expected float32, float64, bfloat16 or float16")
    for name, tensor in floating.items():
        if tensor is not None and tensor.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected {q.dtype} as q has")
    for name, tensor in parameters.items():
        if tensor is None:
            continue
        if tensor.dtype not in _DTYPES or (tensor.dtype == torch.float64) != (q.dtype == torch.float64):
            expected = "float64" if q.dtype == torch.float64 else "float32, bfloat16 or float16"
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected {expected} with q in {q.dtype}")
    for name, tensor in masks.items():
        if tensor is not None and tensor.dtype != torch.bool:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected torch.bool")


def _check_shape(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}, {meaning}")


def _check_window(window: Any) -> tuple[int, int, int]:
    window = plain(window)
    is_sequence = isinstance(window, Sequence) and not isinstance(window, str)
    if not is_sequence or not all(map(is_int, window)):
        raise TypeError(f"window is {window!r}, expected three integers (t, h, w)")
    if len(window) != 3 or min(window) < 1:
        raise ValueError(f"window is {tuple(window)}, expected three positive integers (t, h, w)")
    return window[0], window[1], window[2]


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        shown = repr(value) if isinstance(value, str | bool) else f"a {type(value).__name__}"
        raise TypeError(f"{name} is {shown}, expected a number")
    if not -math.inf < value < math.inf:  # what torch.compile can trace with a number that varies
        raise ValueError(f"{name} is {value}, expected a finite number")


def _check_context(
    context_k: torch.Tensor | None,
    context_v: torch.Tensor | None,
    context_mask: torch.Tensor | None,
    image: torch.Tensor | None,
    sizes: tuple[int, int, int],
) -> None:
    given = {"context_k": context_k, "context_v": context_v, "context_mask": context_mask}
    names = [name for name, tensor in given.items() if tensor is not None]
    if not names:
        return
    if context_k is None or context_v is None:
        missing = "context_k" if context_k is None else "context_v"
        raise ValueError(f"{missing} is None while {names[0]} is given, expected context_k and context_v together")
    if image is not None:
        raise ValueError(
            "image is given together with context_k, expected one or the other: image frames see no context"
        )
    B, heads, dim = sizes
    if context_k.dim() != 4:
        raise ValueError(f"context_k has shape {tuple(context_k.shape)}, expected 4 dimensions [B, L, heads, dim]")
    L = context_k.shape[1]
    _check_shape("context_k", context_k, (B, L, heads, dim), "[B, L, heads, dim]")
    _check_shape("context_v", context_v, (B, L, heads, dim), "context_k's shape")
    _check_shape("context_mask", context_mask, (B, L), "[B, L]")


op.register_op(prepare)
