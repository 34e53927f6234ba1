# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of video_norm's gradients.

All of them follow from two sums over the pixels of a frame for each channel, of g = grad_y act' and of g xhat: parts of
a frame give partial rows, which one program for a few channels adds up in their order. grad_x needs their sums over a
group. Where a program has room for all of a group, it has these in registers, and x and grad_y are read once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .triton_geometry import (
    by_group,
    channels_of,
    for_frames_of,
    gain_and_offset,
    modulation,
    part,
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
def _of_group(sums, c, valid, first, channels, sum_c, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Sum of a row of channels over each group of a tile."""
    if GROUPS == 1:  # the tile may be a piece of the group
        row = tl.zeros((SIZE,), tl.float32)
        for begin in range(0, channels, SIZE):
            inner = begin + tl.arange(0, SIZE)
            row += tl.load(sums + (first * channels + inner) * sum_c, mask=inner < channels, other=0.0)
    else:
        row = tl.load(sums + c * sum_c, mask=valid, other=0.0)
    return by_group(row, GROUPS, SIZE)


@triton.jit
def video_norm_backward_kernel(
    grad_y, x, weight, bias, scale, shift, mean, rstd, sum_g, sum_gx, grad_x, partial,
    grad_y_b, grad_y_t, grad_y_h, grad_y_p, grad_y_c, x_b, x_t, x_h, x_p, x_c,
    grad_x_b, grad_x_t, grad_x_h, grad_x_p, grad_x_c,
    weight_c, bias_c, scale_b, scale_c, scale_t, shift_b, shift_c, shift_t, sum_b, sum_c, sum_t,
    frames, pixels, columns, channels, groups, span, count, across, run, parts,
    PIXEL: tl.constexpr, CENTER: tl.constexpr, SILU: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, EXACT: tl.constexpr, ELEMENTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """grad_x and the partial rows of a run of a frame's pixels, where these are given.

    grad_x = rstd (g gain - mean(g gain) - xhat mean(g gain xhat)), without the first mean if not ``CENTER``; from
    ``sum_g`` and ``sum_gx`` where the tile does not hold all that the means are taken over.
    """
    PIXELS: tl.constexpr = ELEMENTS // (GROUPS * SIZE)
    program = tl.program_id(0)
    group, c, valid = channels_of(program % across, channels, groups, GROUPS, SIZE, EXACT)
    row = program // across
    frame, begin = (row // parts).to(tl.int64), row % parts * run
    end = tl.minimum(begin + run, pixels)
    b, t = frame // frames, frame % frames
    gain, offset = gain_and_offset(
        weight, bias, scale, shift, b, t, c, valid,
        weight_c, bias_c, scale_b, scale_c, scale_t, shift_b, shift_c, shift_t,
    )  # fmt: skip
    x += b * x_b + t * x_t
    grad_y += b * grad_y_b + t * grad_y_t
    if grad_x is not None:
        grad_x += b * grad_x_b + t * grad_x_t
    if not PIXEL:
        at = frame // span * groups + group
        if CENTER:
            middle = tl.load(mean + at, mask=valid, other=0.0)[None, :]
        scatter = tl.load(rstd + at, mask=valid, other=0.0)[None, :]
    if sum_gx is not None:
        first_group = program % across // tl.cdiv(channels, SIZE) * GROUPS
        at = b * sum_b + t * sum_t
        if CENTER:
            mean_g = _of_group(sum_g + at, c, valid, first_group, channels, sum_c, GROUPS, SIZE) / count
        mean_gx = _of_group(sum_gx + at, c, valid, first_group, channels, sum_c, GROUPS, SIZE) / count
    ONCE: tl.constexpr = not PIXEL and grad_x is not None and sum_gx is None  # the tile holds all of its groups
    SUMS: tl.constexpr = partial is not None and not ONCE
    C = channels * groups
    if partial is not None:
        partial += row.to(tl.int64) * 2 * C + c
    if SUMS:
        of_g = tl.zeros((PIXELS, GROUPS * SIZE), tl.float32)
        of_gx = tl.zeros((PIXELS, GROUPS * SIZE), tl.float32)
    for first in tl.range(begin, end, PIXELS, num_stages=STAGES):
        p = first + tl.arange(0, PIXELS)
        inside = (p < end)[:, None] & valid[None, :]
        xhat = tl.load(x + places(p, c, x_h, x_p, x_c, columns), mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_y + places(p, c, grad_y_h, grad_y_p, grad_y_c, columns), mask=inside, other=0.0).to(tl.float32)
        if PIXEL:
            at = frame * pixels + p
            if CENTER:
                middle = tl.load(mean + at, mask=p < end, other=0.0)[:, None]
            scatter = tl.load(rstd + at, mask=p < end, other=0.0)[:, None]
        if CENTER:
            xhat -= middle
        xhat *= scatter
        if SILU:
            z = xhat * gain[None, :] + offset[None, :]
            s = tl.sigmoid(z)
            g *= s * (1.0 + z * (1.0 - s))
        if SUMS:
            of_g += g
            of_gx += g * xhat
        elif partial is not None:
            tl.store(partial, tl.sum(g, 0), mask=valid)
            tl.store(partial + C, tl.sum(g * xhat, 0), mask=valid)
        if grad_x is not None:
            g *= gain[None, :]
            if sum_gx is None:
                if CENTER:
                    mean_g = total(g, PIXEL, GROUPS, SIZE) / count
                mean_gx = total(g * xhat, PIXEL, GROUPS, SIZE) / count
            if CENTER:
                g -= mean_g
            g = (g - xhat * mean_gx) * scatter
            tl.store(
                grad_x + places(p, c, grad_x_h, grad_x_p, grad_x_c, columns), g.to(grad_x.dtype.element_ty), mask=inside
            )
    if SUMS:
        tl.store(partial, tl.sum(of_g, 0), mask=valid)
        tl.store(partial + C, tl.sum(of_gx, 0), mask=valid)


@triton.jit
def _add_frame(out, sums, row, b, t, c, frames, C, valid, EACH: tl.constexpr):
    """Stores a frame's row in ``out`` [B, C, T], or adds it to those of its video and stores that in [B, C]."""
    if EACH:
        at = (b * C + c) * frames + t
        kept = valid
        sums = row
    else:
        at = b * C + c
        kept = valid & (t == frames - 1)
        sums = tl.where(t == 0, 0.0, sums) + row
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=kept)
    return sums


@triton.jit
def video_norm_finish_kernel(
    partial, weight, bias, scale, sum_g, sum_gx, grad_weight, grad_bias, grad_scale, grad_shift,
    weight_c, bias_c, scale_b, scale_c, scale_t, batch, frames, parts, C,
    SUMS_EACH: tl.constexpr, SCALE_EACH: tl.constexpr, SHIFT_EACH: tl.constexpr,
    PARTS: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of the modulation of LANES channels, and the sums of g gain and g gain xhat that grad_x needs."""
    c = (tl.program_id(0) * LANES + tl.arange(0, LANES)).to(tl.int64)
    valid = c < C
    number = tl.arange(0, PARTS).to(tl.int64)
    inside = (number < parts)[:, None] & valid[None, :]
    gain = tl.full((LANES,), 1.0, tl.float32)
    offset = tl.zeros((LANES,), tl.float32)
    if weight is not None:
        gain = tl.load(weight + c * weight_c, mask=valid, other=0.0).to(tl.float32)
    if bias is not None:
        offset = tl.load(bias + c * bias_c, mask=valid, other=0.0).to(tl.float32)
    of_weight = tl.zeros((LANES,), tl.float32)
    of_bias = tl.zeros((LANES,), tl.float32)
    of_scale = tl.zeros((LANES,), tl.float32)
    of_shift = tl.zeros((LANES,), tl.float32)
    of_g = tl.zeros((LANES,), tl.float32)
    of_gx = tl.zeros((LANES,), tl.float32)
    for frame in tl.range(0, batch * frames, num_stages=STAGES):
        at = partial + (frame * parts + number)[:, None] * 2 * C + c[None, :]
        g = tl.sum(tl.load(at, mask=inside, other=0.0), 0)
        gx = tl.sum(tl.load(at + C, mask=inside, other=0.0), 0)
        b, t = frame // frames, frame % frames
        if grad_shift is not None:
            of_shift = _add_frame(grad_shift, of_shift, g, b, t, c, frames, C, valid, SHIFT_EACH)
        if grad_scale is not None:
            of_scale = _add_frame(grad_scale, of_scale, gain * gx + offset * g, b, t, c, frames, C, valid, SCALE_EACH)
        if scale is not None:
            at = scale + (b * scale_b + t * scale_t + c * scale_c)
            factor = 1.0 + tl.load(at, mask=valid, other=0.0).to(tl.float32)
            g *= factor
            gx *= factor
        of_bias += g
        of_weight += gx
        if sum_gx is not None:
            of_g = _add_frame(sum_g, of_g, gain * g, b, t, c, frames, C, valid, SUMS_EACH)
            of_gx = _add_frame(sum_gx, of_gx, gain * gx, b, t, c, frames, C, valid, SUMS_EACH)
    if grad_weight is not None:
        tl.store(grad_weight + c, of_weight.to(grad_weight.dtype.element_ty), mask=valid)
    if grad_bias is not None:
        tl.store(grad_bias + c, of_bias.to(grad_bias.dtype.element_ty), mask=valid)


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    over: str,
    groups: int,
    center: bool,
    activation: str | None,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_scale: Tensor | None,
    grad_shift: Tensor | None,
) -> None:
    B, C, T, H, W = x.shape
    gradients = {"grad_weight": grad_weight, "grad_bias": grad_bias, "grad_scale": grad_scale, "grad_shift": grad_shift}
    shared = {
        **(video("grad_y", grad_y) | video("x", x) | modulation(weight=weight, bias=bias, scale=scale, shift=shift)),
        **(sizes(x, groups) | shared_by(x, over, groups)),
        **{"mean": mean if center else None, "rstd": rstd, "frames": T},
        **{"PIXEL": over == "pixel", "CENTER": center, "SILU": activation == "silu"},
    }

    def run(
        tile: tuple[_triton.Tile, dict[str, Any]],
        parts: dict[str, int],
        grad_x: Tensor | None,
        partial: Tensor | None,
        sum_g: Tensor | None = None,
        sum_gx: Tensor | None = None,
    ) -> None:
        each = 0 if sum_gx is None else sum_gx.shape[2]  # frames that have sums of their own, or 1 for all
        _triton.launch(
            for_frames_of(x, video_norm_backward_kernel),
            (B * T * parts["parts"] * tile[1]["across"],),
            tile[0],
            **(shared | video("grad_x", grad_x) | parts | tile[1]),
            **{"partial": partial, "sum_g": sum_g, "sum_gx": sum_gx},
            **{"sum_b": C * each, "sum_c": each, "sum_t": int(each > 1), "STAGES": stages(H * W, *tile)},
        )

    fits = whole("backward", x, over, groups)
    tile = fits or part("sums", x, groups)
    parts = split("whole" if fits else "sums", H * W, *tile)
    partial = sum_g = sum_gx = None
    if fits is None or any(gradient is not None for gradient in gradients.values()):
        partial = _triton.empty((B * T, parts["parts"], 2, C), torch.float32, x.device)
    run(tile, parts, grad_x if fits else None, partial)
    if fits is None and grad_x is not None:
        sum_g, sum_gx = _triton.empty((2, B, C, 1 if over == "clip" else T), torch.float32, x.device).unbind()
    if partial is not None:
        finish = _triton.pick(SUMS, ("finish",), x.device)
        _triton.launch(
            video_norm_finish_kernel,
            (triton.cdiv(C, finish.blocks["LANES"]),),
            finish,
            **(modulation(weight=weight, bias=bias, scale=scale) | gradients),
            **{"partial": partial, "sum_g": sum_g, "sum_gx": sum_gx},
            **{"batch": B, "frames": T, "parts": parts["parts"], "C": C},
            PARTS=triton.next_power_of_2(parts["parts"]),
            **{"SUMS_EACH": over == "frame", "STAGES": finish.stages},
            SCALE_EACH=scale is not None and scale.dim() == 3,
            SHIFT_EACH=shift is not None and shift.dim() == 3,
        )
    if sum_gx is not None:
        tile = part("grad_x", x, groups)
        run(tile, split("grad_x", H * W, *tile), grad_x, None, sum_g, sum_gx)
