"""Gradient of the queries, and delta: one program per window, head and tile of queries."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import (
    add_rows,
    base_of,
    context_at,
    context_rows,
    keys_end,
    load_lines,
    load_rows,
    load_weight,
    moving_frames,
    norm_backward,
    norm_rows,
    packed_base,
    probabilities,
    products,
    rows_of,
    scores_of,
    store_row,
    store_rows,
    tokens_at,
    window_at,
)


@triton.jit
def query_backward_kernel(
    q, queries, keys, v, out, best_of, log_of, grad, bias, image, q_norm, k_norm,
    context_keys, context_v, context_mask, delta, grad_q, partial,
    q_b, q_t, q_h, q_w, q_n, q_d, queries_b, queries_t, queries_h, queries_w, queries_n, queries_d,
    keys_b, keys_t, keys_h, keys_w, keys_n, keys_d, v_b, v_t, v_h, v_w, v_n, v_d,
    grad_b, grad_t, grad_h, grad_w, grad_n, grad_d,
    context_keys_b, context_keys_l, context_keys_n, context_keys_d,
    context_v_b, context_v_l, context_v_n, context_v_d, q_norm_d, k_norm_d,
    image_b, image_t, context_mask_b, context_mask_l,
    T, H, W, L, heads, windows_t, windows_h, windows_w, scale, norm_eps,
    N: tl.constexpr, PADDED: tl.constexpr, WT: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr, NORMED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """delta and grad_q of one tile of queries; delta alone where neither ``grad_q`` nor ``partial`` is given.

    ``queries``, ``keys`` and ``context_keys`` are normed already where NORMED; ``q`` is not.
    """
    TILES: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    start = program % TILES * BLOCK_M
    head = program // TILES % heads
    b, t0, h0, w0 = window_at(program // TILES // heads, windows_t, windows_h, windows_w, WT, WH, WW)
    moving = 0
    if image is not None:
        moving = moving_frames(image, image_b, image_t, b, t0, T, WT)
    t, h, w, inside, still = tokens_at(
        start, b, t0, h0, w0, T, H, W, image, image_b, image_t, moving, BLOCK_M, N, WT, WH, WW
    )
    seen = inside & ~still
    local = rows_of(t, h, w, H * W, W, 1, 1, WIDE)
    rows = (packed_base(b, t0, h0, w0, T, H, W) * heads + head) * DIM
    lines = ((b.to(tl.int64) * heads + head) * T + t0) * H * W + h0 * W + w0
    if partial is not None:
        partial += program.to(tl.int64) * DIM
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], tl.float32)
    if image is not None and moving == 0:
        if grad_q is not None:
            store_rows(grad_q + rows, local * (heads * DIM), inside, acc0, acc1, DIM, D0, D1)
        if partial is not None:
            store_row(partial, tl.sum(acc0, 0), tl.sum(acc1, 0), DIM, D0, D1)
        return

    grad += base_of(b, t0, h0, w0, head, grad_b, grad_t, grad_h, grad_w, grad_n, UNIT)
    g0, g1 = load_rows(grad, rows_of(t, h, w, grad_t, grad_h, grad_w, UNIT, WIDE), seen, grad_d, DIM, D0, D1, True)
    o0, o1 = load_rows(out + rows, local * (heads * DIM), seen, 1, DIM, D0, D1, True)
    each = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
    if D1 > 0:
        each += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    tl.store(delta + lines + local, each, mask=inside)

    if grad_q is not None or partial is not None:
        q += base_of(b, t0, h0, w0, head, q_b, q_t, q_h, q_w, q_n, UNIT)
        queries += base_of(b, t0, h0, w0, head, queries_b, queries_t, queries_h, queries_w, queries_n, UNIT)
        keys += base_of(b, t0, h0, w0, head, keys_b, keys_t, keys_h, keys_w, keys_n, UNIT)
        v += base_of(b, t0, h0, w0, head, v_b, v_t, v_h, v_w, v_n, UNIT)
        w0q, w1q = load_weight(q_norm, q_norm_d, DIM, D0, D1)
        w0k, w1k = load_weight(k_norm, k_norm_d, DIM, D0, D1)
        at_q = rows_of(t, h, w, queries_t, queries_h, queries_w, UNIT, WIDE)
        q0, q1 = load_rows(queries, at_q, seen, queries_d, DIM, D0, D1, True)
        q0, q1 = norm_rows(q0, q1, q_norm, w0q, w1q, seen, norm_eps, DIM, D0, D1, NORMED)
        best, log_total = load_lines(best_of, log_of, lines + local, seen, v)
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
            p = probabilities(s, best[:, None], log_total[:, None])
            ds = p * (products(g0, g1, v0, v1, D1, PRECISION) - each[:, None])
            acc0, acc1 = add_rows(acc0, acc1, ds, k0, k1, D1, PRECISION)
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
                p = probabilities(s, best[:, None], log_total[:, None])
                ds = p * (products(g0, g1, v0, v1, D1, PRECISION) - each[:, None])
                acc0, acc1 = add_rows(acc0, acc1, ds, k0, k1, D1, PRECISION)
        acc0 *= scale
        acc1 *= scale
        if q_norm is not None:
            w0q, w1q = load_weight(q_norm, q_norm_d, DIM, D0, D1)  # not kept in registers all along the loop
            q0, q1 = load_rows(q, rows_of(t, h, w, q_t, q_h, q_w, UNIT, WIDE), seen, q_d, DIM, D0, D1, True)
            acc0, acc1, part0, part1 = norm_backward(acc0, acc1, q0, q1, w0q, w1q, seen, norm_eps, DIM, D0, D1)
            if partial is not None:
                store_row(partial, part0, part1, DIM, D0, D1)
        if grad_q is not None:
            store_rows(grad_q + rows, local * (heads * DIM), inside, acc0, acc1, DIM, D0, D1)
