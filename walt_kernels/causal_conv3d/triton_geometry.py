# mypy: disable-error-code="no-untyped-def"
"""What the Triton kernels of causal_conv3d share: how output pixels read the input through taps, and their arguments.

Nothing is padded or unfolded in memory: a tap is a shift of coordinates, and padding is a rule for coordinates that
fall outside. A program stays inside one frame, so time is a scalar and its padding costs nothing a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor


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
def gather(
    x, history, h, w, t, tap, c, valid, height, width, top, left,
    x_c, x_t, x_h, x_w, past_c, past_t, past_h, past_w,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DT: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TIME: tl.constexpr, SPACE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The input that output pixels (t, h, w) see through a tap, zeros where ``valid`` is not.

    ``tap`` is one tap or, where few channels make a block of several taps, one for every channel of ``c``.
    """
    row, row_inside = source(h * SH + tap // KW % KH * DH - top, height, SPACE)
    column, column_inside = source(w * SW + tap % KW * DW - left, width, SPACE)
    frame = t * ST - (KT - 1 - tap // (KH * KW)) * DT
    inside = row_inside & column_inside & valid
    if TIME == "zeros":
        inside &= frame >= 0
    if WIDE:
        row, column, c = row.to(tl.int64), column.to(tl.int64), c.to(tl.int64)
    if TIME == "history":
        past = frame < 0
        base = tl.where(past, history, x)
        base += tl.where(past, frame + (KT - 1) * DT, frame).to(tl.int64) * tl.where(past, past_t, x_t)
        offsets = row * tl.where(past, past_h, x_h) + column * tl.where(past, past_w, x_w)
        offsets += c * tl.where(past, past_c, x_c)
    else:
        base = x + tl.maximum(frame, 0).to(tl.int64) * x_t
        offsets = row * x_h + column * x_w + c * x_c
    return tl.load(base + offsets, mask=inside, other=0.0)


def reach(tensor: Tensor | None) -> int:
    """The largest offset of an element."""
    if tensor is None:
        return 0
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size)


def wide(*tensors: Tensor | None) -> bool:
    """Whether offsets need 64 bits. Those of masked elements are computed, too: half the range is theirs."""
    return max(map(reach, tensors)) >= 2**30


def strides(name: str, tensor: Tensor | None, axes: str = "bcthw") -> dict[str, int]:
    """The strides of the axes that a kernel asks for, by its names for them; 0 without a tensor."""
    return {f"{name}_{axis}": 0 if tensor is None else tensor.stride("bcthw".index(axis)) for axis in axes}


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
    """Sizes and constants that all kernels take; y may be its gradient, channels are a group's."""
    names = ("KT", "KH", "KW", "ST", "SH", "SW", "DT", "DH", "DW")
    return {
        "frames_out": y.shape[2],
        "height": x.shape[3],
        "width": x.shape[4],
        "width_out": y.shape[4],
        "top": padding[0],
        "left": padding[2],
        "channels": weight.shape[1],
        "out_channels": weight.shape[0] // groups,
        **dict(zip(names, (*weight.shape[2:], *stride, *dilation), strict=True)),
        "TIME": time_padding if history is None else "history",
        "SPACE": space_padding,
    }
