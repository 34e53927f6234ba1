"""Forward of window attention: one program per window, head and tile of queries."""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .triton_geometry import Geometry
from .triton_rows import (
    LOG2E,
    add_rows,
    base_of,
    context_at,
    context_rows,
    keys_end,
    load_rows,
    load_weight,
    moving_frames,
    norm_rows,
    packed_base,
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
    """One tile of keys of the online softmax; ``best`` is the largest score so far times log2(e)."""
    new = tl.maximum(best, tl.max(s, 1) * LOG2E)
    shift = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: exp2(-inf - 0) = 0, not NaN
    p = probabilities(s, shift[:, None], 0.0)
    fade = tl.exp2(best - shift)
    total = total * fade + tl.sum(p, 1)
    acc0 = acc0 * fade[:, None]
    if D1 > 0:
        acc1 = acc1 * fade[:, None]
    acc0, acc1 = add_rows(acc0, acc1, p, v0, v1, D1, PRECISION)
    return new, total, acc0, acc1


@triton.jit
def forward_kernel(
    q, keys, v, out, best_of, log_of, bias, image, q_norm, k_norm, context_keys, context_v, context_mask,
    q_b, q_t, q_h, q_w, q_n, q_d, keys_b, keys_t, keys_h, keys_w, keys_n, keys_d, v_b, v_t, v_h, v_w, v_n, v_d,
    context_keys_b, context_keys_l, context_keys_n, context_keys_d,
    context_v_b, context_v_l, context_v_n, context_v_d, q_norm_d, k_norm_d,
    image_b, image_t, context_mask_b, context_mask_l,
    T, H, W, L, heads, windows_t, windows_h, windows_w, scale, norm_eps,
    N: tl.constexpr, PADDED: tl.constexpr, WT: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr, NORMED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``keys`` and ``context_keys`` are normed already where NORMED."""
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    start = program % TILES * BLOCK_M
    head = program // TILES % heads
    b, t0, h0, w0 = window_at(program // TILES // heads, windows_t, windows_h, windows_w, WT, WH, WW)
    v += base_of(b, t0, h0, w0, head, v_b, v_t, v_h, v_w, v_n, UNIT)
    out += (packed_base(b, t0, h0, w0, T, H, W) * heads + head) * DIM
    lines = ((b.to(tl.int64) * heads + head) * T + t0) * H * W + h0 * W + w0
    moving = 0
    if image is not None:
        moving = moving_frames(image, image_b, image_t, b, t0, T, WT)
    t, h, w, inside, still = tokens_at(
        start, b, t0, h0, w0, T, H, W, image, image_b, image_t, moving, BLOCK_M, N, WT, WH, WW
    )
    local = rows_of(t, h, w, H * W, W, 1, 1, WIDE)
    at_v = rows_of(t, h, w, v_t, v_h, v_w, UNIT, WIDE)
    if image is not None and moving == 0:
        v0, v1 = load_rows(v, at_v, inside, v_d, DIM, D0, D1, True)
        store_rows(out, local * (heads * DIM), inside, v0, v1, DIM, D0, D1)
        return

    seen = inside & ~still
    q += base_of(b, t0, h0, w0, head, q_b, q_t, q_h, q_w, q_n, UNIT)
    keys += base_of(b, t0, h0, w0, head, keys_b, keys_t, keys_h, keys_w, keys_n, UNIT)
    w0q, w1q = load_weight(q_norm, q_norm_d, DIM, D0, D1)
    w0k, w1k = load_weight(k_norm, k_norm_d, DIM, D0, D1)
    q0, q1 = load_rows(q, rows_of(t, h, w, q_t, q_h, q_w, UNIT, WIDE), seen, q_d, DIM, D0, D1, True)
    q0, q1 = norm_rows(q0, q1, q_norm, w0q, w1q, seen, norm_eps, DIM, D0, D1, False)

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], tl.float32)
    for first in range(0, keys_end(t0, T, N, WT, WH, WW, MASKED), BLOCK_N):
        tk, hk, wk, inside_k, still_k = tokens_at(
            first, b, t0, h0, w0, T, H, W, image, image_b, image_t, moving, BLOCK_N, N, WT, WH, WW
        )
        seen_k = inside_k & ~still_k
        at = rows_of(tk, hk, wk, keys_t, keys_h, keys_w, UNIT, WIDE)
        k0, k1 = load_rows(keys, at, seen_k, keys_d, DIM, D0, D1, MASKED)
        k0, k1 = norm_rows(k0, k1, k_norm, w0k, w1k, seen_k, norm_eps, DIM, D0, D1, NORMED)
        s = products(q0, q1, k0, k1, D1, PRECISION)
        s = scores_of(s, scale, bias, head, start + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N), PADDED)
        if MASKED:
            s = tl.where(seen_k[None, :], s, float("-inf"))
        v0, v1 = load_rows(v, rows_of(tk, hk, wk, v_t, v_h, v_w, UNIT, WIDE), seen_k, v_d, DIM, D0, D1, MASKED)
        best, total, acc0, acc1 = _softmax_step(s, best, total, acc0, acc1, v0, v1, D1, PRECISION)
    if context_keys is not None:
        context_keys += (b.to(tl.int64) * context_keys_b + head * context_keys_n) * UNIT
        context_v += (b.to(tl.int64) * context_v_b + head * context_v_n) * UNIT
        if context_mask is not None:
            context_mask += b.to(tl.int64) * context_mask_b
        for first in tl.range(0, L, BLOCK_N, num_stages=1):  # the mask is loaded in it
            n, _, seen_k = context_at(first, L, context_mask, context_mask_l, BLOCK_N)
            at = context_rows(n, context_keys_l, UNIT, WIDE)
            k0, k1 = load_rows(context_keys, at, seen_k, context_keys_d, DIM, D0, D1, True)
            k0, k1 = norm_rows(k0, k1, k_norm, w0k, w1k, seen_k, norm_eps, DIM, D0, D1, NORMED)
            s = products(q0, q1, k0, k1, D1, PRECISION) * scale
            s = tl.where(seen_k[None, :], s, float("-inf"))
            at = context_rows(n, context_v_l, UNIT, WIDE)
            v0, v1 = load_rows(context_v, at, seen_k, context_v_d, DIM, D0, D1, True)
            best, total, acc0, acc1 = _softmax_step(s, best, total, acc0, acc1, v0, v1, D1, PRECISION)

    acc0 = acc0 / total[:, None]
    if D1 > 0:
        acc1 = acc1 / total[:, None]
    if image is not None:  # image frames: v as it is
        v0, v1 = load_rows(v, at_v, still, v_d, DIM, D0, D1, True)
        acc0 = tl.where(still[:, None], v0.to(tl.float32), acc0)
        if D1 > 0:
            acc1 = tl.where(still[:, None], v1.to(tl.float32), acc1)
    store_rows(out, local * (heads * DIM), inside, acc0, acc1, DIM, D0, D1)
    tl.store(best_of + lines + local, best, mask=inside)
    tl.store(log_of + lines + local, tl.log2(total), mask=inside)


def forward(out: Tensor, lse: Tensor, **inputs: Any) -> None:
    """Out, and of every row's scores the largest, and the sum of exp(score - largest): [2, B, heads, T, H, W].

    Both as log2. Added into one number they would lose the digits that say how a row with large scores is divided.
    """
    if out.numel() == 0:
        return
    geometry = Geometry(inputs)
    tile = geometry.tile("forward")
    geometry.norm("k", "k_norm", "keys")
    geometry.norm("context_k", "k_norm", "context_keys")
    bias = geometry.bias(tile)
    programs = geometry.windows * geometry.heads * -(-geometry.N // tile.blocks["BLOCK_M"])
    rows = {"out": out, "best_of": lse[0], "log_of": lse[1]}
    geometry.launch(forward_kernel, programs, tile, **rows, **bias, MASKED=geometry.masked(tile.blocks["BLOCK_N"]))
