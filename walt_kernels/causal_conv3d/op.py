"""causal_conv3d and next_history: what users read of them, the checks of a call, and what the op is made of."""

from __future__ import annotations

import math
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
    choice,
    positive,
    shape_error,
    triple,
)
from .._define import define_op
from .._dispatch import Backend
from .._layout import memory_format
from .._library import autocast, is_open, transformed
from ..values import is_int, plain
from . import cudnn, native, onednn, reference
from .defaults import DEFAULTS
from .layout import gradients_like, output_like

Padding = str | int | Sequence[int] | Sequence[Sequence[int]]

TIME_PADDING = ("zeros", "first_frame")
SPACE_PADDING = ("zeros", "replicate", "reflect")
PADDINGS = (
    "'same', an int (0 for none), (ph, pw) or ((top, bottom), (left, right)) of the frame; "
    "time is always padded in front, by itself"
)

BACKWARD = 2.0  # times the FLOPs of the forward pass: the gradients of x and of weight


def flops(y: Sequence[int], weight: Sequence[int]) -> int:
    """Of the forward pass, by the shapes of y and weight."""
    return 2 * math.prod(y) * math.prod(weight[1:])


def _backward_flops(grad_y: Sequence[int], weight: Sequence[int], wanted: Sequence[bool]) -> int:
    of_x, of_weight, _, of_history = wanted
    return flops(grad_y, weight) * ((of_x or of_history) + of_weight)


def _tangent(run: Callable[..., Tensor], inputs: dict[str, Any], tangents: dict[str, Tensor | None]) -> tuple[Tensor]:
    """The convolution is linear in x with its history, and in weight with bias."""

    def along(name: str) -> Tensor | None:
        if tangents[name] is None and inputs[name] is not None:
            return torch.zeros_like(inputs[name])
        return tangents[name]

    terms = []
    if tangents["x"] is not None or tangents["history"] is not None:
        terms.append(run(inputs | {"x": along("x"), "history": along("history"), "bias": None}))
    if tangents["weight"] is not None or tangents["bias"] is not None:
        terms.append(run(inputs | {"weight": along("weight"), "bias": tangents["bias"]}))
    return (terms[0] if len(terms) == 1 else terms[0] + terms[1],)


def _sample(tensor: Callable[..., Tensor], batch: int) -> dict[str, Any]:
    return {"x": tensor(batch, 16, 5, 8, 8), "weight": tensor(32, 16, 3, 3, 3), "bias": tensor(32)}


