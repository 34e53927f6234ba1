# mypy: disable-error-code="no-untyped-def"
"""Gradients of causal_conv3d's input and history in Triton: rows are input pixels, sums go over (tap, output channel).

A pixel collects what every position of the padded frame that copies it sends back. Most pixels are seen in one place;
those at the edge of replicated or reflected frames have copies in the padding, and frame 0 may have them in time.
Copies are visited one after another, in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .triton_geometry import geometry, moved, oriented, strided, wide
from .triton_order import by_tap
from .triton_patch import convolve, takes
from .triton_tiles import PIXELS, data_key


class Piece(NamedTuple):
    """A rectangle of a frame: its first row and column, and how many of them."""

    row: int
    column: int
    rows: int
    columns: int


class Edge(NamedTuple):
    """How many copies a row and a column may have, itself included, and how many are padded behind the last."""

    copies_h: int
    copies_w: int
    bottom: int
    right: int


class Steps(NamedTuple):
    """How far apart the taps lie through which a position is seen: constants of a kernel."""

    T: Any
    H: Any
    W: Any


@triton.jit
def copy_of(position, number, low, high, size, before, after, MODE: tl.constexpr):
    """Where the padding's ``number``-th copy of a row (or column) would be, and whether there is one; 0 is itself.

    Of positions from ``low`` to ``high``; the third and fourth result are between what rows of the padded frame their
    copies lie.
    """
    if MODE == "replicate":  # one copy of the first row for each of ``before``, then of the last row
        first = number <= before
        place = tl.where(first, -number, size - 1 + number - before)
        copied = position == tl.where(first, 0, size - 1)
        place_low, place_high = place, place
    else:  # 1 reflects at the first row, 2 at the last
        first = number == 1
        place = tl.where(first, -position, 2 * (size - 1) - position)
        copied = (position < size - 1) & (position >= size - 1 - after)
        copied = tl.where(first, (position > 0) & (position <= before), copied)
        place_low, place_high = tl.where(first, -before, size), tl.where(first, -1, size - 1 + after)
    itself = number == 0
    place, copied = tl.where(itself, position, place), itself | copied
    low, high = tl.where(itself, low, place_low), tl.where(itself, high, place_high)
    return place, copied, low + before, high + before


@triton.jit
def taps_of(position, last, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BOUNDED: tl.constexpr):
    """First tap and number of taps through which a position is seen. They lie S / gcd(S, D) apart.

    Output i sees the padded position i S + u D through tap u; ``BOUNDED``: only by outputs 0 to ``last``.
    """
    first = K
    count = 0
    for i in tl.static_range(K):
        u = K - 1 - i
        distance = position - u * D
        seen = distance % S == 0
        if BOUNDED:
            seen &= (distance >= 0) & (distance <= last * S)
        first = tl.where(seen, u, first)
        count += seen.to(tl.int32)
    return first, count


@triton.jit
def taps_between(low, high, last, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr):
    """First tap and number of taps through which outputs 0 to ``last`` see any position from ``low`` to ``high``."""
    first = tl.cdiv(tl.maximum(low - last * S, 0), D)
    return first, tl.maximum(tl.minimum(high // D + 1, K) - first, 0)


@triton.jit
def gather_sent(from_grad, h, w, last_seer, tap, o, valid, grad, output, conv, WIDE: tl.constexpr):
    """What position (h, w) of the padded frame gets back through each tap of ``tap``, zeros where ``valid`` is not.

    ``from_grad`` is where the channels of a sample and group begin, ``last_seer`` the frame that sees the position's
    frame through tap 0, times ST.
    """
    from_t = last_seer - tap // (conv.KH * conv.KW) * conv.DT
    from_h, from_w = h - tap // conv.KW % conv.KH * conv.DH, w - tap % conv.KW * conv.DW
    t, row, column = from_t // conv.ST, from_h // conv.SH, from_w // conv.SW
    inside = (from_t >= 0) & (t < output.frames) & (from_h >= 0) & (row < output.height)
    inside = inside & (from_w >= 0) & (column < output.width)
    if conv.ST * conv.SH * conv.SW > 1:
        inside &= (from_t % conv.ST == 0) & (from_h % conv.SH == 0) & (from_w % conv.SW == 0)
    if WIDE:
        t, row, column, o = t.to(tl.int64), row.to(tl.int64), column.to(tl.int64), o.to(tl.int64)
    offsets = t * grad.t + row * grad.h + column * grad.w + o * grad.c
    return tl.load(from_grad + offsets, mask=inside & valid, other=0.0)


@triton.jit
def conv_data_kernel(
    grad, weight, dx, frames, first_frame, piece, edge, output, frame, channels, out_channels, conv, steps,
    TIME: tl.constexpr, SPACE: tl.constexpr, EDGE: tl.constexpr, LAST: tl.constexpr, FOLD: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M pixels of a rectangle of an input frame and BLOCK_N channels of a group.

    ``EDGE``: the rectangle's pixels have copies. Otherwise a program takes pixels one stride apart, which are seen
    through the same taps (``steps`` apart), and visits no other taps. ``LAST``: channels are grad's innermost
    dimension. ``FOLD``: a block of the sum holds output channels of several taps.
    """
    program, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    APART_H: tl.constexpr = 1 if EDGE or FOLD else conv.SH
    APART_W: tl.constexpr = 1 if EDGE or FOLD else conv.SW
    rows_apart, columns_apart = tl.cdiv(piece.rows, APART_H), tl.cdiv(piece.columns, APART_W)
    tiles_n = tl.cdiv(channels, BLOCK_N)
    tiles_m = tl.cdiv(rows_apart * columns_apart, BLOCK_M)
    tile_n, program = program % tiles_n, program // tiles_n
    tile_m, program = program % tiles_m, program // tiles_m
    phase, program = program % (APART_H * APART_W), program // (APART_H * APART_W)
    b, t = (program // frames).to(tl.int64), program % frames + first_frame

    row_phase, column_phase = piece.row + phase // APART_W, piece.column + phase % APART_W
    pixel = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    h = pixel // columns_apart * APART_H + row_phase
    w = pixel % columns_apart * APART_W + column_phase
    seen = (h < piece.row + piece.rows) & (w < piece.column + piece.columns)
    c = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c_at = c
    if WIDE:
        c_at = c.to(tl.int64)
    TAPS: tl.constexpr = conv.KT * conv.KH * conv.KW
    from_grad = moved(grad, b * grad.b + group * out_channels * grad.c)
    weight += group * out_channels * TAPS * channels

    copies = 1
    if EDGE:
        copies = edge.copies_h * edge.copies_w
    copies_t = 1
    if TIME == "first_frame":
        copies_t = tl.where(t == 0, (conv.KT - 1) * conv.DT + 1, 1)
    blocks = tl.cdiv(out_channels, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for number in range(copies * copies_t):
        # The frame that sees this one through tap 0, times ST.
        last_seer = t - number // copies + (conv.KT - 1) * conv.DT
        j_first, j_count = taps_of(last_seer, output.frames - 1, conv.KT, conv.ST, conv.DT, True)
        if EDGE:
            row_end, column_end = piece.row + piece.rows - 1, piece.column + piece.columns - 1
            place_h, copied_h, low, high = copy_of(
                h, number % copies // edge.copies_w, piece.row, row_end, frame.height, frame.top, edge.bottom, SPACE
            )
            u_first, u_count = taps_between(low, high, output.height - 1, conv.KH, conv.SH, conv.DH)
            place_w, copied_w, low, high = copy_of(
                w, number % edge.copies_w, piece.column, column_end, frame.width, frame.left, edge.right, SPACE
            )
            v_first, v_count = taps_between(low, high, output.width - 1, conv.KW, conv.SW, conv.DW)
            copied = copied_h & copied_w & seen
            j_count *= tl.max(copied.to(tl.int32), 0)
        else:
            place_h, place_w, copied = h, w, seen
            u_first, u_count = taps_of(row_phase + frame.top, 0, conv.KH, conv.SH, conv.DH, False)
            v_first, v_count = taps_of(column_phase + frame.left, 0, conv.KW, conv.SW, conv.DW, False)
        place_h, place_w = oriented(place_h + frame.top, LAST), oriented(place_w + frame.left, LAST)
        copied = oriented(copied, LAST)
        if FOLD:
            for step in range(tl.where(j_count > 0, tl.cdiv(out_channels * TAPS, BLOCK_K), 0)):
                k = step * BLOCK_K + tl.arange(0, BLOCK_K)
                valid = k < out_channels * TAPS
                tap, o = k // out_channels, k % out_channels
                sent = gather_sent(
                    from_grad, place_h, place_w, last_seer, oriented(tap, not LAST), oriented(o, not LAST),
                    copied & oriented(valid, not LAST), grad, output, conv, WIDE,
                )  # fmt: skip
                if not LAST:
                    sent = tl.trans(sent)
                offsets = ((o * TAPS + tap) * channels)[:, None] + c_at[None, :]
                filters = tl.load(weight + offsets, mask=valid[:, None] & (c < channels)[None, :], other=0.0)
                acc = tl.dot(sent, filters, acc, input_precision="ieee")
        else:
            for step in range(j_count * u_count * v_count * blocks):
                tap = step // blocks
                v = v_first + tap % v_count * (1 if EDGE else steps.W)
                u = u_first + tap // v_count % u_count * (1 if EDGE else steps.H)
                j = j_first + tap // (v_count * u_count) * steps.T
                from_h, from_w = place_h - u * conv.DH, place_w - v * conv.DW
                h_out, w_out = from_h // conv.SH, from_w // conv.SW
                inside = copied & (from_h >= 0) & (h_out < output.height) & (from_w >= 0) & (w_out < output.width)
                if EDGE:
                    inside &= (from_h % conv.SH == 0) & (from_w % conv.SW == 0)
                o = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
                valid = o < out_channels
                if WIDE:
                    o, h_out, w_out = o.to(tl.int64), h_out.to(tl.int64), w_out.to(tl.int64)
                base = from_grad + ((last_seer - j * conv.DT) // conv.ST).to(tl.int64) * grad.t
                offsets = h_out * grad.h + w_out * grad.w + oriented(o, not LAST) * grad.c
                sent = tl.load(base + offsets, mask=inside & oriented(valid, not LAST), other=0.0)
                if not LAST:
                    sent = tl.trans(sent)
                offsets = o[:, None] * (channels * TAPS) + ((j * conv.KH + u) * conv.KW + v) * channels
                offsets += c_at[None, :]
                filters = tl.load(weight + offsets, mask=valid[:, None] & (c < channels)[None, :], other=0.0)
                acc = tl.dot(sent, filters, acc, input_precision="ieee")

    if WIDE:
        h, w = h.to(tl.int64), w.to(tl.int64)
    place = dx.at + (b * dx.b + (t - first_frame).to(tl.int64) * dx.t + group * channels * dx.c)
    offsets = (h * dx.h + w * dx.w)[:, None] + c_at[None, :] * dx.c
    tl.store(place + offsets, acc.to(place.dtype.element_ty), mask=seen[:, None] & (c < channels)[None, :])


def ends(size: int, before: int, after: int, mode: str) -> tuple[int, int]:
    """The rows (or columns) between these two have no copies in the padding."""
    if mode == "zeros":
        return 0, size
    reflects = mode == "reflect"
    first = (1 + before * reflects) if before else 0
    end = size - ((1 + after * reflects) if after else 0)
    return (first, end) if first < end else (size, size)


def rectangles(height: int, width: int, padding: Sequence[int], mode: str) -> Iterator[tuple[bool, Piece]]:
    """The frame in pieces: whether a piece's pixels have copies, and where it is."""
    top, bottom = ends(height, padding[0], padding[1], mode)
    left, right = ends(width, padding[2], padding[3], mode)
    pieces = (
        (False, top, bottom, left, right),
        (True, 0, top, 0, width),
        (True, bottom, height, 0, width),
        (True, top, bottom, 0, left),
        (True, top, bottom, right, width),
    )
    for edge, row, row_end, column, column_end in pieces:
        if row < row_end and column < column_end:
            yield edge, Piece(row, column, row_end - row, column_end - column)


def backward_data(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    history: Tensor | None,
    grad_x: Tensor | None,
    grad_history: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_padding: str,
    space_padding: str,
    groups: int,
) -> None:
    """Writes the gradients of x and history where they are given."""
    shared = geometry(x, weight, history, grad, stride, dilation, padding, time_padding, space_padding, groups)
    shared["steps"] = _triton.constants(Steps(*(s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True))))
    copies = [3 if space_padding == "reflect" else 1 + sum(pair) for pair in (padding[:2], padding[2:])]
    shared["edge"] = Edge(copies[0], copies[1], padding[1], padding[3])
    filters = by_tap(weight)
    if history is None and grad_x is not None and takes(grad, x, weight, stride, dilation, space_padding, groups):
        convolve(grad, filters, None, grad_x, stride, padding[::2], time_padding, True)
        return

    def write(dx: Tensor, first_frame: int, edge: bool, piece: Piece) -> None:
        key = data_key(x.dtype, shared["out_channels"], shared["channels"], edge)
        fold = key[-1] == "short sum"
        apart_h, apart_w = (1, 1) if edge or fold else stride[1:]
        pixels = triton.cdiv(piece.rows, apart_h) * triton.cdiv(piece.columns, apart_w)

        def run(tile: _triton.Tile) -> None:
            tiles = triton.cdiv(pixels, tile.blocks["BLOCK_M"]) * triton.cdiv(weight.shape[1], tile.blocks["BLOCK_N"])
            _triton.launch(
                conv_data_kernel,
                (tiles * apart_h * apart_w * dx.shape[0] * dx.shape[2], groups),
                tile,
                grad=strided(grad),
                weight=filters,
                dx=strided(dx),
                frames=dx.shape[2],
                first_frame=first_frame,
                piece=piece,
                **shared,
                EDGE=edge,
                LAST=grad.stride(1) == 1,
                FOLD=fold,
                WIDE=wide(grad, filters, dx),
            )

        run(_triton.pick(PIXELS, key, x.device, run))

    for dx, first_frame in ((grad_x, 0), (grad_history, -(weight.shape[2] - 1) * dilation[0])):
        if dx is not None and dx.shape[2] > 0:
            for edge, piece in rectangles(x.shape[3], x.shape[4], padding, space_padding):
                write(dx, first_frame, edge, piece)
