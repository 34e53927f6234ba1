"""causal_conv3d and next_history: what users call. Validates, then hands over to the chosen backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._dispatch import select
from .._library import autocast, is_open, transformed
from ..values import is_int, plain
from . import op, reference
from .layout import memory_format

Padding = str | int | Sequence[int] | Sequence[Sequence[int]]

TIME_PADDING = ("zeros", "first_frame")
SPACE_PADDING = ("zeros", "replicate", "reflect")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PADDINGS = (
    "'same', an int, (ph, pw) or ((top, bottom), (left, right)) of the frame; time is always padded in front, by itself"
)


def triple(name: str, value: Any) -> tuple[int, int, int]:
    """One positive integer for time, height and width, or one for each."""
    value = plain(value)
    values = (value,) * 3 if is_int(value) else value
    if not isinstance(values, (tuple, list)) or len(values) != 3 or not all(is_int(v) for v in values):
        raise TypeError(f"{name} is {value!r}, expected an int or 3 ints (time, height, width)")
    if any(v < 1 for v in values):
        raise ValueError(f"{name} is {value!r}, expected integers of at least 1")
    return values[0], values[1], values[2]


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")
    return value


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
    pairs = [(side, side) if is_int(side) else side for side in sides] if isinstance(sides, (tuple, list)) else []
    if len(pairs) != 2 or not all(isinstance(p, (tuple, list)) and len(p) == 2 and all(map(is_int, p)) for p in pairs):
        raise TypeError(f"padding is {padding!r}, expected {PADDINGS}")
    if any(side < 0 for pair in pairs for side in pair):
        raise ValueError(f"padding is {padding!r}, expected integers of at least 0")
    return pairs[0][0], pairs[0][1], pairs[1][0], pairs[1][1]


def check_tensor(name: str, tensor: Any, rank: int, layout: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}, expected a tensor {layout}")
    if tensor.dim() != rank:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {rank} dimensions {layout}")


def check_like_x(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected x's {x.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, expected x's {x.device}")


def check_x(x: Any) -> None:
    check_tensor("x", x, 5, "[B, C, T, H, W]")
    if x.dtype not in DTYPES:
        raise TypeError(f"x has dtype {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if any(size == 0 for size in x.shape[1:]):
        raise ValueError(f"x has shape {tuple(x.shape)}, expected sizes of at least 1 (the batch may be empty)")


def check_history(history: Any, x: Tensor, frames: int) -> None:
    check_tensor("history", history, 5, "[B, C, (kt - 1) * dilation_t, H, W]")
    check_like_x("history", history, x)
    expected = (x.shape[0], x.shape[1], frames, x.shape[3], x.shape[4])
    if tuple(history.shape) != expected:
        raise ValueError(
            f"history has shape {tuple(history.shape)}, expected {expected}: "
            f"(kernel_t - 1) * dilation_t = {frames} frames of x's batch, channels and size"
        )


def check_weight(weight: Any, bias: Any, x: Tensor, groups: Any) -> None:
    check_tensor("weight", weight, 5, "[C_out, C / groups, kt, kh, kw]")
    check_like_x("weight", weight, x)
    if not is_int(groups):
        raise TypeError(f"groups is {groups!r}, expected an int")
    if groups < 1:
        raise ValueError(f"groups is {groups}, expected an integer of at least 1")
    channels, out_channels = x.shape[1], weight.shape[0]
    if channels % groups:
        raise ValueError(f"groups is {groups}, expected a divisor of x's {channels} channels")
    if out_channels % groups:
        raise ValueError(f"groups is {groups}, expected a divisor of weight's {out_channels} output channels")
    if any(size == 0 for size in weight.shape):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected sizes of at least 1")
    if weight.shape[1] != channels // groups:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and takes {weight.shape[1]} channels a group, "
            f"expected {channels // groups} (x has {channels} channels, groups is {groups})"
        )
    if bias is not None:
        check_tensor("bias", bias, 1, "[C_out]")
        check_like_x("bias", bias, x)
        if bias.shape[0] != out_channels:
            raise ValueError(f"bias has {bias.shape[0]} elements, expected weight's {out_channels} output channels")


def check_frame(
    size: Sequence[int], padding: Sequence[int], mode: str, kernel: Sequence[int], dilation: Sequence[int]
) -> None:
    for name, n, pads, k, d in zip(
        ("height", "width"), size, (padding[:2], padding[2:]), kernel, dilation, strict=True
    ):
        if mode == "reflect" and max(pads) >= n:
            raise ValueError(
                f"padding of {max(pads)} reflects more than x's {name} of {n} has; expected at most {n - 1}"
            )
        if n + sum(pads) < (k - 1) * d + 1:
            raise ValueError(
                f"weight spans {(k - 1) * d + 1} pixels of {name}, expected at most the padded frame's {n + sum(pads)}"
            )


def _prepare(
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
    check_x(x)
    groups = plain(groups)
    x, weight, bias, history = autocast(x, weight, bias, history)  # type: ignore[assignment]
    check_weight(weight, bias, x, groups)
    stride, dilation = triple("stride", stride), triple("dilation", dilation)
    choice("time_padding", time_padding, TIME_PADDING)
    choice("space_padding", space_padding, SPACE_PADDING)
    if history is not None:
        check_history(history, x, (weight.shape[2] - 1) * dilation[0])
    size, kernel = x.shape[3:], tuple(map(int, weight.shape[3:]))  # int: torch.jit.trace has tensors as sizes
    sides = resolve_padding(padding, kernel, dilation[1:])
    check_frame(size, sides, space_padding, kernel, dilation[1:])
    return {
        "x": x,
        "weight": weight,
        "bias": bias,
        "history": history,
        "stride": stride,
        "dilation": dilation,
        "padding": sides,
        "time_padding": time_padding,
        "space_padding": space_padding,
        "groups": groups,
    }


op.register_op(_prepare)


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
) -> Tensor:
    """3D convolution whose output frame i sees the input frames up to i * stride_t, and no later one.

    y[b, o, i, h, w] = bias[o] + sum over c, j, u, v of
        weight[o, c, j, u, v] * x[b, c, i*st - (kt-1-j)*dt, h*sh + u*dh - top, w*sw + v*dw - left]
    with c over the channels of o's group. Padding and history are read in place: nothing the size of x is copied.

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
    inputs = _prepare(
        x,
        weight,
        bias,
        stride=stride,
        dilation=dilation,
        padding=padding,
        time_padding=time_padding,
        space_padding=space_padding,
        history=history,
        groups=groups,
    )
    chosen = select("causal_conv3d", inputs)
    if chosen == "reference":
        return reference.causal_conv3d(**inputs)
    return torch.ops.walt_kernels.causal_conv3d(*inputs.values(), chosen)


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
    check_x(x)
    frames = (triple("kernel", kernel)[0] - 1) * triple("dilation", dilation)[0]
    choice("time_padding", time_padding, TIME_PADDING)
    if history is not None:
        check_history(history, x, frames)
    if not is_open(x.shape[2]) and x.shape[2] >= frames:
        tail = x.narrow(2, x.shape[2] - frames, frames)
    else:  # too few, or a number that an exported graph leaves open
        before = reference.past(x, frames, time_padding) if history is None else history
        tail = torch.cat([before, x], dim=2).narrow(2, x.shape[2], frames)
    return tail.clone(memory_format=torch.contiguous_format if transformed() else memory_format(x))  # as vmap needs it


__all__ = ["causal_conv3d", "next_history"]
