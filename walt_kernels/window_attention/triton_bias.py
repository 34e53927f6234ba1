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
    base_of,
    keys_end,
    load_lines,
    load_rows,
    load_weight,
    moving_frames,
    norm_rows,
    probabilities,
    products,
    rows_of,
    scores_of,
    tokens_at,
    window_at,
)
from .triton_tiles import SUMS


@triton.jit
def bias_backward_kernel(
    queries, keys, v, best_of, log_of, delta, grad, bias, image, q_norm, k_norm, sums,
    queries_b, queries_t, queries_h, queries_w, queries_n, queries_d,
    keys_b, keys_t, keys_h, keys_w, keys_n, keys_d, v_b, v_t, v_h, v_w, v_n, v_d,
    grad_b, grad_t, grad_h, grad_w, grad_n, grad_d, q_norm_d, k_norm_d, image_b, image_t,
    T, H, W, heads, windows_t, windows_h, windows_w, windows, parts, scale, norm_eps,
    N: tl.constexpr, PADDED: tl.constexpr, WT: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr, NORMED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of dS of one head, summed over a part of all windows, into ``sums`` [parts, heads, N, N].

    ``queries`` and ``keys`` are normed already where NORMED.
    """
    ROWS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    column = program % COLUMNS * BLOCK_N
    row = program // COLUMNS % ROWS * BLOCK_M
    head = program // COLUMNS // ROWS % heads
    part = program // COLUMNS // ROWS // heads
    i = row + tl.arange(0, BLOCK_M)
    j = column + tl.arange(0, BLOCK_N)
    w0q, w1q = load_weight(q_norm, q_norm_d, DIM, D0, D1)
    w0k, w1k = load_weight(k_norm, k_norm_d, DIM, D0, D1)
    first = (part.to(tl.int64) * windows // parts).to(tl.int32)
    last = ((part + 1).to(tl.int64) * windows // parts).to(tl.int32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for window in range(first, last):
        b, t0, h0, w0 = window_at(window, windows_t, windows_h, windows_w, WT, WH, WW)
        moving = 0
        if image is not None:
            moving = moving_frames(image, image_b, image_t, b, t0, T, WT)
        visible = True
        if MASKED:
            visible = keys_end(t0, T, N, WT, WH, WW, MASKED) > tl.maximum(row, column)
            if image is not None:
                visible = visible & (moving != 0)
        if visible:
            t, h, w, inside, still = tokens_at(
                row, b, t0, h0, w0, T, H, W, image, image_b, image_t, moving, BLOCK_M, N, WT, WH, WW
            )
            tk, hk, wk, inside_k, still_k = tokens_at(
                column, b, t0, h0, w0, T, H, W, image, image_b, image_t, moving, BLOCK_N, N, WT, WH, WW
            )
            seen = inside & ~still
            seen_k = inside_k & ~still_k
            many = queries + base_of(b, t0, h0, w0, head, queries_b, queries_t, queries_h, queries_w, queries_n, UNIT)
            at = rows_of(t, h, w, queries_t, queries_h, queries_w, UNIT, WIDE)
            x0, x1 = load_rows(many, at, seen, queries_d, DIM, D0, D1, MASKED)
            x0, x1 = norm_rows(x0, x1, q_norm, w0q, w1q, seen, norm_eps, DIM, D0, D1, NORMED)
            many = keys + base_of(b, t0, h0, w0, head, keys_b, keys_t, keys_h, keys_w, keys_n, UNIT)
            at = rows_of(tk, hk, wk, keys_t, keys_h, keys_w, UNIT, WIDE)
            y0, y1 = load_rows(many, at, seen_k, keys_d, DIM, D0, D1, MASKED)
            y0, y1 = norm_rows(y0, y1, k_norm, w0k, w1k, seen_k, norm_eps, DIM, D0, D1, NORMED)
            s = products(x0, x1, y0, y1, D1, PRECISION)
            s = scores_of(s, scale, bias, head, i, j, PADDED)
            if MASKED:
                s = tl.where(seen_k[None, :], s, float("-inf"))
            lines = ((b.to(tl.int64) * heads + head) * T + t0) * H * W + h0 * W + w0
            local = lines + rows_of(t, h, w, H * W, W, 1, 1, WIDE)
            best, log_total = load_lines(best_of, log_of, local, seen, v)
            each = tl.load(delta + local, mask=seen, other=0.0)
            p = probabilities(s, best[:, None], log_total[:, None])
            many = grad + base_of(b, t0, h0, w0, head, grad_b, grad_t, grad_h, grad_w, grad_n, UNIT)
            at = rows_of(t, h, w, grad_t, grad_h, grad_w, UNIT, WIDE)
            x0, x1 = load_rows(many, at, seen, grad_d, DIM, D0, D1, MASKED)
            many = v + base_of(b, t0, h0, w0, head, v_b, v_t, v_h, v_w, v_n, UNIT)
            at = rows_of(tk, hk, wk, v_t, v_h, v_w, UNIT, WIDE)
            y0, y1 = load_rows(many, at, seen_k, v_d, DIM, D0, D1, MASKED)
            total += p * (products(x0, x1, y0, y1, D1, PRECISION) - each[:, None])
    sums += (part.to(tl.int64) * heads + head) * N * N
    tl.store(sums + i[:, None] * N + j[None, :], total, mask=(i < N)[:, None] & (j < N)[None, :])


@triton.jit
def table_kernel(
    sums, grad_table, heads, parts,
    N: tl.constexpr, WT: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
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
    sums += head.to(tl.int64) * N * N
    for _ in range(0, parts):
        for t in range(tl.maximum(0, -dt), tl.minimum(WT, WT - dt)):
            for start in range(0, WH * WW, KEYS):
                key = start + tl.arange(0, KEYS)
                h = key // WW + dh
                w = (key % WW)[None, :] + dw[:, None]
                mask = (key < WH * WW) & (h >= 0) & (h < WH)
                query = ((t + dt) * WH + h)[None, :] * WW + w
                at = sums + query * N + (t * WH * WW + key)[None, :]
                total += tl.load(at, mask=mask[None, :] & (w >= 0) & (w < WW), other=0.0)
        sums += tl.full([], N * N, tl.int64) * heads
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
