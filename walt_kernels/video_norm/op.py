"""video_norm: what users read of it, the checks of a call, and what it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import _native, _triton
from .._checks import (
    check_dtype,
    check_same_device,
    check_shape,
    check_tensor,
    choice,
    fits,
    one_dtype,
    positive,
    positive_number,
    shape_error,
)
from .._define import define_op
from .._dispatch import Backend
from . import native, reference
from .defaults import DEFAULTS
from .layout import gradients_like, outputs_like

OVER = ("frame", "clip", "pixel")
ACTIVATIONS = ("silu",)


def _sample(tensor: Callable[..., Tensor], batch: int) -> dict[str, Any]:
    rows = {"weight": tensor(32), "bias": tensor(32), "scale": tensor(batch, 32, 5), "shift": tensor(batch, 32, 5)}
    return {"x": tensor(batch, 32, 5, 8, 8), **rows, "groups": 8, "activation": "silu"}


@define_op(
    reference.video_norm,
    returns=("y", "mean", "rstd"),
    outputs=outputs_like,
    differentiable=("x", "weight", "bias", "scale", "shift"),
    gradients=gradients_like,
    unread=("y", "eps"),
    backends=(
        _triton.backend(__package__),
        Backend("cpu", _native.unsupported, native.forward, native.backward),
    ),
    sample=_sample,
    defaults=DEFAULTS,
)
def video_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    over: str = "frame",
    groups: int = 1,
    center: bool = True,
    eps: float = 1e-6,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
) -> dict[str, Any]:
    """Normalises a video, modulates it and activates it, in one pass: the norms of causal video autoencoders.

    ``rstd = 1 / sqrt(variance + eps)``, ``y = act(((x - mean) * rstd * weight + bias) * (1 + scale) + shift)``, with
    mean and variance over a group of C / groups channels and

    - ``over="frame"``: H and W of one frame. Causal: a chunk of a video, or an image, has the bits of the whole.
    - ``over="clip"``: T, H and W, as ``nn.GroupNorm`` does.
    - ``over="pixel"``: nothing else, so one position (groups is 1). Causal as well.

    Without ``center`` the mean counts as 0, which is RMS norm. ``F.normalize(x, dim=1) * sqrt(C) * weight``, the norm
    of Wan's autoencoder, is ``over="pixel", center=False, eps=1e-24 / C``.

    Args:
        x: ``[B, C, T, H, W]``, float32, bfloat16, float16 or float64; contiguous, channels_last_3d or frames of such
            tensors; others are copied.
        weight, bias: ``[C]`` or None (1 and 0).
        over: see above.
        groups: number of groups of channels, a divisor of C.
        center: whether the mean is subtracted.
        eps: added to the variance.
        scale, shift: ``[B, C]``, or ``[B, C, T]`` with a value for each frame, or None (0).
        activation: "silu" or None.

    weight, bias, scale and shift have one dtype: x's, or float32 when x has 16 bits.

    Returns:
        ``[B, C, T, H, W]`` in x's dtype, also under autocast, and memory format. Statistics and everything up to y are
        float32 (float64 for float64); y is rounded once. Gradients for all five tensors, deterministic; x is all of
        its size that is saved for them.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Source: MAGVIT-v2 (norms of single frames in a causal tokenizer; W.A.L.T, section 3.1).
    """
    check_tensor("x", x, "[B, C, T, H, W]")
    check_dtype("x", x)
    B, C, T, H, W = x.shape
    if 0 in (C, T, H, W):
        raise shape_error("x", x, "sizes of at least 1 (the batch may be empty)")
    choice("over", over, OVER)
    groups = positive("groups", groups)
    if C % groups:
        raise ValueError(f"groups is {groups}, expected a divisor of x's {C} channels")
    if over == "pixel" and groups != 1:
        raise ValueError(f"groups is {groups}, expected 1 over the channels of a pixel")
    if not isinstance(center, bool):
        raise TypeError(f"center is {center!r}, expected True or False")
    if activation is not None:
        choice("activation", activation, ACTIVATIONS)
    rows: dict[str, Tensor | None] = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
    given = {name: tensor for name, tensor in rows.items() if tensor is not None}
    for name, tensor in given.items():
        per_frame = name in ("scale", "shift")
        if fits(tensor, (B, C, T) if per_frame else (C,), x):
            continue
        check_tensor(name, tensor, "[B, C] or [B, C, T]" if per_frame else "[C]", (2, 3) if per_frame else ())
        check_dtype(name, tensor)
        check_same_device(name, tensor, "x", x)
        if per_frame and tensor.dim() == 3:
            check_shape(name, tensor, (B, C, T), "[B, C, T] as in x")
        else:
            check_shape(name, tensor, (B, C) if per_frame else (C,), "[B, C] as in x" if per_frame else "[C] as in x")
    if given:
        rows |= one_dtype(x, given)
    options = {"over": over, "groups": groups, "center": center, "eps": positive_number("eps", eps)}
    return {"x": x, **rows, **options, "activation": activation}
