"""What a call prepares once for all its windows: the normed rows, and the bias of all pairs of a window's tokens.

A kernel that takes a tile of keys for every tile of queries would norm it as often, and would look every pair's bias up
in the table, entry by entry: both cost more than the attention itself.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import load_rows, load_weight, norm_rows, store_rows


@triton.jit
def norm_kernel(
    x, weight, out, image,
    x_b, x_t, x_h, x_w, x_n, x_d, weight_d, image_b, image_t, T, H, W, heads, rows, norm_eps,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The LayerNorm of the rows of x [B, T, H, W, heads, dim], contiguous. Rows of image frames are left out."""
    program = tl.program_id(0)
    if WIDE:  # divisions of 64 bits take longer than the norm
        program = program.to(tl.int64)
    row = program * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    n = row % heads
    token = row // heads
    w = (token % W).to(tl.int64)
    h = (token // W % H).to(tl.int64)
    frame = token // W // H
    t = (frame % T).to(tl.int64)
    b = (frame // T).to(tl.int64)
    if image is not None:
        inside = inside & (tl.load(image + b * image_b + t * image_t, mask=inside, other=1) == 0)
    at = (b * x_b + t * x_t + h * x_h + w * x_w + n.to(tl.int64) * x_n) * UNIT
    w0, w1 = load_weight(weight, weight_d, DIM, D0, D1)
    x0, x1 = load_rows(x, at, inside, x_d, DIM, D0, D1, True)
    x0, x1 = norm_rows(x0, x1, weight, w0, w1, inside, norm_eps, DIM, D0, D1, False)
    store_rows(out, row.to(tl.int64) * DIM, inside, x0, x1, DIM, D0, D1)


@triton.jit
def bias_kernel(
    bias_table, bias, table_n, table_t, table_h, table_w, centre_t, centre_h, centre_w,
    N: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, PADDED: tl.constexpr, BY_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``bias`` [heads, PADDED, PADDED]: of (query, key), or of (key, query); zeros beyond N."""
    TILES: tl.constexpr = (PADDED + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    head = (program // TILES // TILES).to(tl.int64)
    row = program // TILES % TILES * BLOCK + tl.arange(0, BLOCK)
    column = program % TILES * BLOCK + tl.arange(0, BLOCK)
    query = column[None, :] if BY_KEYS else row[:, None]
    key = row[:, None] if BY_KEYS else column[None, :]
    t = query // (WH * WW) - key // (WH * WW) + centre_t
    h = query // WW % WH - key // WW % WH + centre_h
    w = query % WW - key % WW + centre_w
    at = head * table_n + t.to(tl.int64) * table_t + h * table_h + w * table_w
    entry = tl.load(bias_table + at, mask=(row < N)[:, None] & (column < N)[None, :], other=0.0)
    kind = bias.dtype.element_ty
    if kind == tl.float16:  # an infinite entry hides its pairs as well as the largest number
        entry = tl.minimum(tl.maximum(entry.to(tl.float32), -65504.0), 65504.0)
    out = bias + head * PADDED * PADDED + row[:, None] * PADDED + column[None, :]
    tl.store(out, entry.to(kind), mask=(row < PADDED)[:, None] & (column < PADDED)[None, :])
