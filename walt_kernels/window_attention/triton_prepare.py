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
    x, weight, out, image, T, H, W, heads, rows, norm_eps, layout,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The LayerNorm of the rows of x [B, T, H, W, heads, dim], contiguous. Rows of image frames are left out."""
    program = tl.program_id(0)
    if layout.WIDE:  # divisions of 64 bits take longer than the norm
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
    if image.at is not None:
        inside = inside & (tl.load(image.at + b * image.b + t * image.t, mask=inside, other=1) == 0)
    at = (b * x.b + t * x.t + h * x.h + w * x.w + n.to(tl.int64) * x.n) * layout.UNIT
    w0, w1 = load_weight(weight, layout)
    x0, x1 = load_rows(x.at, at, inside, x.d, layout, True)
    x0, x1 = norm_rows(x0, x1, weight, w0, w1, inside, norm_eps, layout, False)
    store_rows(out, row.to(tl.int64) * layout.DIM, inside, x0, x1, layout)


@triton.jit
def bias_kernel(
    table, bias, centre_t, centre_h, centre_w, window,
    PADDED: tl.constexpr, BY_KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``bias`` [heads, PADDED, PADDED]: of (query, key), or of (key, query); zeros beyond N."""
    TILES: tl.constexpr = (PADDED + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    head = (program // TILES // TILES).to(tl.int64)
    row = program // TILES % TILES * BLOCK + tl.arange(0, BLOCK)
    column = program % TILES * BLOCK + tl.arange(0, BLOCK)
    query = column[None, :] if BY_KEYS else row[:, None]
    key = row[:, None] if BY_KEYS else column[None, :]
    t = query // (window.H * window.W) - key // (window.H * window.W) + centre_t
    h = query // window.W % window.H - key // window.W % window.H + centre_h
    w = query % window.W - key % window.W + centre_w
    at = head * table.n + t.to(tl.int64) * table.t + h * table.h + w * table.w
    entry = tl.load(table.at + at, mask=(row < window.N)[:, None] & (column < window.N)[None, :], other=0.0)
    kind = bias.dtype.element_ty
    if kind == tl.float16:  # an infinite entry hides its pairs as well as the largest number
        entry = tl.minimum(tl.maximum(entry.to(tl.float32), -65504.0), 65504.0)
    out = bias + head * PADDED * PADDED + row[:, None] * PADDED + column[None, :]
    tl.store(out, entry.to(kind), mask=(row < PADDED)[:, None] & (column < PADDED)[None, :])
