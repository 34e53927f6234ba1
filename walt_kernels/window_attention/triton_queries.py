"""Gradient of the queries, and delta: one program per window, head and tile of queries."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import (
    add_rows,
    context_at,
    context_flags,
    context_from,
    context_rows,
    keys_end,
    load_lines,
    load_rows,
    load_weight,
    moving_frames,
    norm_backward,
    norm_rows,
    packed_lines,
    packed_of,
    packed_rows,
    probabilities,
    products,
    rows_from,
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
    video, L, scale, norm_eps, window, layout,
    PADDED: tl.constexpr, MASKED: tl.constexpr, NORMED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """delta and grad_q of one tile of queries; delta alone where neither ``grad_q`` nor ``partial`` is given.

    ``queries``, ``keys`` and ``context_keys`` are normed already where NORMED; ``q`` is not.
    """
    TILES: tl.constexpr = (window.N + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    start = program % TILES * BLOCK_M
    head = program // TILES % video.heads
    b, t0, h0, w0 = window_at(program // TILES // video.heads, video, window)
    moving = 0
    if image.at is not None:
        moving = moving_frames(image, b, t0, video, window)
    t, h, w, inside, still = tokens_at(start, b, t0, h0, w0, video, window, image, moving, BLOCK_M)
    seen = inside & ~still
    local = packed_of(t, h, w, video, layout)
    rows = packed_rows(b, t0, h0, w0, head, video, layout)
    lines = packed_lines(b, t0, h0, w0, head, video)
    if partial is not None:
        partial += program.to(tl.int64) * layout.DIM
    acc0 = tl.zeros([BLOCK_M, layout.D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, layout.D1 if layout.D1 > 0 else 1], tl.float32)
    if image.at is not None and moving == 0:
        if grad_q is not None:
            store_rows(grad_q + rows, local * (video.heads * layout.DIM), inside, acc0, acc1, layout)
        if partial is not None:
            store_row(partial, tl.sum(acc0, 0), tl.sum(acc1, 0), layout)
        return

    own_grad = rows_from(grad, b, t0, h0, w0, head, layout)
    g0, g1 = load_rows(own_grad, rows_of(t, h, w, grad, layout), seen, grad.d, layout, True)
    o0, o1 = load_rows(out + rows, local * (video.heads * layout.DIM), seen, 1, layout, True)
    each = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
    if layout.D1 > 0:
        each += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    tl.store(delta + lines + local, each, mask=inside)

    if grad_q is not None or partial is not None:
        own_q = rows_from(q, b, t0, h0, w0, head, layout)
        own_queries = rows_from(queries, b, t0, h0, w0, head, layout)
        own_keys = rows_from(keys, b, t0, h0, w0, head, layout)
        own_v = rows_from(v, b, t0, h0, w0, head, layout)
        w0q, w1q = load_weight(q_norm, layout)
        w0k, w1k = load_weight(k_norm, layout)
        at_q = rows_of(t, h, w, queries, layout)
        q0, q1 = load_rows(own_queries, at_q, seen, queries.d, layout, True)
        q0, q1 = norm_rows(q0, q1, q_norm, w0q, w1q, seen, norm_eps, layout, NORMED)
        best, log_total = load_lines(best_of, log_of, lines + local, seen, v.at)
        for first in range(0, keys_end(t0, video, window, MASKED), BLOCK_N):
            tk, hk, wk, inside_k, still_k = tokens_at(first, b, t0, h0, w0, video, window, image, moving, BLOCK_N)
            seen_k = inside_k & ~still_k
            at = rows_of(tk, hk, wk, keys, layout)
            k0, k1 = load_rows(own_keys, at, seen_k, keys.d, layout, MASKED)
            k0, k1 = norm_rows(k0, k1, k_norm, w0k, w1k, seen_k, norm_eps, layout, NORMED)
            s = products(q0, q1, k0, k1, layout, PRECISION)
            s = scores_of(s, scale, bias, head, start + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N), PADDED)
            if MASKED:
                s = tl.where(seen_k[None, :], s, float("-inf"))
            v0, v1 = load_rows(own_v, rows_of(tk, hk, wk, v, layout), seen_k, v.d, layout, MASKED)
            p = probabilities(s, best[:, None], log_total[:, None])
            ds = p * (products(g0, g1, v0, v1, layout, PRECISION) - each[:, None])
            acc0, acc1 = add_rows(acc0, acc1, ds, k0, k1, layout, PRECISION)
        if context_keys.at is not None:
            own_keys = context_from(context_keys, b, head, layout)
            own_v = context_from(context_v, b, head, layout)
            flags = context_flags(context_mask, b)
            for first in tl.range(0, L, BLOCK_N, num_stages=1):  # the mask is loaded in it
                n, _, seen_k = context_at(first, L, flags, context_mask, BLOCK_N)
                at = context_rows(n, context_keys.token, layout)
                k0, k1 = load_rows(own_keys, at, seen_k, context_keys.d, layout, True)
                k0, k1 = norm_rows(k0, k1, k_norm, w0k, w1k, seen_k, norm_eps, layout, NORMED)
                s = products(q0, q1, k0, k1, layout, PRECISION) * scale
                s = tl.where(seen_k[None, :], s, float("-inf"))
                at = context_rows(n, context_v.token, layout)
                v0, v1 = load_rows(own_v, at, seen_k, context_v.d, layout, True)
                p = probabilities(s, best[:, None], log_total[:, None])
                ds = p * (products(g0, g1, v0, v1, layout, PRECISION) - each[:, None])
                acc0, acc1 = add_rows(acc0, acc1, ds, k0, k1, layout, PRECISION)
        acc0 *= scale
        acc1 *= scale
        if q_norm.at is not None:
            w0q, w1q = load_weight(q_norm, layout)  # not kept in registers all along the loop
            q0, q1 = load_rows(own_q, rows_of(t, h, w, q, layout), seen, q.d, layout, True)
            acc0, acc1, part0, part1 = norm_backward(acc0, acc1, q0, q1, w0q, w1q, seen, norm_eps, layout)
            if partial is not None:
                store_row(partial, part0, part1, layout)
        if grad_q is not None:
            store_rows(grad_q + rows, local * (video.heads * layout.DIM), inside, acc0, acc1, layout)
