"""Gradients of a whole window's queries, keys and values: one program per window and head, five products."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import (
    add_rows,
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
def window_backward_kernel(
    q, k, queries, keys, v, out, best_of, log_of, grad, bias, image, q_norm, k_norm,
    delta, grad_q, grad_k, grad_v, q_partial, k_partial, sums,
    video, scale, norm_eps, window, layout,
    PADDED: tl.constexpr, MASKED: tl.constexpr, NORMED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """delta, grad_q, grad_k, grad_v, and a row of each norm's partial sums.

    Tiles of keys hold their gradients in registers and add to those of the queries, which lie in ``sums``
    [programs, N in whole tiles, D0 + D1], float32: a program's own rows, in the order of the keys. ``queries`` and
    ``keys`` are normed already where NORMED; ``q`` and ``k`` are not. There is no context.
    """
    ROWS: tl.constexpr = (window.N + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    program = tl.program_id(0)
    head = program % video.heads
    b, t0, h0, w0 = window_at(program // video.heads, video, window)
    moving = 0
    if image.at is not None:
        moving = moving_frames(image, b, t0, video, window)
    rows = packed_rows(b, t0, h0, w0, head, video, layout)
    lines = packed_lines(b, t0, h0, w0, head, video)
    own_grad = rows_from(grad, b, t0, h0, w0, head, layout)
    own_q = rows_from(q, b, t0, h0, w0, head, layout)
    own_k = rows_from(k, b, t0, h0, w0, head, layout)
    own_queries = rows_from(queries, b, t0, h0, w0, head, layout)
    own_keys = rows_from(keys, b, t0, h0, w0, head, layout)
    own_v = rows_from(v, b, t0, h0, w0, head, layout)
    sums += program.to(tl.int64) * ROWS * (layout.D0 + layout.D1)
    w0q, w1q = load_weight(q_norm, layout)
    w0k, w1k = load_weight(k_norm, layout)
    end = keys_end(t0, video, window, MASKED)

    if image.at is not None and moving == 0:  # out = v
        for first in tl.range(0, window.N, BLOCK_M, num_stages=1):
            t, h, w, inside, still = tokens_at(first, b, t0, h0, w0, video, window, image, moving, BLOCK_M)
            at = packed_of(t, h, w, video, layout) * (video.heads * layout.DIM)
            g0, g1 = load_rows(own_grad, rows_of(t, h, w, grad, layout), inside, grad.d, layout, True)
            if grad_v is not None:
                store_rows(grad_v + rows, at, inside, g0, g1, layout)
            g0 = tl.zeros([BLOCK_M, layout.D0], tl.float32)
            g1 = tl.zeros([BLOCK_M, layout.D1 if layout.D1 > 0 else 1], tl.float32)
            if grad_q is not None:
                store_rows(grad_q + rows, at, inside, g0, g1, layout)
            if grad_k is not None:
                store_rows(grad_k + rows, at, inside, g0, g1, layout)
        end = 0

    for first in tl.range(0, end, BLOCK_M, num_stages=1):
        t, h, w, inside, still = tokens_at(first, b, t0, h0, w0, video, window, image, moving, BLOCK_M)
        seen = inside & ~still
        local = packed_of(t, h, w, video, layout)
        g0, g1 = load_rows(own_grad, rows_of(t, h, w, grad, layout), seen, grad.d, layout, True)
        o0, o1 = load_rows(out + rows, local * (video.heads * layout.DIM), seen, 1, layout, True)
        each = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
        if layout.D1 > 0:
            each += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
        tl.store(delta + lines + local, each, mask=inside)

    kp0 = tl.zeros([layout.D0], tl.float32)
    kp1 = tl.zeros([layout.D1 if layout.D1 > 0 else 1], tl.float32)
    for start in tl.range(0, end, BLOCK_N, num_stages=1):
        tl.debug_barrier()  # what other threads of the program wrote to delta and sums
        tk, hk, wk, inside_k, still_k = tokens_at(start, b, t0, h0, w0, video, window, image, moving, BLOCK_N)
        seen_k = inside_k & ~still_k
        at = rows_of(tk, hk, wk, keys, layout)
        k0, k1 = load_rows(own_keys, at, seen_k, keys.d, layout, True)
        k0, k1 = norm_rows(k0, k1, k_norm, w0k, w1k, seen_k, norm_eps, layout, NORMED)
        v0, v1 = load_rows(own_v, rows_of(tk, hk, wk, v, layout), seen_k, v.d, layout, True)
        dk0 = tl.zeros([BLOCK_N, layout.D0], tl.float32)
        dk1 = tl.zeros([BLOCK_N, layout.D1 if layout.D1 > 0 else 1], tl.float32)
        dv0 = tl.zeros([BLOCK_N, layout.D0], tl.float32)
        dv1 = tl.zeros([BLOCK_N, layout.D1 if layout.D1 > 0 else 1], tl.float32)
        for first in range(0, end, BLOCK_M):
            t, h, w, inside, still = tokens_at(first, b, t0, h0, w0, video, window, image, moving, BLOCK_M)
            seen = inside & ~still
            local = lines + packed_of(t, h, w, video, layout)
            best, log_total = load_lines(best_of, log_of, local, seen, v.at)
            each = tl.load(delta + local, mask=seen, other=0.0)
            at_q = rows_of(t, h, w, queries, layout)
            q0, q1 = load_rows(own_queries, at_q, seen, queries.d, layout, MASKED)
            q0, q1 = norm_rows(q0, q1, q_norm, w0q, w1q, seen, norm_eps, layout, NORMED)
            at_g = rows_of(t, h, w, grad, layout)
            s = products(q0, q1, k0, k1, layout, PRECISION)
            s = scores_of(s, scale, bias, head, first + tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_N), PADDED)
            p = probabilities(s, best[:, None], log_total[:, None])
            if MASKED:
                p = tl.where(seen_k[None, :], p, 0.0)
            g0, g1 = load_rows(own_grad, at_g, seen, grad.d, layout, MASKED)
            dv0, dv1 = add_rows(dv0, dv1, tl.trans(p.to(q0.dtype)), g0, g1, layout, PRECISION)
            ds = (p * (products(g0, g1, v0, v1, layout, PRECISION) - each[:, None])).to(q0.dtype)
            dk0, dk1 = add_rows(dk0, dk1, tl.trans(ds), q0, q1, layout, PRECISION)
            part = sums + (first + tl.arange(0, BLOCK_M))[:, None] * (layout.D0 + layout.D1)
            at_d = part + tl.arange(0, layout.D0)[None, :]
            total = tl.load(at_d, mask=start > 0, other=0.0)
            tl.store(at_d, tl.dot(ds, k0, total, input_precision=PRECISION))
            if layout.D1 > 0:
                at_d = part + (tl.arange(0, layout.D1) + layout.D0)[None, :]
                total = tl.load(at_d, mask=start > 0, other=0.0)
                tl.store(at_d, tl.dot(ds, k1, total, input_precision=PRECISION))
        at_own = packed_of(tk, hk, wk, video, layout) * (video.heads * layout.DIM)
        if grad_v is not None:
            if image.at is not None:  # image frames: out = v
                at_g = rows_of(tk, hk, wk, grad, layout)
                x0, x1 = load_rows(own_grad, at_g, still_k, grad.d, layout, True)
                dv0 = tl.where(still_k[:, None], x0.to(tl.float32), dv0)
                if layout.D1 > 0:
                    dv1 = tl.where(still_k[:, None], x1.to(tl.float32), dv1)
            store_rows(grad_v + rows, at_own, inside_k, dv0, dv1, layout)
        dk0 *= scale
        dk1 *= scale
        if k_norm.at is not None:
            at_k = rows_of(tk, hk, wk, k, layout)
            x0, x1 = load_rows(own_k, at_k, seen_k, k.d, layout, True)
            y0, y1 = load_weight(k_norm, layout)  # not kept in registers all along the loop
            dk0, dk1, more0, more1 = norm_backward(dk0, dk1, x0, x1, y0, y1, seen_k, norm_eps, layout)
            kp0 += more0
            kp1 += more1
        if grad_k is not None:
            store_rows(grad_k + rows, at_own, inside_k, dk0, dk1, layout)
    if k_partial is not None:
        store_row(k_partial + program.to(tl.int64) * layout.DIM, kp0, kp1, layout)

    if grad_q is not None or q_partial is not None:
        tl.debug_barrier()
        w0q, w1q = load_weight(q_norm, layout)
        kp0 = tl.zeros([layout.D0], tl.float32)
        kp1 = tl.zeros([layout.D1 if layout.D1 > 0 else 1], tl.float32)
        for first in tl.range(0, end, BLOCK_M, num_stages=1):
            t, h, w, inside, still = tokens_at(first, b, t0, h0, w0, video, window, image, moving, BLOCK_M)
            seen = inside & ~still
            local = packed_of(t, h, w, video, layout)
            own = (first + tl.arange(0, BLOCK_M)) * (layout.D0 + layout.D1)
            dq0 = tl.load(sums + (own[:, None] + tl.arange(0, layout.D0)[None, :])) * scale
            dq1 = tl.zeros([BLOCK_M, layout.D1 if layout.D1 > 0 else 1], tl.float32)
            if layout.D1 > 0:
                dq1 = tl.load(sums + (own[:, None] + layout.D0 + tl.arange(0, layout.D1)[None, :])) * scale
            if q_norm.at is not None:
                at = rows_of(t, h, w, q, layout)
                q0, q1 = load_rows(own_q, at, seen, q.d, layout, True)
                dq0, dq1, more0, more1 = norm_backward(dq0, dq1, q0, q1, w0q, w1q, seen, norm_eps, layout)
                kp0 += more0
                kp1 += more1
            if grad_q is not None:
                store_rows(grad_q + rows, local * (video.heads * layout.DIM), inside, dq0, dq1, layout)
        if q_partial is not None:
            store_row(q_partial + program.to(tl.int64) * layout.DIM, kp0, kp1, layout)
