# mypy: disable-error-code="no-untyped-def"
"""The convolution with TMA loads, in Triton: a tile is a patch of a frame, and a tap's tile is one box of memory.

What lies outside a frame arrives as zeros, so zero padding needs no mask and no address arithmetic at all. For
strides of 1 or 2, dilation 1, one group and zeros around frames; channels are made innermost. The gradient of the input
is the same walk with mirrored taps.

Out channels are the rows of the product and pixels its columns, so that both operands are read from shared memory as
they arrive. With pixels as rows, Triton 3.6 and 3.7 take the reshaped box through registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import _triton
from .triton_geometry import Frame, convolution, strided, wide
from .triton_tiles import FINISH, PATCH, patch_key
from .triton_transposed import transposed


@triton.jit
def conv_patch_kernel(
    x, weight, bias, y, partials, batch, frames, sources, frame, channels, out_channels, row_apart, elements, conv,
    TIME: tl.constexpr, BACKWARD: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A patch of BLOCK_H x BLOCK_W pixels of y and BLOCK_N of its channels; one part of their sum with ``partials``.

    ``x`` are boxes of frames as ``box_of`` makes them, ``weight`` boxes of [C_out, KT * KH * KW * C]. Forward, y's
    row h sees x's rows h SH - top + u. ``BACKWARD``, x is the gradient of the output, and y's row h is seen by the
    rows (h + top - u) / SH: a patch takes pixels one stride apart, which are seen through the same taps.
    """
    APART_H: tl.constexpr = conv.SH if BACKWARD else 1
    APART_W: tl.constexpr = conv.SW if BACKWARD else 1
    BLOCK_M: tl.constexpr = BLOCK_H * BLOCK_W
    program, part = tl.program_id(0), tl.program_id(1)
    tiles_n = tl.cdiv(out_channels, BLOCK_N)
    tiles_w, tiles_h = tl.cdiv(tl.cdiv(frame.width, APART_W), BLOCK_W), tl.cdiv(tl.cdiv(frame.height, APART_H), BLOCK_H)
    n, program = program % tiles_n * BLOCK_N, program // tiles_n
    column, program = program % tiles_w * BLOCK_W, program // tiles_w
    row, program = program % tiles_h * BLOCK_H, program // tiles_h
    phase, program = program % (APART_H * APART_W), program // (APART_H * APART_W)
    row_phase, column_phase = phase // APART_W, phase % APART_W
    # Frames that see (or are seen by) the most come first: short sums fill the last processors.
    b, t = program % batch, program // batch
    blocks = tl.cdiv(channels, BLOCK_K)

    # The sum in one flat loop over (group, u, v, block of channels). A group is a tap in time.
    if BACKWARD:
        u_first, v_first = (row_phase + frame.top) % conv.SH, (column_phase + frame.left) % conv.SW
        from_row = row + (row_phase + frame.top) // conv.SH
        from_column = column + (column_phase + frame.left) // conv.SW
        u_count, v_count = tl.cdiv(conv.KH - u_first, conv.SH), tl.cdiv(conv.KW - v_first, conv.SW)
        source_first = tl.cdiv(t, conv.ST)
        groups = tl.maximum(tl.minimum((t + conv.KT - 1) // conv.ST, sources - 1) - source_first + 1, 0)
        if TIME == "first_frame":  # the copies of frame 0
            for copy in tl.static_range(1, conv.KT):
                groups += tl.where(t == 0, tl.minimum((conv.KT - 1 - copy) // conv.ST + 1, sources), 0)
    else:
        t = frames - 1 - t
        u_first, v_first, u_count, v_count = 0, 0, conv.KH, conv.KW
        from_row, from_column = row, column
        source_first, groups = t * conv.ST - (conv.KT - 1), conv.KT
        if TIME == "zeros":  # groups that see only frames before the first are left out
            groups = tl.minimum(conv.KT, t * conv.ST + 1)
    steps_group = u_count * v_count * blocks
    steps = groups * steps_group
    steps_part = tl.cdiv(steps, tl.num_programs(1))
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(part * steps_part, tl.minimum((part + 1) * steps_part, steps)):
        group, k = step // steps_group, step % blocks * BLOCK_K
        spot = step % steps_group // blocks
        if BACKWARD:
            u, v = spot // v_count, spot % v_count
            back = 0
            if TIME == "first_frame":
                for i in tl.static_range(conv.KT - 1):
                    count = tl.minimum((t + conv.KT - 1 - i) // conv.ST - source_first + 1, sources - source_first)
                    further = (t == 0) & (back == i) & (group >= count)
                    group -= tl.where(further, count, 0)
                    back += further.to(tl.int32)
            source = source_first + group
            j = t - back + conv.KT - 1 - source * conv.ST
            tap = (j * conv.KH + u_first + u * conv.SH) * conv.KW + v_first + v * conv.SW
            filters = weight.load([k, tap * out_channels + n]).T
            pixels = x.load([b * sources + source, from_row - u, from_column - v, k])
        else:
            j = conv.KT - groups + group
            u, v = spot // conv.KW - frame.top, spot % conv.KW - frame.left
            source = tl.maximum(source_first + j, 0)
            filters = weight.load([n, (j * (conv.KH * conv.KW) + spot) * channels + k])
            # With a stride of 2, u's last bit tells odd rows from even ones; with 1 there is no such bit.
            at = (u & (conv.SH - 1)) * row_apart + (v & (conv.SW - 1)) * channels + k
            image = b * sources + source
            pixels = x.load([image, from_row + (u >> (conv.SH - 1)), from_column + (v >> (conv.SW - 1)), at])
        acc = tl.dot(filters, pixels.reshape(BLOCK_M, BLOCK_K).T, acc, input_precision="ieee")

    o = n + tl.arange(0, BLOCK_N)
    pixel = tl.arange(0, BLOCK_M)
    h, w = (row + pixel // BLOCK_W) * APART_H + row_phase, (column + pixel % BLOCK_W) * APART_W + column_phase
    mask = ((h < frame.height) & (w < frame.width))[:, None] & (o < out_channels)[None, :]
    total = acc.T
    if WIDE:
        h, w, o = h.to(tl.int64), w.to(tl.int64), o.to(tl.int64)
    offsets = (h * y.h + w * y.w)[:, None] + o[None, :] * y.c
    place = b.to(tl.int64) * y.b + t.to(tl.int64) * y.t
    if partials is not None:
        tl.store(partials + part.to(tl.int64) * elements + place + offsets, total, mask=mask)
    else:
        if bias is not None:
            total += tl.load(bias + o, mask=o < out_channels, other=0.0).to(tl.float32)[None, :]
        tl.store(y.at + place + offsets, total.to(y.at.dtype.element_ty), mask=mask)


@triton.jit
def conv_sum_kernel(partials, bias, y, parts, elements, out_channels, BLOCK: tl.constexpr):
    """Adds up parts of y, first to last; channels are y's innermost dimension."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < elements
    acc = tl.zeros((BLOCK,), tl.float32)
    at = partials + i
    for _ in range(parts):
        acc += tl.load(at, mask=mask, other=0.0)
        at += elements
    if bias is not None:
        acc += tl.load(bias + i % out_channels, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + i, acc.to(y.dtype.element_ty), mask=mask)


def frame_stride(x: Tensor) -> int:
    return x.stride(2 if x.shape[2] > 1 else 0)


def boxes(x: Tensor) -> bool:
    """Whether TMA can read x as [B * T, H, W, C]: channels innermost, everything at multiples of 16 bytes."""
    if x.numel() == 0 or x.stride(1) != 1 or (x.shape[0] > 1 and x.stride(0) != x.shape[2] * frame_stride(x)):
        return False
    bytes_apart = [stride * x.element_size() for stride in (frame_stride(x), *x.stride()[3:])]
    return all(0 < apart < 2**40 and apart % 16 == 0 for apart in bytes_apart) and x.data_ptr() % 16 == 0


def box_of(x: Tensor, stride: Sequence[int], box: Sequence[int]) -> TensorDescriptor:
    """x as [B * T, H / sh, W / sw, channels of sh x sw pixels] in boxes: rows and columns one stride apart are next.

    Channels of the pixel in an odd row lie a row of x further, those in an odd column a column.
    """
    batch, channels, frames, height, width = x.shape
    sh, sw = stride[1:]
    row, column = x.stride()[3:]
    shape = [batch * frames, height // sh, width // sw, (sh - 1) * row + (sw - 1) * column + channels]
    return TensorDescriptor(x, shape, [frame_stride(x), sh * row, sw * column, 1], list(box))


def even(x: Tensor, stride: Sequence[int], channels: int) -> bool:
    """Whether x's rows and columns can be told apart by ``box_of``: with a stride of 2, in blocks of channels."""
    sizes = all(s == 1 or (s == 2 and size % 2 == 0) for s, size in zip(stride[1:], x.shape[3:], strict=True))
    return sizes and (max(stride[1:]) == 1 or channels % 64 == 0)


def takes(
    x: Tensor, frame: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], space: str, groups: int
) -> bool:
    """Whether x (or a gradient in its place) can be walked in patches; ``frame`` is the convolution's input.

    Where taps read x more than once, it is copied into boxes if it does not lie in them (``in_boxes``).
    """
    architecture = _triton.target(x.device).architecture
    plain = all(value == 1 for value in (*dilation, groups)) and space == "zeros"
    sizes = weight.shape[1] * weight.element_size() % 16 == 0 and min(weight.shape[:2]) >= 16
    again = weight.shape[2:].numel() > 1 and x.numel() > 0 and x.shape[1] * x.element_size() % 16 == 0
    fits = even(frame, stride, weight.shape[1]) and (again or boxes(x))
    return architecture in ("sm_90", "sm_100", "interpreter") and plain and sizes and fits


def in_boxes(x: Tensor) -> Tensor:
    return x if boxes(x) else transposed(x)


def many(y: Tensor, apart: Sequence[int], processors: int) -> bool:
    """Whether y has tiles enough for those of 16 x 16 pixels: for four rounds of them on the processors."""
    height, width = (triton.cdiv(size, step) for size, step in zip(y.shape[3:], apart, strict=True))
    frames = y.shape[0] * y.shape[2] * apart[0] * apart[1]
    tiles = triton.cdiv(height, 16) * triton.cdiv(width, 16) * triton.cdiv(y.shape[1], 128) * frames
    return tiles >= 4 * processors


def parts_of(tiles: int, steps: int, processors: int) -> int:
    """Into how many parts sums are cut: until a processor has two programs, the loads of one beside the other's sums.

    A part more is written and read as float32, which takes as long as 14 steps of a tile of 128 x 128 (at 3 TB/s).
    """
    return max(1, min(triton.cdiv(2 * processors, max(1, tiles)), steps // 32, 4))


def convolve(
    x: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    y: Tensor,
    stride: Sequence[int],
    sides: Sequence[int],
    time_padding: str,
    backward: bool,
) -> None:
    """Writes the convolution y of x or, ``backward``, the gradient y of a convolution's input from x, its output's.

    ``filters`` is the weight ``by_tap``; ``sides`` are the padding's top and left.
    """
    batch, channels, sources = x.shape[:3]
    out_channels, frames = y.shape[1:3]
    kernel, taps = filters.shape[1:4], filters.shape[1:4].numel()
    apart = stride[1:] if backward else (1, 1)
    matrix = filters.flatten(1)
    processors = _triton.target(x.device).processors
    x = in_boxes(x)

    def run(tile: _triton.Tile) -> None:
        block_h, block_w, block_n, block_k = (tile.blocks[f"BLOCK_{name}"] for name in "HWNK")
        tiles = triton.cdiv(triton.cdiv(y.shape[3], apart[0]), block_h) * apart[0]
        tiles *= triton.cdiv(triton.cdiv(y.shape[4], apart[1]), block_w) * apart[1]
        tiles *= triton.cdiv(out_channels, block_n) * batch * frames
        parts = 1
        if y.is_contiguous(memory_format=torch.channels_last_3d):
            parts = parts_of(tiles, taps * triton.cdiv(channels, block_k), processors)
        partials = _triton.empty((parts, y.numel()), torch.float32, x.device) if parts > 1 else None
        box = [1, block_h, block_w, block_k]
        _triton.launch(
            conv_patch_kernel,
            (tiles, parts),
            tile,
            x=box_of(x, (1, 1, 1) if backward else stride, box),
            weight=TensorDescriptor.from_tensor(matrix, [block_k, block_n] if backward else [block_n, block_k]),
            bias=bias,
            y=strided(y),
            partials=partials,
            batch=batch,
            frames=frames,
            sources=sources,
            frame=Frame(*y.shape[3:], *sides),
            channels=channels,
            out_channels=out_channels,
            row_apart=x.stride(3),
            elements=y.numel(),
            conv=convolution(kernel, stride),
            TIME=time_padding,
            BACKWARD=backward,
            WIDE=wide(y),
        )
        if partials is not None:
            add_up(partials, bias, y)

    key = patch_key(x.dtype, out_channels, many(y, apart, processors))
    run(_triton.pick(PATCH, key, x.device, run))


def add_up(partials: Tensor, bias: Tensor | None, y: Tensor) -> None:
    def run(tile: _triton.Tile) -> None:
        _triton.launch(
            conv_sum_kernel,
            (triton.cdiv(y.numel(), tile.blocks["BLOCK"]),),
            tile,
            partials=partials,
            bias=bias,
            y=y,
            parts=partials.shape[0],
            elements=y.numel(),
            out_channels=y.shape[1],
        )

    run(_triton.pick(FINISH, ("sum",), y.device, run))
