# mypy: disable-error-code="no-untyped-def"
"""The convolution as a matrix product in Triton: rows are pixels of an output frame, the sum is over (tap, channel)."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .triton_geometry import Output, gather, geometry, moved, oriented, strided, wide
from .triton_order import by_tap
from .triton_patch import convolve, takes
from .triton_tiles import PIXELS, forward_key


@triton.jit
def conv_forward_kernel(
    x, history, weight, bias, y, frame, output, channels, out_channels, conv,
    TIME: tl.constexpr, SPACE: tl.constexpr, LAST: tl.constexpr, FOLD: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M pixels of an output frame and BLOCK_N output channels of a group; weight as ``by_tap`` lays it out.

    ``LAST``: channels are x's innermost dimension. ``FOLD``: a block of the sum holds channels of several taps.
    """
    program, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles_n = tl.cdiv(out_channels, BLOCK_N)
    tiles_m = tl.cdiv(output.pixels, BLOCK_M)
    tile_n, program = program % tiles_n, program // tiles_n
    tile_m, program = program % tiles_m, program // tiles_m
    b, t = (program // output.frames).to(tl.int64), program % output.frames

    TAPS: tl.constexpr = conv.KT * conv.KH * conv.KW
    pixel = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    h, w = oriented(pixel // output.width, LAST), oriented(pixel % output.width, LAST)
    seen = oriented(pixel < output.pixels, LAST)
    o = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    from_x = moved(x, b * x.b + group * channels * x.c)
    from_history = moved(history, b * history.b + group * channels * history.c)
    weight += group * out_channels * TAPS * channels
    rows = o * (channels * TAPS)
    if WIDE:
        rows = o.to(tl.int64) * (channels * TAPS)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = 0
    blocks = tl.cdiv(channels, BLOCK_K)
    steps = blocks * TAPS
    if FOLD:
        steps = tl.cdiv(channels * TAPS, BLOCK_K)
    elif TIME == "zeros":  # taps that see only frames before the first
        first = tl.maximum(-(t * conv.ST // conv.DT) + (conv.KT - 1), 0) * (blocks * (conv.KH * conv.KW))
    for step in range(first, steps):
        if FOLD:
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            valid = k < channels * TAPS
            tap, c = oriented(k // channels, not LAST), oriented(k % channels, not LAST)
        else:
            tap = step // blocks
            c = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
            valid = c < channels
            k = tap * channels + c
            c = oriented(c, not LAST)
        pixels = gather(
            from_x, from_history, h, w, t, tap, c, seen & oriented(valid, not LAST),
            x, history, frame, conv, TIME, SPACE, WIDE,
        )  # fmt: skip
        if not LAST:
            pixels = tl.trans(pixels)
        mask = (o < out_channels)[:, None] & valid[None, :]
        filters = tl.load(weight + (rows[:, None] + k[None, :]), mask=mask, other=0.0)
        acc = tl.dot(pixels, tl.trans(filters), acc, input_precision="ieee")

    if bias is not None:
        acc += tl.load(bias + group * out_channels + o, mask=o < out_channels, other=0.0).to(tl.float32)[None, :]
    if WIDE:
        pixel, o = pixel.to(tl.int64), o.to(tl.int64)
    place = y.at + (b * y.b + t.to(tl.int64) * y.t + group * out_channels * y.c)
    mask = (pixel < output.pixels)[:, None] & (o < out_channels)[None, :]
    tl.store(place + (pixel[:, None] * y.w + o[None, :] * y.c), acc.to(place.dtype.element_ty), mask=mask)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    y: Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_padding: str,
    space_padding: str,
    groups: int,
) -> None:
    shared = geometry(x, weight, history, y, stride, dilation, padding, time_padding, space_padding, groups)
    filters, pixels = by_tap(weight), y.shape[3] * y.shape[4]
    if history is None and takes(x, x, weight, stride, dilation, space_padding, groups):
        convolve(x, filters, bias, y, stride, padding[::2], time_padding, False)
        return
    shared["output"] = Output(y.shape[2], None, y.shape[4], pixels)
    key = forward_key(x.dtype, shared["channels"], shared["out_channels"])

    def run(tile: _triton.Tile) -> None:
        tiles = triton.cdiv(pixels, tile.blocks["BLOCK_M"])
        tiles *= triton.cdiv(shared["out_channels"], tile.blocks["BLOCK_N"])
        _triton.launch(
            conv_forward_kernel,
            (tiles * x.shape[0] * y.shape[2], groups),
            tile,
            x=strided(x),
            history=strided(history),
            weight=filters,
            bias=bias,
            y=strided(y)._replace(h=None),  # a frame's pixels are evenly apart
            **shared,
            LAST=x.stride(1) == 1,
            FOLD=key[-1] == "short sum",
            WIDE=wide(x, history, filters, y),
        )

    run(_triton.pick(PIXELS, key, x.device, run))
