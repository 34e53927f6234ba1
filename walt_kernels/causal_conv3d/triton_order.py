# mypy: disable-error-code="no-untyped-def"
"""Filters in another order in memory, in Triton: the weight by tap, and the weight's gradient out of partial sums."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .triton_tiles import order_tile


class Filters(NamedTuple):
    """[C_out, C, kt, kh, kw]: where they begin, and their strides."""

    at: Any
    o: int
    c: int
    t: int
    h: int
    w: int


@triton.jit
def conv_order_kernel(
    source, out, parts, size, taps, channels, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out`` [C_out, C, kt, kh, kw] from ``source``, of which ``parts`` that are ``size`` apart are added up in order.

    One out channel, all its taps and BLOCK_C channels: a tile that is read along one axis and written along another.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    o = (tl.program_id(0) // blocks).to(tl.int64)
    tap = tl.arange(0, BLOCK_T)[:, None]
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (tap < taps) & (c < channels)
    j, u, v = tap // (KH * KW), tap // KW % KH, tap % KW
    at = source.at + o * source.o + (c * source.c + j * source.t + u * source.h + v * source.w)
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    if BLOCK_P == 1:
        for _ in range(parts):
            acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
            at += size
    else:  # many parts: several loads at a time
        for first in range(0, parts, BLOCK_P):
            part = first + tl.arange(0, BLOCK_P)[:, None, None]
            some = tl.load(at[None, :, :] + part.to(tl.int64) * size, mask=mask[None, :, :] & (part < parts), other=0.0)
            acc += tl.sum(some.to(tl.float32), 0)
    place = out.at + o * out.o + (c * out.c + j * out.t + u * out.h + v * out.w)
    tl.store(place, acc.to(out.at.dtype.element_ty), mask=mask)


def reorder(source: Tensor, out: Tensor, parts: int = 1) -> None:
    """Both are [C_out, C, kt, kh, kw] with any strides; the parts of source follow one another in its memory."""
    out_channels, channels, _, kh, kw = out.shape
    taps = out.shape[2:].numel()
    tile = order_tile(parts, taps, out_channels, channels)
    _triton.launch(
        conv_order_kernel,
        (out_channels * triton.cdiv(channels, tile.blocks["BLOCK_C"]),),
        tile,
        source=Filters(source, *source.stride()),
        out=Filters(out, *out.stride()),
        parts=parts,
        size=out.numel(),
        taps=taps,
        channels=channels,
        KH=kh,
        KW=kw,
    )


def by_tap(weight: Tensor) -> Tensor:
    """The weight as [C_out, kt, kh, kw, C / groups] in memory, which channels_last_3d is already.

    Rows of C, whichever of its two channel axes is summed over: forward and backward read the same copy.
    """
    filters = weight.permute(0, 2, 3, 4, 1)
    if not filters.is_contiguous():
        filters = _triton.empty(filters.shape, weight.dtype, weight.device)
        reorder(weight, filters.permute(0, 4, 1, 2, 3))
    return filters


def add_parts(partials: Tensor, out: Tensor) -> None:
    """``partials`` is [parts, C_out, kt, kh, kw, C / groups] in memory, summed into ``out``, a weight's gradient."""
    reorder(partials[0].permute(0, 4, 1, 2, 3), out, partials.shape[0])