@define_op(
    reference.causal_conv3d,
    returns=("y",),
    outputs=output_like,
    differentiable=("x", "weight", "bias", "history"),
    gradients=gradients_like,
    unread=("bias", "y"),
    tangent=_tangent,
    flops=(flops, _backward_flops),
    backends=(
        _triton.backend(__package__),
        cudnn.backend(),
        onednn.backend(),
        Backend("cpu", _native.unsupported, native.forward, native.backward),
    ),
    sample=_sample,
    defaults=DEFAULTS,
)
def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    padding: Padding = "same",
    time_padding: str = "zeros",
    space_padding: str = "zeros",
    history: Tensor | None = None,
    groups: int = 1,
) -> dict[str, Any]:
    """3D convolution whose output frame i sees the input frames up to i * stride_t, and no later one.

    y[b, o, i, h, w] = bias[o] + sum over c, j, u, v of
        weight[o, c, j, u, v] * x[b, c, i*st - (kt-1-j)*dt, h*sh + u*dh - top, w*sw + v*dw - left]
    with c over the channels of o's group. Padding and history are read in place: nothing the size of x is copied
    (but by the backends ``onednn``, which keeps a copy for the backward pass, and ``cudnn`` outside channels_last_3d).

    Args:
        x: [B, C, T, H, W], float32, bfloat16, float16 or float64, any strides. B may be 0.
        weight: [C_out, C / groups, kt, kh, kw], the layout of ``nn.Conv3d``; x's dtype.
        bias: [C_out] or None; x's dtype.
        stride: int or (time, height, width).
        dilation: int or (time, height, width).
        padding: of the frame; time is always padded by (kt-1)*dt frames in front. "same" gives ceil(H / sh) rows:
            (kh-1)*dh // 2 rows on top and the rest of (kh-1)*dh below, so an even kernel gets the larger half below.
            Or an int, (ph, pw), or ((top, bottom), (left, right)).
        time_padding: what stands before frame 0 when there is no history: "zeros" or copies of the "first_frame".
        space_padding: "zeros", "replicate" or "reflect" (without repeating the edge).
        history: [B, C, (kt-1)*dt, H, W], the frames before x, from ``next_history``. It takes the place of time
            padding, so ``time_padding`` says only what the first chunk starts from.
        groups: splits channels as ``nn.Conv3d`` does.

    Returns:
        [B, C_out, ceil(T / st), H', W'] in x's dtype, channels_last_3d where x is. Products are summed in float32
        (float64 for float64). Differentiable once in x, weight, bias and history, in reverse and in forward mode.

    Raises:
        ValueError, TypeError: an argument that does not fit; the text names it.

    Source: W.A.L.T, section 3.1, and MAGVIT-v2 (causal tokenizer).
    """
    _check_x(x)
    x, weight, bias, history = autocast(x, weight, bias, history)  # type: ignore[assignment]
    groups = positive("groups", groups)
    _check_weight(weight, bias, x, groups)
    stride, dilation = triple("stride", stride), triple("dilation", dilation)
    choice("time_padding", time_padding, TIME_PADDING)
    choice("space_padding", space_padding, SPACE_PADDING)
    if history is not None:
        _check_history(history, x, (weight.shape[2] - 1) * dilation[0])
    (*_, H, W), (*_, kh, kw) = x.shape, weight.shape
    kh, kw, dh, dw = int(kh), int(kw), *dilation[1:]  # int: torch.jit.trace has tensors as sizes
    top, bottom, left, right = resolve_padding(padding, (kh, kw), (dh, dw))
    _check_side("height", H, top, bottom, space_padding, (kh - 1) * dh + 1)
    _check_side("width", W, left, right, space_padding, (kw - 1) * dw + 1)
    return {
        "x": x,
        "weight": weight,
        "bias": bias,
        "history": history,
        "stride": stride,
        "dilation": dilation,
        "padding": (top, bottom, left, right),
        "time_padding": time_padding,
        "space_padding": space_padding,
        "groups": groups,
    }


def same_padding(kernel: int, dilation: int) -> tuple[int, int]:
    """Padding on both sides for ceil(size / stride) outputs, whatever the size and the stride. See causal_conv3d."""
    reach = (kernel - 1) * dilation
    return reach // 2, reach - reach // 2


def resolve_padding(padding: Padding, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, int, int, int]:
    """(top, bottom, left, right), whatever way ``padding`` was given. The sequences are (height, width)."""
    if isinstance(padding, str):
        if padding != "same":
            raise ValueError(f"padding is {padding!r}, expected {PADDINGS}")
        return *same_padding(kernel[0], dilation[0]), *same_padding(kernel[1], dilation[1])
    padding = plain(padding)
    sides = (padding, padding) if is_int(padding) else padding
    if isinstance(sides, (tuple, list)) and len(sides) == 3 and all(map(is_int, sides)):  # as nn.Conv3d has it
        frame = f"expected {tuple(sides[1:])}, of the frame; time is always padded in front, by itself"
        raise TypeError(f"padding is {padding!r}, {frame}")
    pairs = [(side, side) if is_int(side) else side for side in sides] if isinstance(sides, (tuple, list)) else []
    if len(pairs) != 2 or not all(isinstance(p, (tuple, list)) and len(p) == 2 and all(map(is_int, p)) for p in pairs):
        raise TypeError(f"padding is {padding!r}, expected {PADDINGS}")
    if any(side < 0 for pair in pairs for side in pair):
        raise ValueError(f"padding is {padding!r}, expected integers of at least 0")
    return pairs[0][0], pairs[0][1], pairs[1][0], pairs[1][1]


def _check_x(x: Any) -> None:
    check_tensor("x", x, "[B, C, T, H, W]")
    check_dtype("x", x)
    if 0 in x.shape[1:]:
        raise shape_error("x", x, "sizes of at least 1 (the batch may be empty)")


def _check_like_x(name: str, tensor: Any, x: Tensor, layout: str) -> None:
    dims = layout.count(",") + 1
    if (
        not isinstance(tensor, Tensor)
        or tensor.dim() != dims
        or tensor.dtype is not x.dtype
        or tensor.device != x.device
    ):
        check_tensor(name, tensor, layout)
        check_same_dtype(name, tensor, "x", x)
        check_same_device(name, tensor, "x", x)


