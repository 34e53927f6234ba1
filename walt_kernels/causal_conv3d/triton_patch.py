# mypy: disable-error-code="no-untyped-def"
"""The plain convolution with TMA loads, in Triton: a tile is a patch of a frame, and a tap's tile is one box of memory.

What lies outside a frame arrives as zeros, so zero padding needs no mask and no address arithmetic at all. For
stride 1, dilation 1, one group and zeros around frames, with channels innermost. The gradient of the input is the
same walk with mirrored taps.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import _triton
from .triton_geometry import strides, wide
from .triton_tiles import PATCH, patch_key


@triton.jit
def conv_patch_kernel(
    x, weight, bias, y,
    frames, sources, height, width, row_shift, column_shift, channels, out_channels,
    y_b, y_c, y_t, y_h, y_w,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    TIME: tl.constexpr, BACKWARD: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A patch of BLOCK_H x BLOCK_W pixels of y and BLOCK_N of its channels.

    ``x`` is [B * sources, rows, columns, channels] and ``weight`` [C_out, KT * KH * KW, C], boxes of them. Forward, y's
    row h sees x's rows h - row_shift + u; ``BACKWARD``, h + row_shift - u.
    """
    program = tl.program_id(0)
    tiles_n, tiles_w = tl.cdiv(out_channels, BLOCK_N), tl.cdiv(width, BLOCK_W)
    n, program = program % tiles_n * BLOCK_N, program // tiles_n
    column, program = program % tiles_w * BLOCK_W, program // tiles_w
    tiles_h = tl.cdiv(height, BLOCK_H)
    row, frame = program % tiles_h * BLOCK_H, program // tiles_h
    b, t = frame // frames, frame % frames

    blocks = tl.cdiv(channels, BLOCK_K)
    BLOCK_M: tl.constexpr = BLOCK_H * BLOCK_W
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    copies = 1
    if BACKWARD and TIME == "first_frame":  # of frame 0, before it
        copies = tl.where(t == 0, KT, 1)
    for back in range(copies):
        if BACKWARD:  # the frame t - back is seen by the frames t - back + KT - 1 - j that there are
            j_first = tl.maximum(t - back + KT - sources, 0)
            j_end = tl.minimum(t - back + KT, KT)
        else:
            j_first, j_end = 0, KT
            if TIME == "zeros":
                j_first = tl.maximum(KT - 1 - t, 0)
        for step in range(j_first * (KH * KW) * blocks, j_end * (KH * KW) * blocks):
            tap, k = step // blocks, step % blocks * BLOCK_K
            j, u, v = tap // (KH * KW), tap // KW % KH, tap % KW
            if BACKWARD:
                source = t - back + KT - 1 - j
                from_row, from_column = row + row_shift - u, column + column_shift - v
                filters = weight.load([k, tap, n]).reshape(BLOCK_K, BLOCK_N)
            else:
                source = tl.maximum(t - KT + 1 + j, 0)
                from_row, from_column = row - row_shift + u, column - column_shift + v
                filters = weight.load([n, tap, k]).reshape(BLOCK_N, BLOCK_K).T
            pixels = x.load([b * sources + source, from_row, from_column, k]).reshape(BLOCK_M, BLOCK_K)
            acc = tl.dot(pixels, filters, acc, input_precision="ieee")

    o = n + tl.arange(0, BLOCK_N)
    if bias is not None:
        acc += tl.load(bias + o, mask=o < out_channels, other=0.0).to(tl.float32)[None, :]
    pixel = tl.arange(0, BLOCK_M)
    h, w = row + pixel // BLOCK_W, column + pixel % BLOCK_W
    mask = ((h < height) & (w < width))[:, None] & (o < out_channels)[None, :]
    if WIDE:
        h, w, o = h.to(tl.int64), w.to(tl.int64), o.to(tl.int64)
    y += b.to(tl.int64) * y_b + t.to(tl.int64) * y_t
    tl.store(y + (h * y_h + w * y_w)[:, None] + o[None, :] * y_c, acc.to(y.dtype.element_ty), mask=mask)


def frame_stride(x: Tensor) -> int:
    return x.stride(2 if x.shape[2] > 1 else 0)


def boxes(x: Tensor) -> bool:
    """Whether TMA can read x as [B * T, H, W, C]: channels innermost, everything at multiples of 16 bytes."""
    if x.numel() == 0 or x.stride(1) != 1 or (x.shape[0] > 1 and x.stride(0) != x.shape[2] * frame_stride(x)):
        return False
    bytes_apart = [stride * x.element_size() for stride in (frame_stride(x), *x.stride()[3:])]
    return all(0 < apart < 2**40 and apart % 16 == 0 for apart in bytes_apart) and x.data_ptr() % 16 == 0


def takes(x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], space: str, groups: int) -> bool:
    """Whether x (or a gradient in its place) can be walked in patches."""
    architecture = _triton.target(x.device).architecture
    plain = all(value == 1 for value in (*stride, *dilation, groups)) and space == "zeros"
    sizes = weight.shape[1] * weight.element_size() % 16 == 0 and min(weight.shape[:2]) >= 16
    return architecture in ("sm_90", "sm_100", "interpreter") and plain and sizes and boxes(x)


def convolve(
    x: Tensor, filters: Tensor, bias: Tensor | None, y: Tensor, shifts: Sequence[int], time_padding: str, backward: bool
) -> None:
    """Writes the convolution y of x or, ``backward``, the gradient y of a convolution's input from x, its output's.

    ``filters`` is the weight ``by_tap``; ``shifts`` are the padding's top and left.
    """
    batch, channels, sources, height, width = x.shape
    shape, apart = [batch * sources, height, width, channels], [frame_stride(x), *x.stride()[3:], 1]
    taps = filters.flatten(1, 3)
    key = patch_key(x.dtype, y.shape[1])

    def run(tile: _triton.Tile) -> None:
        block_h, block_w, block_n, block_k = (tile.blocks[f"BLOCK_{name}"] for name in "HWNK")
        frames = TensorDescriptor(x, shape, apart, [1, block_h, block_w, block_k])
        box = [block_k, 1, block_n] if backward else [block_n, 1, block_k]
        tiles = triton.cdiv(y.shape[3], block_h) * triton.cdiv(y.shape[4], block_w) * triton.cdiv(y.shape[1], block_n)
        _triton.launch(
            conv_patch_kernel,
            (tiles * batch * y.shape[2],),
            tile,
            **{"x": frames, "weight": TensorDescriptor.from_tensor(taps, box), "bias": bias, "y": y},
            **{"frames": y.shape[2], "sources": sources, "height": y.shape[3], "width": y.shape[4]},
            **{"row_shift": shifts[0], "column_shift": shifts[1], "channels": channels, "out_channels": y.shape[1]},
            **(strides("y", y) | dict(zip(("KT", "KH", "KW"), filters.shape[1:4], strict=True))),
            TIME=time_padding,
            BACKWARD=backward,
            WIDE=wide(y),
        )

    run(_triton.pick(PATCH, key, x.device, run))
