# mypy: disable-error-code="no-untyped-def"
"""Gradients of causal_conv3d's weight and bias in Triton: a product summed over pixels, in parts.

There are few filters and many pixels, so the sum over pixels is cut into as many parts as fill the processors; partial
sums in float32 are added up in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .triton_data import gather_sent
from .triton_geometry import Convolution, Output, gather, geometry, moved, oriented, strided, wide
from .triton_order import add_parts, reorder
from .triton_tiles import FEW, FINISH, WEIGHT, weight_key
from .triton_weight_patch import takes, write

PROGRAMS = 2  # of a processor: what the partial sums are cut for


class Padded(NamedTuple):
    """Frames of the padded input, how many of them come before the first, and their rows and columns."""

    frames: int
    before: int
    rows: int
    columns: int


@triton.jit
def conv_weight_kernel(
    grad, x, history, partials, tiles_part, frames, frame, output, channels, out_channels, filters, conv,
    TIME: tl.constexpr, SPACE: tl.constexpr, FOLD: tl.constexpr,
    LAST: tl.constexpr, GRAD_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M output channels by BLOCK_N channels of one tap (of several with ``FOLD``), for one part of the pixels.

    ``partials`` is [parts, C_out, KT, KH, KW, channels]; ``filters`` the elements of one part. A step takes BLOCK_K
    pixels of a frame, and a part is ``tiles_part`` steps.
    """
    program, group, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    TAPS: tl.constexpr = conv.KT * conv.KH * conv.KW
    tiles_m = tl.cdiv(out_channels, BLOCK_M)
    o = program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    program = program // tiles_m
    if FOLD:
        n = program * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = n < channels * TAPS
        tap, c = oriented(n // channels, not LAST), oriented(n % channels, not LAST)
    else:
        blocks = tl.cdiv(channels, BLOCK_N)
        tap = program // blocks
        c = program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = c < channels
        n = tap * channels + c
        c = oriented(c, not LAST)
    o_at, n_at = o, n
    if WIDE:
        o_at, n_at = o.to(tl.int64), n.to(tl.int64)
    from_grad = moved(grad, group * out_channels * grad.c)
    from_x = moved(x, group * channels * x.c)
    from_history = moved(history, group * channels * history.c)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tiles_frame = tl.cdiv(output.pixels, BLOCK_K)
    first = part * tiles_part
    for step in range(first, tl.minimum(first + tiles_part, frames * tiles_frame)):
        number = step // tiles_frame
        b, t = (number // output.frames).to(tl.int64), number % output.frames
        pixel = step % tiles_frame * BLOCK_K + tl.arange(0, BLOCK_K)
        seen = pixel < output.pixels
        h, w = pixel // output.width, pixel % output.width
        past = from_history + b * history.b
        pixels = gather(
            from_x + b * x.b, past, oriented(h, LAST), oriented(w, LAST), t, tap, c,
            oriented(seen, LAST) & oriented(valid, not LAST), x, history, frame, conv, TIME, SPACE, WIDE,
        )  # fmt: skip
        if not LAST:
            pixels = tl.trans(pixels)
        if WIDE:
            h, w = h.to(tl.int64), w.to(tl.int64)
        base = from_grad + b * grad.b + t.to(tl.int64) * grad.t
        offsets = oriented(h * grad.h + w * grad.w, GRAD_LAST) + oriented(o_at, not GRAD_LAST) * grad.c
        mask = oriented(seen, GRAD_LAST) & oriented(o < out_channels, not GRAD_LAST)
        sent = tl.load(base + offsets, mask=mask, other=0.0)
        if GRAD_LAST:
            sent = tl.trans(sent)
        acc = tl.dot(sent, pixels, acc, input_precision="ieee")

    partials += part.to(tl.int64) * filters + group * out_channels * TAPS * channels
    offsets = o_at[:, None] * (channels * TAPS) + n_at[None, :]
    tl.store(partials + offsets, acc, mask=(o < out_channels)[:, None] & valid[None, :])


@triton.jit
def conv_weight_few_kernel(
    grad, x, history, partials, tiles_part, batch, padded, frame, output, channels, out_channels, filters, conv,
    TIME: tl.constexpr, SPACE: tl.constexpr, LAST: tl.constexpr, GRAD_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M pairs of a tap and an output channel by BLOCK_N channels, for one part of the padded input's pixels.

    For few output channels: a pixel of x is read once and meets what it gets back through every tap.
    """
    program, group, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    TAPS: tl.constexpr = conv.KT * conv.KH * conv.KW
    tiles_m = tl.cdiv(out_channels * TAPS, BLOCK_M)
    m = program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    c = program // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    tap, o = m // out_channels, m % out_channels
    paired, valid = m < out_channels * TAPS, c < channels
    c_at, o_at = c, o
    if WIDE:
        c_at, o_at = c.to(tl.int64), o.to(tl.int64)
    from_grad = moved(grad, group * out_channels * grad.c)
    from_x = moved(x, group * channels * x.c)
    from_history = moved(history, group * channels * history.c)
    # Through its last tap in time, each position sees the pixel of the padded input in the same place.
    one_to_one = Convolution(conv.KT, 1, 1, 1, 1, 1, conv.DT, 1, 1)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    pixels = padded.rows * padded.columns
    tiles_frame = tl.cdiv(pixels, BLOCK_K)
    first = part * tiles_part
    for step in range(first, tl.minimum(first + tiles_part, batch * padded.frames * tiles_frame)):
        number = step // tiles_frame
        b, t = (number // padded.frames).to(tl.int64), number % padded.frames - padded.before
        pixel = step % tiles_frame * BLOCK_K + tl.arange(0, BLOCK_K)
        seen = pixel < pixels
        h, w = pixel // padded.columns, pixel % padded.columns
        past = from_history + b * history.b
        place_h, place_w = oriented(h, LAST), oriented(w, LAST)
        values = gather(
            from_x + b * x.b, past, place_h, place_w, t, conv.KT - 1, oriented(c_at, not LAST),
            oriented(seen, LAST) & oriented(valid, not LAST), x, history, frame, one_to_one, TIME, SPACE, WIDE,
        )  # fmt: skip
        if not LAST:
            values = tl.trans(values)
        sent = gather_sent(
            from_grad + b * grad.b, oriented(h, GRAD_LAST), oriented(w, GRAD_LAST), t + (conv.KT - 1) * conv.DT,
            oriented(tap, not GRAD_LAST), oriented(o_at, not GRAD_LAST),
            oriented(seen, GRAD_LAST) & oriented(paired, not GRAD_LAST), grad, output, conv, WIDE,
        )  # fmt: skip
        if GRAD_LAST:
            sent = tl.trans(sent)
        acc = tl.dot(sent, values, acc, input_precision="ieee")

    partials += part.to(tl.int64) * filters + group * out_channels * TAPS * channels
    offsets = ((o_at * TAPS + tap) * channels)[:, None] + c_at[None, :]
    tl.store(partials + offsets, acc, mask=paired[:, None] & valid[None, :])


@triton.jit
def conv_bias_kernel(
    grad, partials, tiles_part, frames, output, out_channels,
    GRAD_LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums BLOCK_N channels of grad over one part of the pixels; ``partials`` is [parts, C_out]."""
    o = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    o_at = o
    if WIDE:
        o_at = o.to(tl.int64)
    acc = oriented(tl.zeros((BLOCK_N,), tl.float32), not GRAD_LAST) + oriented(
        tl.zeros((BLOCK_K,), tl.float32), GRAD_LAST
    )
    tiles_frame = tl.cdiv(output.pixels, BLOCK_K)
    first = part * tiles_part
    for step in range(first, tl.minimum(first + tiles_part, frames * tiles_frame)):
        number = step // tiles_frame
        pixel = step % tiles_frame * BLOCK_K + tl.arange(0, BLOCK_K)
        h, w = pixel // output.width, pixel % output.width
        if WIDE:
            h, w = h.to(tl.int64), w.to(tl.int64)
        base = grad.at + (number // output.frames).to(tl.int64) * grad.b
        base += (number % output.frames).to(tl.int64) * grad.t
        offsets = oriented(h * grad.h + w * grad.w, GRAD_LAST) + oriented(o_at, not GRAD_LAST) * grad.c
        mask = oriented(pixel < output.pixels, GRAD_LAST) & oriented(o < out_channels, not GRAD_LAST)
        acc += tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(acc, 0) if GRAD_LAST else tl.sum(acc, 1)
    tl.store(partials + part * out_channels + o, total, mask=o < out_channels)


def split(steps: int, programs: int, device: torch.device) -> tuple[int, int]:
    """Parts of a sum of ``steps`` steps that ``programs`` programs share, and the steps of a part."""
    parts = max(1, min(PROGRAMS * _triton.target(device).processors // programs, steps))
    tiles_part = max(1, triton.cdiv(steps, parts))
    return max(1, triton.cdiv(steps, tiles_part)), tiles_part


def backward_weight(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    history: Tensor | None,
    grad_weight: Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_padding: str,
    space_padding: str,
    groups: int,
) -> None:
    if history is None and takes(grad, x, weight, stride, dilation, space_padding, groups):
        write(grad, x, grad_weight, stride, padding[::2], time_padding)
        return
    shared = geometry(x, weight, history, grad, stride, dilation, padding, time_padding, space_padding, groups)
    channels, out_channels = shared["channels"], shared["out_channels"]
    key = weight_key(x.dtype, channels, out_channels)
    kernel = weight.shape[2:]
    few, fold = out_channels < FEW <= channels, key[-1] == "few channels"
    rows, columns = x.shape[3] + sum(padding[:2]), x.shape[4] + sum(padding[2:])
    before = 0 if shared["TIME"] == "zeros" else (kernel[0] - 1) * dilation[0]
    if few:
        sums = {"batch": x.shape[0], "padded": Padded(x.shape[2] + before, before, rows, columns)}
        frames, pixels = x.shape[0] * (x.shape[2] + before), rows * columns
        across_m, across_n, taps = out_channels * kernel.numel(), channels, 1
    else:
        frames, pixels = grad.shape[0] * grad.shape[2], grad.shape[3] * grad.shape[4]
        sums = {"frames": frames, "output": Output(grad.shape[2], None, grad.shape[4], pixels), "FOLD": fold}
        across_m, across_n, taps = out_channels, channels * (kernel.numel() if fold else 1), kernel.numel()

    def run(tile: _triton.Tile) -> None:
        tiles = triton.cdiv(across_m, tile.blocks["BLOCK_M"]) * triton.cdiv(across_n, tile.blocks["BLOCK_N"])
        tiles *= 1 if fold else taps
        parts, tiles_part = split(frames * triton.cdiv(pixels, tile.blocks["BLOCK_K"]), tiles * groups, x.device)
        partials = _triton.empty((parts, weight.shape[0], *kernel, channels), torch.float32, x.device)
        _triton.launch(
            conv_weight_few_kernel if few else conv_weight_kernel,
            (tiles, groups, parts),
            tile,
            grad=strided(grad),
            x=strided(x),
            history=strided(history),
            partials=partials,
            tiles_part=tiles_part,
            filters=weight.numel(),
            **(shared | sums),
            LAST=x.stride(1) == 1,
            GRAD_LAST=grad.stride(1) == 1,
            WIDE=wide(grad, x, history, weight),
        )
        add_parts(partials, grad_weight)

    run(_triton.pick(WEIGHT, key, x.device, run))


def backward_bias(grad: Tensor, grad_bias: Tensor) -> None:
    frames, pixels, out_channels = grad.shape[0] * grad.shape[2], grad.shape[3] * grad.shape[4], grad.shape[1]

    def run(tile: _triton.Tile) -> None:
        tiles = triton.cdiv(out_channels, tile.blocks["BLOCK_N"])
        parts, tiles_part = split(frames * triton.cdiv(pixels, tile.blocks["BLOCK_K"]), tiles, grad.device)
        partials = _triton.empty((parts, out_channels), torch.float32, grad.device)
        _triton.launch(
            conv_bias_kernel,
            (tiles, parts),
            tile,
            grad=strided(grad),
            partials=partials,
            tiles_part=tiles_part,
            frames=frames,
            output=Output(grad.shape[2], None, grad.shape[4], pixels),
            out_channels=out_channels,
            GRAD_LAST=grad.stride(1) == 1,
            WIDE=wide(grad),
        )
        reorder(partials[0].view(1, out_channels, 1, 1, 1), grad_bias.view(1, out_channels, 1, 1, 1), parts)

    run(_triton.pick(FINISH, ("bias",), grad.device, run))