def _check_history(history: Any, x: Tensor, frames: int) -> None:
    _check_like_x("history", history, x, "[B, C, (kt - 1) * dilation_t, H, W]")
    shape = (*x.shape[:2], frames, *x.shape[3:])
    check_shape("history", history, shape, "(kernel_t - 1) * dilation_t frames of x's batch, channels and size")


def _check_weight(weight: Any, bias: Any, x: Tensor, groups: int) -> None:
    _check_like_x("weight", weight, x, "[C_out, C / groups, kt, kh, kw]")
    channels, (out_channels, taken, *kernel) = x.shape[1], weight.shape
    if channels % groups:
        raise ValueError(f"groups is {groups}, expected a divisor of x's {channels} channels")
    if out_channels % groups:
        raise ValueError(f"groups is {groups}, expected a divisor of weight's {out_channels} output channels")
    if 0 in (out_channels, taken, *kernel):
        raise shape_error("weight", weight, "sizes of at least 1")
    if taken != channels // groups:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and takes {taken} channels a group, "
            f"expected {channels // groups} (x has {channels} channels, groups is {groups})"
        )
    if bias is not None:
        _check_like_x("bias", bias, x, "[C_out]")
        if bias.shape[0] != out_channels:
            raise ValueError(f"bias has {bias.shape[0]} elements, expected weight's {out_channels} output channels")


def _check_side(name: str, size: int, before: int, after: int, mode: str, spans: int) -> None:
    if mode == "reflect" and (most := max(before, after)) >= size:
        raise ValueError(f"padding of {most} reflects more than x's {name} of {size} has; expected at most {size - 1}")
    if size + before + after < spans:
        padded = size + before + after
        raise ValueError(f"weight spans {spans} pixels of {name}, expected at most the padded frame's {padded}")


def next_history(
    x: Tensor,
    history: Tensor | None,
    kernel: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    *,
    time_padding: str = "zeros",
) -> Tensor:
    """The last (kt-1)*dt frames of everything seen up to x: the ``history`` of the chunk after x.

    Chunked and whole convolutions agree:

    >>> history = None
    >>> for chunk in x.split(4, dim=2):
    ...     y = causal_conv3d(chunk, weight, history=history)
    ...     history = next_history(chunk, history, weight.shape[2:])

    With a stride in time, a convolution's output frames sit at input frames 0, st, 2 st, ... of the whole stream, so a
    chunk given to ``causal_conv3d`` must start at one of them: make chunk lengths multiples of st. Where they are not
    (1 + 4k frames cut into 1, 4, 4, ... with st = 2 or 4) the first st - 1 frames of the later chunks complete no
    window; push them into the history:

    >>> skipped, chunk = chunk[:, :, : st - 1], chunk[:, :, st - 1 :]
    >>> history = next_history(skipped, history, weight.shape[2:])
    >>> y = causal_conv3d(chunk, weight, stride=(st, 2, 2), history=history)
    >>> history = next_history(chunk, history, weight.shape[2:])

    Args:
        x: [B, C, T, H, W], the chunk just seen.
        history: [B, C, (kt-1)*dt, H, W], the history x was given, or None for the first chunk.
        kernel: the kernel's size, int or (time, height, width); only time matters.
        dilation: int or (time, height, width); only time matters.
        time_padding: what stands before the first chunk ("zeros" or "first_frame"), as given to ``causal_conv3d``.

    Returns:
        [B, C, (kt-1)*dt, H, W], a copy that does not keep x alive; differentiable.
    """
    _check_x(x)
    frames = (triple("kernel", kernel)[0] - 1) * triple("dilation", dilation)[0]
    choice("time_padding", time_padding, TIME_PADDING)
    if history is not None:
        _check_history(history, x, frames)
    if not is_open(x.shape[2]) and x.shape[2] >= frames:
        tail = x.narrow(2, x.shape[2] - frames, frames)
    else:  # too few, or a number that an exported graph leaves open
        before = reference.past(x, frames, time_padding) if history is None else history
        tail = torch.cat([before, x], dim=2).narrow(2, x.shape[2], frames)
    return tail.clone(memory_format=torch.contiguous_format if transformed() else memory_format(x))  # as vmap needs it
