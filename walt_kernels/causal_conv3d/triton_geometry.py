# mypy: disable-error-code="no-untyped-def"
"""What the Triton kernels of causal_conv3d share: how output pixels read the input through taps, and their arguments.

Nothing is padded or unfolded in memory: a tap is a shift of coordinates, and padding is a rule for coordinates that
fall outside. A program stays inside one frame, so time is a scalar and its padding costs nothing a pixel.

What belongs together is a named tuple, whose items Triton specialises as it does arguments: None is a constant, so what
a kernel does not read costs it no parameter. Constants stand behind the tensors that they are added to or multiplied
with: in front of one, Triton's interpreter makes the result a constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton


class Video(NamedTuple):
    """[B, C, T, H, W]: where it begins, and its strides. ``at`` of an absent one is None."""

    at: Any
    b: int
    c: int
    t: int
    h: int | None
    w: int


class Frame(NamedTuple):
    """Rows and columns of a frame, and how many are padded in front of them."""

    height: int
    width: int
    top: int
    left: int


class Output(NamedTuple):
    """Frames of the output (or its gradient), their rows and columns, and the pixels of one."""

    frames: int
    height: int | None
    width: int
    pixels: int | None


class Convolution(NamedTuple):
    """Kernel size, stride and dilation: constants of a kernel."""

    KT: Any
    KH: Any
    KW: Any
    ST: Any
    SH: Any
    SW: Any
    DT: Any
    DH: Any
    DW: Any


@triton.jit
def source(position, size, MODE: tl.constexpr):
    """The row (or column) that a position of the padded frame copies, and whether there is one."""
    if MODE == "replicate":
        position = tl.minimum(tl.maximum(position, 0), size - 1)
    elif MODE == "reflect":
        position = tl.abs(position)
        position = tl.where(position >= size, 2 * (size - 1) - position, position)
    return position, (position >= 0) & (position < size)


@triton.jit
def oriented(vector, FIRST: tl.constexpr):
    """A vector as a column (``FIRST``) or as a row of a tile."""
    if FIRST:
        return vector[:, None]
    else:
        return vector[None, :]


@triton.jit
def moved(x, by):
    """Where x begins, ``by`` elements further; 0 of an absent tensor, to which more may be added."""
    pointer = 0
    if x.at is not None:
        pointer = x.at + by
    return pointer


@triton.jit
def gather(
    from_x, from_history, h, w, t, tap, c, valid, x, history, frame, conv,
    TIME: tl.constexpr, SPACE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The input that output pixels (t, h, w) see through a tap, zeros where ``valid`` is not.

    ``from_x`` and ``from_history`` are where the channels of a sample and group begin. ``tap`` is one tap or, where few
    channels make a block of several taps, one for every channel of ``c``.
    """
    row, row_inside = source(h * conv.SH + tap // conv.KW % conv.KH * conv.DH - frame.top, frame.height, SPACE)
    column, column_inside = source(w * conv.SW + tap % conv.KW * conv.DW - frame.left, frame.width, SPACE)
    t = t * conv.ST - (conv.KT - 1 - tap // (conv.KH * conv.KW)) * conv.DT
    inside = row_inside & column_inside & valid
    if TIME == "zeros":
        inside &= t >= 0
    if WIDE:
        row, column, c = row.to(tl.int64), column.to(tl.int64), c.to(tl.int64)
    if TIME == "history":
        past = t < 0
        base = tl.where(past, from_history, from_x)
        base += tl.where(past, t + (conv.KT - 1) * conv.DT, t).to(tl.int64) * tl.where(past, history.t, x.t)
        offsets = row * tl.where(past, history.h, x.h) + column * tl.where(past, history.w, x.w)
        offsets += c * tl.where(past, history.c, x.c)
    else:
        base = from_x + tl.maximum(t, 0).to(tl.int64) * x.t
        offsets = row * x.h + column * x.w + c * x.c
    return tl.load(base + offsets, mask=inside, other=0.0)


def reach(tensor: Tensor | None) -> int:
    """The largest offset of an element."""
    if tensor is None:
        return 0
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size)


def wide(*tensors: Tensor | None) -> bool:
    """Whether offsets need 64 bits. Those of masked elements are computed, too: half the range is theirs."""
    return max(map(reach, tensors)) >= 2**30


def strided(tensor: Tensor | None) -> Video:
    """A tensor, or None, and its strides."""
    return Video(None, 0, 0, 0, 0, 0) if tensor is None else Video(tensor, *tensor.stride())


def convolution(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int] = (1, 1, 1)) -> Any:
    return _triton.constants(Convolution(*kernel, *stride, *dilation))


def geometry(
    x: Tensor,
    weight: Tensor,
    history: Tensor | None,
    y: Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_padding: str,
    space_padding: str,
    groups: int,
) -> dict[str, Any]:
    """What all kernels take; y may be its gradient, channels are a group's."""
    return {
        "frame": Frame(x.shape[3], x.shape[4], padding[0], padding[2]),
        "output": Output(y.shape[2], y.shape[3], y.shape[4], None),
        "channels": weight.shape[1],
        "out_channels": weight.shape[0] // groups,
        "conv": convolution(weight.shape[2:], stride, dilation),
        "TIME": time_padding if history is None else "history",
        "SPACE": space_padding,
    }
