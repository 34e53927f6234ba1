"""window_attention: what users read of it, the checks of a call, and what it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton
from .._checks import (
    DTYPES,
    check_dtype,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    number,
    shape_error,
    three,
)
from .._define import define_op
from .._dispatch import Backend
from .._library import autocast
from . import flash, native, reference
from .defaults import DEFAULTS
from .layout import outputs_like

NARROW = tuple(dtype for dtype in DTYPES if dtype != torch.float64)  # of the table and the norms
WIDE = (torch.float64,)
DIFFERENTIABLE = ("q", "k", "v", "bias_table", "q_norm", "k_norm", "context_k", "context_v")

BACKWARD = 2.5  # times the FLOPs of the forward pass: 5 products for 2, since the scores are computed again


def flops(q: Sequence[int], window: Sequence[int], context: int = 0) -> int:
    """Of the forward pass, by q's shape and the length of the context; images count as video, shapes don't tell."""
    batch, *sizes, heads, dim = q
    squares = [size // extent * extent**2 + (size % extent) ** 2 for size, extent in zip(sizes, window, strict=True)]
    pairs = math.prod(squares) + math.prod(sizes) * context  # of a token and a key that it sees
    return 4 * batch * heads * dim * pairs


def _forward_flops(q: Sequence[int], window: Sequence[int], context_k: Sequence[int] | None) -> int:
    return flops(q, window, 0 if context_k is None else context_k[1])


def _backward_flops(q: Sequence[int], window: Sequence[int], context_k: Sequence[int] | None) -> int:
    return int(BACKWARD * _forward_flops(q, window, context_k))


def _sample(tensor: Callable[..., Tensor], batch: int) -> dict[str, Any]:
    q, k, v = (tensor(batch, 5, 8, 8, 2, 64) for _ in range(3))
    norms = {"q_norm": tensor(64), "k_norm": tensor(64)}
    return {"q": q, "k": k, "v": v, "window": (5, 4, 4), "bias_table": tensor(2, 9, 7, 7), **norms}


@define_op(
    reference.window_attention,
    returns=("out", "lse"),
    outputs=outputs_like,
    differentiable=DIFFERENTIABLE,
    flops=(_forward_flops, _backward_flops),
    backends=(
        Backend("flash", flash.unsupported, flash.window_attention, opt_in=flash.OPT_IN),
        _triton.backend(__package__),
        Backend("cpu", _native.unsupported, native.forward, native.backward),
    ),
    sample=_sample,
    defaults=DEFAULTS,
)
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Sequence[int],
    bias_table: Tensor | None = None,
    image: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    context_k: Tensor | None = None,
    context_v: Tensor | None = None,
    context_mask: Tensor | None = None,
    scale: float | None = None,
) -> dict[str, Any]:
    """Attention inside non-overlapping windows of a video (W.A.L.T, section 3.2; the bias is Swin's).

    In one window and one head, with q, k and v ``[N, dim]`` of the window's tokens, and the place (t, h, w) of each::

        bias[i, j] = bias_table[head][tuple(place[i] - place[j] + window - 1)]
        q = F.layer_norm(q, (dim,), q_norm, eps=norm_eps)
        k = F.layer_norm(k, (dim,), k_norm, eps=norm_eps)
        out = torch.softmax(scale * q @ k.T + bias, dim=-1) @ v

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
    check_tensor("q", q)
    device = q.device
    parameters = ("bias_table", bias_table), ("q_norm", q_norm), ("k_norm", k_norm)
    masks = ("image", image), ("context_mask", context_mask)
    given: Sequence[tuple[str, Any]] = (
        ("k", k),
        ("v", v),
        ("context_k", context_k),
        ("context_v", context_v),
        *parameters,
        *masks,
    )
    for name, tensor in given:
        if tensor is None and name not in ("k", "v"):
            continue
        if not isinstance(tensor, Tensor) or tensor.device != device:
            check_tensor(name, tensor)
            check_same_device(name, tensor, "q", q)
    q, k, v, context_k, context_v = autocast(q, k, v, context_k, context_v)  # type: ignore[assignment]
    check_dtype("q", q)
    dtype = q.dtype
    for name, tensor in (("k", k), ("v", v), ("context_k", context_k), ("context_v", context_v)):
        if tensor is not None and tensor.dtype is not dtype:
            check_same_dtype(name, tensor, "q", q)
    for name, tensor in parameters:
        if tensor is not None and tensor.dtype is not dtype:
            check_dtype(name, tensor, WIDE if dtype is torch.float64 else NARROW)
    for name, tensor in masks:
        if tensor is not None:
            check_dtype(name, tensor, (torch.bool,))
    check_tensor("q", q, "[B, T, H, W, heads, dim]")
    shape = q.shape
    B, T, H, W, heads, dim = shape
    if 0 in (T, H, W, heads):  # one by one: min() would put their order into an exported graph
        raise shape_error("q", q, "at least one frame, row, column and head")
    if not 8 <= dim <= 256:
        raise ValueError(f"q has dim {dim} in its last dimension, expected 8 to 256")
    check_shape("k", k, shape, "q's shape")
    check_shape("v", v, shape, "q's shape")
    extent = t, h, w = three("window", window, "(t, h, w)")
    if bias_table is not None:
        check_shape("bias_table", bias_table, (heads, 2 * t - 1, 2 * h - 1, 2 * w - 1), "[heads, 2t-1, 2h-1, 2w-1]")
    check_shape("q_norm", q_norm, (dim,), "[dim]")
    check_shape("k_norm", k_norm, (dim,), "[dim]")
    norm_eps = number("norm_eps", norm_eps)
    if not norm_eps >= 0:
        raise ValueError(f"norm_eps is {norm_eps}, expected a number >= 0")
    if context_k is not None or context_v is not None or context_mask is not None:
        _check_context(context_k, context_v, context_mask, image, (B, heads, dim))
    if image is not None:
        if image.dim() not in (1, 2) or image.shape[0] != B or image.shape[1:] not in ((), (T,)):
            raise shape_error("image", image, f"[B] = ({B},) or [B, T] = ({B}, {T})")
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
        "norm_eps": norm_eps,
        "context_k": context_k,
        "context_v": context_v,
        "context_mask": context_mask,
        "scale": dim**-0.5 if scale is None else number("scale", scale),
    }


def _check_context(
    context_k: Tensor | None,
    context_v: Tensor | None,
    context_mask: Tensor | None,
    image: Tensor | None,
    sizes: tuple[int, int, int],
) -> None:
    given = {"context_k": context_k, "context_v": context_v, "context_mask": context_mask}
    names = [name for name, tensor in given.items() if tensor is not None]
    if context_k is None or context_v is None:
        missing = "context_k" if context_k is None else "context_v"
        raise ValueError(f"{missing} is None while {names[0]} is given, expected context_k and context_v together")
    if image is not None:
        raise ValueError(
            "image is given together with context_k, expected one or the other: image frames see no context"
        )
    B, heads, dim = sizes
    check_tensor("context_k", context_k, "[B, L, heads, dim]")
    L = context_k.shape[1]
    check_shape("context_k", context_k, (B, L, heads, dim), "[B, L, heads, dim]")
    check_shape("context_v", context_v, (B, L, heads, dim), "context_k's shape")
    check_shape("context_mask", context_mask, (B, L), "[B, L]")
