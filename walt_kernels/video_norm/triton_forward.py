# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of video_norm: statistics, then everything up to y in one pass.

Where a program has room for all that its statistics are taken over, x is read once. Otherwise it is read twice: first
every part of a frame gives a mean and a sum of squared deviations for each channel, which are then combined.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .triton_geometry import (
    channels_of,
    for_frames_of,
    gain_and_offset,
    modulation,
    part,
    pixels_of,
    places,
    shared_by,
    sizes,
    split,
    stages,
    total,
    video,
    whole,
)
from .triton_tiles import SUMS


@triton.jit
def video_norm_statistics_kernel(
    x, partial, x_b, x_t, x_h, x_p, x_c, frames, pixels, columns, channels, groups, across, run, parts,
    CENTER: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, EXACT: tl.constexpr, ELEMENTS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """partial[frame, part] = mean (``CENTER``) and sum of squared deviations of each channel over ``run`` pixels."""
    PIXELS: tl.constexpr = ELEMENTS // (GROUPS * SIZE)
    program = tl.program_id(0)
    _, c, valid = channels_of(program % across, channels, groups, GROUPS, SIZE, EXACT)
    row = program // across
    frame, begin = (row // parts).to(tl.int64), row % parts * run
    end = tl.minimum(begin + run, pixels)
    x += frame // frames * x_b + frame % frames * x_t
    lane = tl.arange(0, PIXELS)
    mean = tl.zeros((PIXELS, GROUPS * SIZE), tl.float32)
    squares = tl.zeros((PIXELS, GROUPS * SIZE), tl.float32)
    seen = 0.0
    for first in tl.range(begin, end, PIXELS, num_stages=STAGES):
        p = first + lane
        inside = (p < end)[:, None] & valid[None, :]
        value = tl.load(x + places(p, c, x_h, x_p, x_c, columns), mask=inside, other=0.0).to(tl.float32)
        if CENTER:  # a mean of its own for each element of the tile
            seen += 1.0
            away = tl.where(inside, value - mean, 0.0)
            mean += away * (1.0 / seen)
            squares += away * (value - mean)
        else:
            squares += value * value
    C = channels * groups
    partial += row.to(tl.int64) * 2 * C + c
    if CENTER:
        number = (tl.maximum(end - begin - lane + PIXELS - 1, 0) // PIXELS).to(tl.float32)[:, None]
        middle = tl.sum(mean * number, 0) / (end - begin)
        squares += (mean - middle[None, :]) * (mean - middle[None, :]) * number
        tl.store(partial, middle, mask=valid)
    tl.store(partial + C, tl.sum(squares, 0), mask=valid)


@triton.jit
def video_norm_combine_kernel(
    partial, mean, rstd, pixels, channels, groups, span, count, eps, run, parts,
    CENTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mean and rstd of one group over ``span`` frames."""
    program = tl.program_id(0)
    C = channels * groups
    partial += (program // groups).to(tl.int64) * span * parts * 2 * C + program % groups * channels
    number = span * parts * channels
    sums = tl.zeros((BLOCK,), tl.float32)
    middle = 0.0
    if CENTER:
        for first in range(0, number, BLOCK):
            i = first + tl.arange(0, BLOCK)
            row = i // channels
            counted = tl.minimum(run, pixels - row % parts * run).to(tl.float32)
            at = partial + (row.to(tl.int64) * 2 * C + i % channels)
            sums += counted * tl.load(at, mask=i < number, other=0.0)
        middle = tl.sum(sums, 0) / count
        tl.store(mean + program, middle)
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, number, BLOCK):
        i = first + tl.arange(0, BLOCK)
        row = i // channels
        at = partial + (row.to(tl.int64) * 2 * C + i % channels)
        squares += tl.load(at + C, mask=i < number, other=0.0)
        if CENTER:
            counted = tl.minimum(run, pixels - row % parts * run).to(tl.float32)
            away = tl.load(at, mask=i < number, other=0.0) - middle
            squares += tl.where(i < number, counted * away * away, 0.0)
    tl.store(rstd + program, 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / count + eps))


@triton.jit
def video_norm_forward_kernel(
    x, weight, bias, scale, shift, y, mean, rstd,
    x_b, x_t, x_h, x_p, x_c, y_b, y_t, y_h, y_p, y_c,
    weight_c, bias_c, scale_b, scale_c, scale_t, shift_b, shift_c, shift_t,
    frames, pixels, columns, channels, groups, span, count, eps, across,
    KNOWN: tl.constexpr, PIXEL: tl.constexpr, CENTER: tl.constexpr, SILU: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, EXACT: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """One tile of y, from the statistics where they are ``KNOWN``; otherwise it writes them."""
    PIXELS: tl.constexpr = ELEMENTS // (GROUPS * SIZE)
    program = tl.program_id(0)
    group, c, valid = channels_of(program % across, channels, groups, GROUPS, SIZE, EXACT)
    program = program // across
    parts = tl.cdiv(pixels, PIXELS)
    frame = (program // parts).to(tl.int64)
    p = program % parts * PIXELS + tl.arange(0, PIXELS)
    b, t = frame // frames, frame % frames
    inside = (p < pixels)[:, None] & valid[None, :]
    value = tl.load(x + b * x_b + t * x_t + places(p, c, x_h, x_p, x_c, columns), mask=inside, other=0.0).to(tl.float32)
    if PIXEL:
        at, kept = frame * pixels + p, p < pixels
    else:
        at, kept = frame // span * groups + group, valid
    if KNOWN:
        if CENTER:
            value -= tl.load(mean + at, mask=kept, other=0.0)[None, :]
        value *= tl.load(rstd + at, mask=kept, other=0.0)[None, :]
    else:
        if CENTER:
            middle = total(value, PIXEL, GROUPS, SIZE) / count
            value = tl.where(inside, value - middle, 0.0)
            tl.store(mean + at, tl.reshape(middle, at.shape), mask=kept)
        scatter = 1.0 / tl.sqrt_rn(total(value * value, PIXEL, GROUPS, SIZE) / count + eps)
        tl.store(rstd + at, tl.reshape(scatter, at.shape), mask=kept)
        value *= scatter
    gain, offset = gain_and_offset(
        weight, bias, scale, shift, b, t, c, valid,
        weight_c, bias_c, scale_b, scale_c, scale_t, shift_b, shift_c, shift_t,
    )  # fmt: skip
    value = value * gain[None, :] + offset[None, :]
    if SILU:
        value *= tl.sigmoid(value)
    tl.store(y + b * y_b + t * y_t + places(p, c, y_h, y_p, y_c, columns), value.to(y.dtype.element_ty), mask=inside)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    over: str,
    groups: int,
    center: bool,
    eps: float,
    activation: str | None,
) -> None:
    B, C, T, H, W = x.shape
    size, statistics = sizes(x, groups), {"mean": mean if center else None, "rstd": rstd, "eps": eps, "CENTER": center}
    statistics |= shared_by(x, over, groups)
    tile = whole("forward", x, over, groups)
    if tile is None:
        block, shape = part("statistics", x, groups)
        parts = split("statistics", H * W, block, shape)
        partial = _triton.empty((B * T * parts["parts"], 2, C), torch.float32, x.device)
        _triton.launch(
            for_frames_of(x, video_norm_statistics_kernel),
            (partial.shape[0] * shape["across"],),
            block,
            **(video("x", x) | size | parts | shape),
            **{"partial": partial, "frames": T, "CENTER": center, "STAGES": stages(H * W, block, shape)},
        )
        block = _triton.pick(SUMS, ("combine",), x.device)
        _triton.launch(
            video_norm_combine_kernel, (rstd.numel(),), block, **(size | statistics | parts), partial=partial
        )
    block, shape = tile or part("forward", x, groups)
    _triton.launch(
        for_frames_of(x, video_norm_forward_kernel),
        (B * T * triton.cdiv(H * W, pixels_of(block, shape)) * shape["across"],),
        block,
        **(
            video("x", x)
            | video("y", y)
            | modulation(weight=weight, bias=bias, scale=scale, shift=shift)
            | size
            | statistics
            | shape
        ),
        **{"frames": T, "KNOWN": tile is None, "PIXEL": over == "pixel", "SILU": activation == "silu"},
    )
