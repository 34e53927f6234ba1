"""Gradient of the bias table: dS summed over windows in registers, then over all pairs with the same offset."""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .triton_geometry import Geometry
from .triton_rows import (
    keys_end,
    load_lines,
    load_rows,
    load_weight,
    moving_frames,
    norm_rows,
    packed_lines,
    packed_of,
    probabilities,
    products,
    rows_from,
    rows_of,
    scores_of,
    tokens_at,
    window_at,
)
from .triton_tiles import SUMS


@triton.jit
def bias_backward_kernel(
    queries, keys, v, best_of, log_of, delta, grad, bias, image, q_norm, k_norm, sums,
    video, windows, parts, scale, norm_eps, window, layout,
    PADDED: tl.constexpr, MASKED: tl.constexpr, NORMED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of dS of one head, summed over a part of all windows, into ``sums`` [parts, heads, N, N].

    ``queries`` and ``keys`` are normed already where NORMED.
    """
    ROWS: tl.constexpr = (window.N + BLOCK_M - 1) // BLOCK_M
    COLUMNS: tl.constexpr = (window.N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    column = program % COLUMNS * BLOCK_N
    row = program // COLUMNS % ROWS * BLOCK_M
    head = program // COLUMNS // ROWS % video.heads
    part = program // COLUMNS // ROWS // video.heads
    i = row + tl.arange(0, BLOCK_M)
    j = column + tl.arange(0, BLOCK_N)
    w0q, w1q = load_weight(q_norm, layout)
    w0k, w1k = load_weight(k_norm, layout)
    first = (part.to(tl.int64) * windows // parts).to(tl.int32)
    last = ((part + 1).to(tl.int64) * windows // parts).to(tl.int32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for number in range(first, last):
        b, t0, h0, w0 = window_at(number, video, window)
        moving = 0
        if image.at is not None:
            moving = moving_frames(image, b, t0, video, window)
        visible = True
        if MASKED:
            visible = keys_end(t0, video, window, MASKED) > tl.maximum(row, column)
            if image.at is not None:
                visible = visible & (moving != 0)
        if visible:
            t, h, w, inside, still = tokens_at(row, b, t0, h0, w0, video, window, image, moving, BLOCK_M)
            tk, hk, wk, inside_k, still_k = tokens_at(column, b, t0, h0, w0, video, window, image, moving, BLOCK_N)
            seen = inside & ~still
            seen_k = inside_k & ~still_k
            many = rows_from(queries, b, t0, h0, w0, head, layout)
            at = rows_of(t, h, w, queries, layout)
            x0, x1 = load_rows(many, at, seen, queries.d, layout, MASKED)
            x0, x1 = norm_rows(x0, x1, q_norm, w0q, w1q, seen, norm_eps, layout, NORMED)
            many = rows_from(keys, b, t0, h0, w0, head, layout)
            at = rows_of(tk, hk, wk, keys, layout)
            y0, y1 = load_rows(many, at, seen_k, keys.d, layout, MASKED)
            y0, y1 = norm_rows(y0, y1, k_norm, w0k, w1k, seen_k, norm_eps, layout, NORMED)
            s = products(x0, x1, y0, y1, layout, PRECISION)
            s = scores_of(s, scale, bias, head, i, j, PADDED)
            if MASKED:
                s = tl.where(seen_k[None, :], s, float("-inf"))
            lines = packed_lines(b, t0, h0, w0, head, video)
            local = lines + packed_of(t, h, w, video, layout)
            best, log_total = load_lines(best_of, log_of, local, seen, v.at)
            each = tl.load(delta + local, mask=seen, other=0.0)
            p = probabilities(s, best[:, None], log_total[:, None])
            many = rows_from(grad, b, t0, h0, w0, head, layout)
            at = rows_of(t, h, w, grad, layout)
            x0, x1 = load_rows(many, at, seen, grad.d, layout, MASKED)
            many = rows_from(v, b, t0, h0, w0, head, layout)
            at = rows_of(tk, hk, wk, v, layout)
            y0, y1 = load_rows(many, at, seen_k, v.d, layout, MASKED)
            total += p * (products(x0, x1, y0, y1, layout, PRECISION) - each[:, None])
    sums += (part.to(tl.int64) * video.heads + head) * window.N * window.N
    tl.store(sums + i[:, None] * window.N + j[None, :], total, mask=(i < window.N)[:, None] & (j < window.N)[None, :])


@triton.jit
def table_kernel(
    sums, grad_table, heads, parts, window,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, ENTRIES: tl.constexpr,
    OFFSETS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Entries of one offset in time and height: the sums over all pairs (j + offset, j) and over all parts."""
    program = tl.program_id(0)
    dh = program % SH - SH // 2
    dt = program // SH % ST - ST // 2
    head = program // SH // ST
    offset = tl.arange(0, OFFSETS)
    dw = offset - SW // 2
    total = tl.zeros([OFFSETS, KEYS], tl.float32)
    sums += head.to(tl.int64) * window.N * window.N
    for _ in range(0, parts):
        for t in range(tl.maximum(0, -dt), tl.minimum(0, -dt) + window.T):
            for start in range(0, window.H * window.W, KEYS):
                key = start + tl.arange(0, KEYS)
                h = key // window.W + dh
                w = (key % window.W)[None, :] + dw[:, None]
                mask = (key < window.H * window.W) & (h >= 0) & (h < window.H)
                query = ((t + dt) * window.H + h)[None, :] * window.W + w
                at = sums + query * window.N + (key + t * window.H * window.W)[None, :]
                total += tl.load(at, mask=mask[None, :] & (w >= 0) & (w < window.W), other=0.0)
        sums += tl.full([], window.N * window.N, tl.int64) * heads
    grad_table += head * ENTRIES + ((dt + ST // 2) * SH + dh + SH // 2) * SW
    tl.store(grad_table + offset, tl.sum(total, 1).to(grad_table.dtype.element_ty), mask=offset < SW)


def table_gradient(geometry: Geometry, rows: dict[str, Any], grad_table: Tensor) -> None:
    tile = geometry.tile("bias_backward")
    blocks = [-(-geometry.N // tile.blocks[name]) for name in ("BLOCK_M", "BLOCK_N")]
    programs = geometry.heads * blocks[0] * blocks[1]
    # Enough programs to fill the machine, from no more sums than that takes.
    parts = max(1, min(geometry.windows, -(-2 * _triton.target(geometry.device).processors // programs)))
    sums = _triton.empty((parts, geometry.heads, geometry.N, geometry.N), torch.float32, geometry.device)
    more: dict[str, Any] = {**rows, **geometry.bias(tile), "sums": sums, "windows": geometry.windows, "parts": parts}
    masked = geometry.masked(tile.blocks["BLOCK_M"]) or geometry.masked(tile.blocks["BLOCK_N"])
    geometry.launch(bias_backward_kernel, programs * parts, tile, **more, MASKED=masked)
    ST, SH, SW = grad_table.shape[1:]
    tile = _triton.pick(SUMS, ("table",), geometry.device)
    more |= {"grad_table": grad_table, "ENTRIES": ST * SH * SW, "ST": ST, "SH": SH, "SW": SW}
    more |= {"OFFSETS": max(2, 1 << (SW - 1).bit_length())}
    geometry.launch(table_kernel, geometry.heads * ST * SH, tile, **more)
