"""Forward of window attention: one program per window, head and tile of queries."""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .triton_geometry import Geometry
from .triton_rows import (
    add_rows,
    base_of,
    context_at,
    context_rows,
    keys_end,
    load_rows,
    load_weight,
    norm_rows,
    packed_base,
    place_of,
    probabilities,
    products,
    rows_of,
    scores_of,
    store_rows,
    tokens_at,
    window_at,
)


@triton.jit
def _softmax_step(s, best, total, acc0, acc1, v0, v1, D1, PRECISION: tl.constexpr):
    """One tile of keys of the online softmax."""
    new = tl.maximum(best, tl.max(s, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: exp2(-inf - 0) = 0, not NaN
    p = probabilities(s, shift[:, None], 0.0)
    fade = probabilities(best, shift, 0.0)
    total = total * fade + tl.sum(p, 1)
    acc0 = acc0 * fade[:, None]
    if D1 > 0:
        acc1 = acc1 * fade[:, None]
    acc0, acc1 = add_rows(acc0, acc1, p, v0, v1, D1, PRECISION)
    return new, total, acc0, acc1


@triton.jit
def forward_kernel(
    q, k, v, out, best_of, log_of, bias_table, image, q_norm, k_norm, context_k, context_v, context_mask,
    q_b, q_t, q_h, q_w, q_n, q_d, k_b, k_t, k_h, k_w, k_n, k_d, v_b, v_t, v_h, v_w, v_n, v_d,
    context_k_b, context_k_l, context_k_n, context_k_d, context_v_b, context_v_l, context_v_n, context_v_d,
    image_b, image_t, context_mask_b, context_mask_l,
    T, H, W, L, heads, windows_t, windows_h, windows_w, scale, norm_eps,
    N: tl.constexpr, WT: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, CENTRE: tl.constexpr, ENTRIES: tl.constexpr,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    start = program % TILES * BLOCK_M
    head = program // TILES % heads
    b, t0, h0, w0 = window_at(program // TILES // heads, windows_t, windows_h, windows_w, WT, WH, WW)
    if image is not None:
        image += b * image_b + t0 * image_t
    if bias_table is not None:
        bias_table += head * ENTRIES + CENTRE
    q += base_of(b, t0, h0, w0, head, q_b, q_t, q_h, q_w, q_n, UNIT)
    k += base_of(b, t0, h0, w0, head, k_b, k_t, k_h, k_w, k_n, UNIT)
    v += base_of(b, t0, h0, w0, head, v_b, v_t, v_h, v_w, v_n, UNIT)

    t, h, w, inside, still = tokens_at(start, t0, h0, w0, T, H, W, image, image_t, BLOCK_M, N, WH, WW)
    seen = inside & ~still
    own = place_of(t, h, w, SH, SW)
    w0q, w1q = load_weight(q_norm, DIM, D0, D1)
    w0k, w1k = load_weight(k_norm, DIM, D0, D1)
    q0, q1 = load_rows(q, rows_of(t, h, w, q_t, q_h, q_w, UNIT, WIDE), seen, q_d, DIM, D0, D1, True)
    q0, q1 = norm_rows(q0, q1, q_norm, w0q, w1q, seen, norm_eps, DIM, D0, D1)

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], tl.float32)
    for first in range(0, keys_end(t0, T, image, image_t, N, WT, WH, WW), BLOCK_N):
        tk, hk, wk, inside_k, still_k = tokens_at(first, t0, h0, w0, T, H, W, image, image_t, BLOCK_N, N, WH, WW)
        seen_k = inside_k & ~still_k
        k0, k1 = load_rows(k, rows_of(tk, hk, wk, k_t, k_h, k_w, UNIT, WIDE), seen_k, k_d, DIM, D0, D1, MASKED)
        k0, k1 = norm_rows(k0, k1, k_norm, w0k, w1k, seen_k, norm_eps, DIM, D0, D1)
        where = own[:, None] - place_of(tk, hk, wk, SH, SW)[None, :]
        s = scores_of(products(q0, q1, k0, k1, D1, PRECISION), scale, bias_table, where)
        if MASKED:
            s = tl.where(seen_k[None, :], s, float("-inf"))
        v0, v1 = load_rows(v, rows_of(tk, hk, wk, v_t, v_h, v_w, UNIT, WIDE), seen_k, v_d, DIM, D0, D1, MASKED)
        best, total, acc0, acc1 = _softmax_step(s, best, total, acc0, acc1, v0, v1, D1, PRECISION)
    if context_k is not None:
        context_k += (b.to(tl.int64) * context_k_b + head * context_k_n) * UNIT
        context_v += (b.to(tl.int64) * context_v_b + head * context_v_n) * UNIT
        if context_mask is not None:
            context_mask += b * context_mask_b
        for first in range(0, L, BLOCK_N):
            n, _, seen_k = context_at(first, L, context_mask, context_mask_l, BLOCK_N)
            k0, k1 = load_rows(
                context_k, context_rows(n, context_k_l, UNIT, WIDE), seen_k, context_k_d, DIM, D0, D1, True
            )
            k0, k1 = norm_rows(k0, k1, k_norm, w0k, w1k, seen_k, norm_eps, DIM, D0, D1)
            s = scores_of(products(q0, q1, k0, k1, D1, PRECISION), scale, None, None)
            s = tl.where(seen_k[None, :], s, float("-inf"))
            v0, v1 = load_rows(
                context_v, context_rows(n, context_v_l, UNIT, WIDE), seen_k, context_v_d, DIM, D0, D1, True
            )
            best, total, acc0, acc1 = _softmax_step(s, best, total, acc0, acc1, v0, v1, D1, PRECISION)

    local = rows_of(t, h, w, H * W, W, 1, 1, WIDE)
    rows = packed_base(b, t0, h0, w0, T, H, W)
    total = tl.where(total == 0, 1.0, total)  # 0 where no key was seen: image frames, tokens outside the video
    acc0 = acc0 / total[:, None]
    if D1 > 0:
        acc1 = acc1 / total[:, None]
    if image is not None:  # image frames: v as it is
        v0, v1 = load_rows(v, rows_of(t, h, w, v_t, v_h, v_w, UNIT, WIDE), still, v_d, DIM, D0, D1, True)
        acc0 = tl.where(still[:, None], v0.to(tl.float32), acc0)
        if D1 > 0:
            acc1 = tl.where(still[:, None], v1.to(tl.float32), acc1)
    store_rows(out + (rows * heads + head) * DIM, local * (heads * DIM), inside, acc0, acc1, DIM, D0, D1)
    lines = ((b.to(tl.int64) * heads + head) * T + t0) * H * W + h0 * W + w0
    tl.store(best_of + lines + local, tl.where(still, 0.0, best), mask=inside)
    tl.store(log_of + lines + local, tl.log2(total), mask=inside)


def forward(out: Tensor, lse: Tensor, **inputs: Any) -> None:
    """Out, and of every row's scores the largest and log2 of the sum of exp(score - largest): [2, B, heads, T, H, W].

    Added into one number they would lose the digits that say how a row with large scores is divided.
    """
    rows = {"out": out, "best_of": lse[0], "log_of": lse[1]}
    geometry = Geometry(inputs)
    tile = geometry.tile("forward")
    programs = geometry.windows * geometry.heads * -(-geometry.N // tile.blocks["BLOCK_M"])
    masked = geometry.masked(tile.blocks["BLOCK_N"])
    geometry.launch(forward_kernel, programs, tile, **rows, MASKED=masked)
