# mypy: disable-error-code="no-untyped-def"
"""Gradients of causal_conv3d's weight and bias in Triton: a product summed over pixels, in parts.

There are few filters and many pixels, so the sum over pixels is cut into as many parts as fill the processors; partial
sums in float32 are added up in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .triton_data import gather_sent
from .triton_geometry import gather, geometry, oriented, strides, wide
from .triton_order import add_parts, reorder
from .triton_tiles import FEW, FINISH, WEIGHT, weight_key
from .triton_weight_patch import takes, write

PROGRAMS = 2  # of a processor: what the partial sums are cut for


@triton.jit
def conv_weight_kernel(
    grad, x, history, partials,
    tiles_part, frames, frames_out, height, width, pixels_out, width_out, top, left, channels, out_channels, filters,
    grad_b, grad_c, grad_t, grad_h, grad_w, x_b, x_c, x_t, x_h, x_w, past_b, past_c, past_t, past_h, past_w,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DT: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TIME: tl.constexpr, SPACE: tl.constexpr, FOLD: tl.constexpr,
    LAST: tl.constexpr, GRAD_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M output channels by BLOCK_N channels of one tap (of several with ``FOLD``), for one part of the pixels.

    ``partials`` is [parts, C_out, KT, KH, KW, channels]; ``filters`` the elements of one part. A step takes BLOCK_K
    pixels of a frame, and a part is ``tiles_part`` steps.
    """
    program, group, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    TAPS: tl.constexpr = KT * KH * KW
    tiles_m = tl.cdiv(out_channels, BLOCK_M)
    o = program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    program = program // tiles_m
    if FOLD:
        n = program * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = n < TAPS * channels
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
    grad += group * out_channels * grad_c
    x += group * channels * x_c
    if TIME == "history":
        history += group * channels * past_c

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tiles_frame = tl.cdiv(pixels_out, BLOCK_K)
    first = part * tiles_part
    for step in range(first, tl.minimum(first + tiles_part, frames * tiles_frame)):
        frame = step // tiles_frame
        b, t = (frame // frames_out).to(tl.int64), frame % frames_out
        pixel = step % tiles_frame * BLOCK_K + tl.arange(0, BLOCK_K)
        seen = pixel < pixels_out
        h, w = pixel // width_out, pixel % width_out
        past = history
        if TIME == "history":
            past = history + b * past_b
        pixels = gather(
            x + b * x_b, past, oriented(h, LAST), oriented(w, LAST), t, tap, c,
            oriented(seen, LAST) & oriented(valid, not LAST), height, width, top, left,
            x_c, x_t, x_h, x_w, past_c, past_t, past_h, past_w,
            KT, KH, KW, ST, SH, SW, DT, DH, DW, TIME, SPACE, WIDE,
        )  # fmt: skip
        if not LAST:
            pixels = tl.trans(pixels)
        if WIDE:
            h, w = h.to(tl.int64), w.to(tl.int64)
        base = grad + b * grad_b + t.to(tl.int64) * grad_t
        offsets = oriented(h * grad_h + w * grad_w, GRAD_LAST) + oriented(o_at, not GRAD_LAST) * grad_c
        mask = oriented(seen, GRAD_LAST) & oriented(o < out_channels, not GRAD_LAST)
        sent = tl.load(base + offsets, mask=mask, other=0.0)
        if GRAD_LAST:
            sent = tl.trans(sent)
        acc = tl.dot(sent, pixels, acc, input_precision="ieee")

    partials += part.to(tl.int64) * filters + group * out_channels * TAPS * channels
    offsets = o_at[:, None] * (TAPS * channels) + n_at[None, :]
    tl.store(partials + offsets, acc, mask=(o < out_channels)[:, None] & valid[None, :])


@triton.jit
def conv_weight_few_kernel(
    grad, x, history, partials,
    tiles_part, batch, frames, frames_before, frames_out, height, width, rows, columns, height_out, width_out,
    top, left, channels, out_channels, filters,
    grad_b, grad_c, grad_t, grad_h, grad_w, x_b, x_c, x_t, x_h, x_w, past_b, past_c, past_t, past_h, past_w,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    DT: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TIME: tl.constexpr, SPACE: tl.constexpr, LAST: tl.constexpr, GRAD_LAST: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M pairs of a tap and an output channel by BLOCK_N channels, for one part of the padded input's pixels.

    For few output channels: a pixel of x is read once and meets what it gets back through every tap.
    """
    program, group, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    TAPS: tl.constexpr = KT * KH * KW
    tiles_m = tl.cdiv(out_channels * TAPS, BLOCK_M)
    m = program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    c = program // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
    tap, o = m // out_channels, m % out_channels
    paired, valid = m < out_channels * TAPS, c < channels
    c_at, o_at = c, o
    if WIDE:
        c_at, o_at = c.to(tl.int64), o.to(tl.int64)
    grad += group * out_channels * grad_c
    x += group * channels * x_c
    if TIME == "history":
        history += group * channels * past_c

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    pixels = rows * columns
    tiles_frame = tl.cdiv(pixels, BLOCK_K)
    first = part * tiles_part
    for step in range(first, tl.minimum(first + tiles_part, batch * frames * tiles_frame)):
        frame = step // tiles_frame
        b, t = (frame // frames).to(tl.int64), frame % frames - frames_before
        pixel = step % tiles_frame * BLOCK_K + tl.arange(0, BLOCK_K)
        seen = pixel < pixels
        h, w = pixel // columns, pixel % columns
        past = history
        if TIME == "history":
            past = history + b * past_b
        place_h, place_w = oriented(h, LAST), oriented(w, LAST)
        values = gather(
            x + b * x_b, past, place_h, place_w, t, KT - 1, oriented(c_at, not LAST),
            oriented(seen, LAST) & oriented(valid, not LAST), height, width, top, left,
            x_c, x_t, x_h, x_w, past_c, past_t, past_h, past_w,
            KT, 1, 1, 1, 1, 1, DT, 1, 1, TIME, SPACE, WIDE,
        )  # fmt: skip
        if not LAST:
            values = tl.trans(values)
        sent = gather_sent(
            grad + b * grad_b, oriented(h, GRAD_LAST), oriented(w, GRAD_LAST), t + (KT - 1) * DT,
            oriented(tap, not GRAD_LAST), oriented(o_at, not GRAD_LAST),
            oriented(seen, GRAD_LAST) & oriented(paired, not GRAD_LAST), frames_out, height_out, width_out,
            grad_c, grad_t, grad_h, grad_w, KH, KW, ST, SH, SW, DT, DH, DW, WIDE,
        )  # fmt: skip
        if GRAD_LAST:
            sent = tl.trans(sent)
        acc = tl.dot(sent, values, acc, input_precision="ieee")

    partials += part.to(tl.int64) * filters + group * out_channels * TAPS * channels
    offsets = ((o_at * TAPS + tap) * channels)[:, None] + c_at[None, :]
    tl.store(partials + offsets, acc, mask=paired[:, None] & valid[None, :])


@triton.jit
def conv_bias_kernel(
    grad, partials, tiles_part, frames, frames_out, pixels_out, width_out, out_channels,
    grad_b, grad_c, grad_t, grad_h, grad_w,
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
    tiles_frame = tl.cdiv(pixels_out, BLOCK_K)
    first = part * tiles_part
    for step in range(first, tl.minimum(first + tiles_part, frames * tiles_frame)):
        frame = step // tiles_frame
        pixel = step % tiles_frame * BLOCK_K + tl.arange(0, BLOCK_K)
        h, w = pixel // width_out, pixel % width_out
        if WIDE:
            h, w = h.to(tl.int64), w.to(tl.int64)
        base = grad + (frame // frames_out).to(tl.int64) * grad_b + (frame % frames_out).to(tl.int64) * grad_t
        offsets = oriented(h * grad_h + w * grad_w, GRAD_LAST) + oriented(o_at, not GRAD_LAST) * grad_c
        mask = oriented(pixel < pixels_out, GRAD_LAST) & oriented(o < out_channels, not GRAD_LAST)
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
        sums = {"batch": x.shape[0], "frames": x.shape[2] + before, "frames_before": before, "rows": rows}
        sums |= {"columns": columns, "height_out": grad.shape[3]}
        frames, pixels = x.shape[0] * (x.shape[2] + before), rows * columns
        across_m, across_n, taps = out_channels * kernel.numel(), channels, 1
    else:
        frames, pixels = grad.shape[0] * grad.shape[2], grad.shape[3] * grad.shape[4]
        sums = {"frames": frames, "pixels_out": pixels, "FOLD": fold}
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
            grad=grad,
            x=x,
            history=history,
            partials=partials,
            tiles_part=tiles_part,
            filters=weight.numel(),
            **(shared | sums | strides("grad", grad) | strides("x", x) | strides("past", history)),
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
            grad=grad,
            partials=partials,
            tiles_part=tiles_part,
            frames=frames,
            frames_out=grad.shape[2],
            pixels_out=pixels,
            width_out=grad.shape[4],
            out_channels=out_channels,
            **strides("grad", grad),
            GRAD_LAST=grad.stride(1) == 1,
            WIDE=wide(grad),
        )
        reorder(partials[0].view(1, out_channels, 1, 1, 1), grad_bias.view(1, out_channels, 1, 1, 1), parts)

    run(_triton.pick(FINISH, ("bias",), grad.device, run))
