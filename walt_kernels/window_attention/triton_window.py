"""Gradients of a whole window's queries, keys and values: one program per window and head, five products."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import (
    add_rows,
    base_of,
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
def window_backward_kernel(
    q, k, queries, keys, v, out, best_of, log_of, grad, bias, image, q_norm, k_norm,
    delta, grad_q, grad_k, grad_v, q_partial, k_partial, sums,
    q_b, q_t, q_h, q_w, q_n, q_d, k_b, k_t, k_h, k_w, k_n, k_d,
    queries_b, queries_t, queries_h, queries_w, queries_n, queries_d,
    keys_b, keys_t, keys_h, keys_w, keys_n, keys_d, v_b, v_t, v_h, v_w, v_n, v_d,
    grad_b, grad_t, grad_h, grad_w, grad_n, grad_d,
    q_norm_d, k_norm_d, image_b, image_t,
    T, H, W, heads, windows_t, windows_h, windows_w, scale, norm_eps,
    N: tl.constexpr, PADDED: tl.constexpr, WT: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr, NORMED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """delta, grad_q, grad_k, grad_v, and a row of each norm's partial sums.

    Tiles of keys hold their gradients in registers and add to those of the queries, which lie in ``sums``
    [programs, N in whole tiles, D0 + D1], float32: a program's own rows, in the order of the keys. ``queries`` and
    ``keys`` are normed already where NORMED; ``q`` and ``k`` are not. There is no context.
    """
    ROWS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    program = tl.program_id(0)
    head = program % heads
    b, t0, h0, w0 = window_at(program // heads, windows_t, windows_h, windows_w, WT, WH, WW)
    moving = 0
    if image is not None:
        moving = moving_frames(image, image_b, image_t, b, t0, T, WT)
    rows = (packed_base(b, t0, h0, w0, T, H, W) * heads + head) * DIM
    lines = ((b.to(tl.int64) * heads + head) * T + t0) * H * W + h0 * W + w0
    own_grad = grad + base_of(b, t0, h0, w0, head, grad_b, grad_t, grad_h, grad_w, grad_n, UNIT)
    q += base_of(b, t0, h0, w0, head, q_b, q_t, q_h, q_w, q_n, UNIT)
    k += base_of(b, t0, h0, w0, head, k_b, k_t, k_h, k_w, k_n, UNIT)
    queries += base_of(b, t0, h0, w0, head, queries_b, queries_t, queries_h, queries_w, queries_n, UNIT)
    keys += base_of(b, t0, h0, w0, head, keys_b, keys_t, keys_h, keys_w, keys_n, UNIT)
    v += base_of(b, t0, h0, w0, head, v_b, v_t, v_h, v_w, v_n, UNIT)
    sums += program.to(tl.int64) * ROWS * (D0 + D1)
    w0q, w1q = load_weight(q_norm, q_norm_d, DIM, D0, D1)
    w0k, w1k = load_weight(k_norm, k_norm_d, DIM, D0, D1)
    end = keys_end(t0, T, N, WT, WH, WW, MASKED)

    if image is not None and moving == 0:  # out = v
        for first in tl.range(0, N, BLOCK_M, num_stages=1):
            t, h, w, inside, still = tokens_at(
                first, b, t0, h0, w0, T, H, W, image, image_b, image_t, moving, BLOCK_M, N, WT, WH, WW
            )
            at = rows_of(t, h, w, H * W, W, 1, 1, WIDE) * (heads * DIM)
            g0, g1 = load_rows(
                own_grad, rows_of(t, h, w, grad_t, grad_h, grad_w, UNIT, WIDE), inside, grad_d, DIM, D0, D1, True
            )
            if grad_v is not None:
                store_rows(grad_v + rows, at, inside, g0, g1, DIM, D0, D1)
            g0 = tl.zeros([BLOCK_M, D0], tl.float32)
            g1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], tl.float32)
            if grad_q is not None:
                store_rows(grad_q + rows, at, inside, g0, g1, DIM, D0, D1)
            if grad_k is not None:
                store_rows(grad_k + rows, at, inside, g0, g1, DIM, D0, D1)
        end = 0

    for first in tl.range(0, end, BLOCK_M, num_stages=1):
        t, h, w, inside, still = tokens_at(
            first, b, t0, h0, w0, T, H, W, image, image_b, image_t, moving, BLOCK_M, N, WT, WH, WW
        )
        seen = inside & ~still
        local = rows_of(t, h, w, H * W, W, 1, 1, WIDE)
        g0, g1 = load_rows(
            own_grad, rows_of(t, h, w, grad_t, grad_h, grad_w, UNIT, WIDE), seen, grad_d, DIM, D0, D1, True
        )
        o0, o1 = load_rows(out + rows, local * (heads * DIM), seen, 1, DIM, D0, D1, True)
        each = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
        if D1 > 0:
            each += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
        tl.store(delta + lines + local, each, mask=inside)

    kp0 = tl.zeros([D0], tl.float32)
    kp1 = tl.zeros([D1 if D1 > 0 else 1], tl.float32)
    for start in tl.range(0, end, BLOCK_N, num_stages=1):
        tl.debug_barrier()  # what other threads of the program wrote to delta and sums
        tk, hk, wk, inside_k, still_k = tokens_at(
            start, b, t0, h0, w0, T, H, W, image, image_b, image_t, moving, BLOCK_N, N, WT, WH, WW
        )
        seen_k = inside_k & ~still_k
        at = rows_of(tk, hk, wk, keys_t, keys_h, keys_w, UNIT, WIDE)
        k0, k1 = load_rows(keys, at, seen_k, keys_d, DIM, D0, D1, True)
        k0, k1 = norm_rows(k0, k1, k_norm, w0k, w1k, seen_k, norm_eps, DIM, D0, D1, NORMED)
        v0, v1 = load_rows(v, rows_of(tk, hk, wk, v_t, v_h, v_w, UNIT, WIDE), seen_k, v_d, DIM, D0, D1, True)
        dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
        dk1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else 1], tl.float32)
        dv0 = tl.zeros([BLOCK_N, D0], tl.float32)
        dv1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else 1], tl.float32)
        for first in range(0, end, BLOCK_M):
            t, h, w, inside, still = tokens_at(
                first, b, t0, h0, w0, T, H, W, image, image_b, image_t, moving, BLOCK_M, N, WT, WH, WW
            )
            seen = inside & ~still
            local = lines + rows_of(t, h, w, H * W, W, 1, 1, WIDE)
            best, log_total = load_lines(best_of, log_of, local, seen, v)
            each = tl.load(delta + local, mask=seen, other=0.0)
            at_q = rows_of(t, h, w, queries_t, queries_h, queries_w, UNIT, WIDE)
            q0, q1 = load_rows(queries, at_q, seen, queries_d, DIM, D0, D1, MASKED)
            q0, q1 = norm_rows(q0, q1, q_norm, w0q, w1q, seen, norm_eps, DIM, D0, D1, NORMED)
            at_g = rows_of(t, h, w, grad_t, grad_h, grad_w, UNIT, WIDE)
            s = products(q0, q1, k0, k1, D1, PRECISION)
            s = scores_of(s, scale, bias, head, first + tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_N), PADDED)
            p = probabilities(s, best[:, None], log_total[:, None])
            if MASKED:
                p = tl.where(seen_k[None, :], p, 0.0)
            g0, g1 = load_rows(own_grad, at_g, seen, grad_d, DIM, D0, D1, MASKED)
            dv0, dv1 = add_rows(dv0, dv1, tl.trans(p.to(q0.dtype)), g0, g1, D1, PRECISION)
            ds = (p * (products(g0, g1, v0, v1, D1, PRECISION) - each[:, None])).to(q0.dtype)
            dk0, dk1 = add_rows(dk0, dk1, tl.trans(ds), q0, q1, D1, PRECISION)
            part = sums + (first + tl.arange(0, BLOCK_M))[:, None] * (D0 + D1)
            at_d = part + tl.arange(0, D0)[None, :]
            total = tl.load(at_d, mask=start > 0, other=0.0)
            tl.store(at_d, tl.dot(ds, k0, total, input_precision=PRECISION))
            if D1 > 0:
                at_d = part + (D0 + tl.arange(0, D1))[None, :]
                total = tl.load(at_d, mask=start > 0, other=0.0)
                tl.store(at_d, tl.dot(ds, k1, total, input_precision=PRECISION))
        at_own = rows_of(tk, hk, wk, H * W, W, 1, 1, WIDE) * (heads * DIM)
        if grad_v is not None:
            if image is not None:  # image frames: out = v
                at_g = rows_of(tk, hk, wk, grad_t, grad_h, grad_w, UNIT, WIDE)
                x0, x1 = load_rows(own_grad, at_g, still_k, grad_d, DIM, D0, D1, True)
                dv0 = tl.where(still_k[:, None], x0.to(tl.float32), dv0)
                if D1 > 0:
                    dv1 = tl.where(still_k[:, None], x1.to(tl.float32), dv1)
            store_rows(grad_v + rows, at_own, inside_k, dv0, dv1, DIM, D0, D1)
        dk0 *= scale
        dk1 *= scale
        if k_norm is not None:
            at_k = rows_of(tk, hk, wk, k_t, k_h, k_w, UNIT, WIDE)
            x0, x1 = load_rows(k, at_k, seen_k, k_d, DIM, D0, D1, True)
            y0, y1 = load_weight(k_norm, k_norm_d, DIM, D0, D1)  # not kept in registers all along the loop
            dk0, dk1, more0, more1 = norm_backward(dk0, dk1, x0, x1, y0, y1, seen_k, norm_eps, DIM, D0, D1)
            kp0 += more0
            kp1 += more1
        if grad_k is not None:
            store_rows(grad_k + rows, at_own, inside_k, dk0, dk1, DIM, D0, D1)
    if k_partial is not None:
        store_row(k_partial + program.to(tl.int64) * DIM, kp0, kp1, DIM, D0, D1)

    if grad_q is not None or q_partial is not None:
        tl.debug_barrier()
        w0q, w1q = load_weight(q_norm, q_norm_d, DIM, D0, D1)
        kp0 = tl.zeros([D0], tl.float32)
        kp1 = tl.zeros([D1 if D1 > 0 else 1], tl.float32)
        for first in tl.range(0, end, BLOCK_M, num_stages=1):
            t, h, w, inside, still = tokens_at(
                first, b, t0, h0, w0, T, H, W, image, image_b, image_t, moving, BLOCK_M, N, WT, WH, WW
            )
            seen = inside & ~still
            local = rows_of(t, h, w, H * W, W, 1, 1, WIDE)
            own = (first + tl.arange(0, BLOCK_M)) * (D0 + D1)
            dq0 = tl.load(sums + (own[:, None] + tl.arange(0, D0)[None, :])) * scale
            dq1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 1], tl.float32)
            if D1 > 0:
                dq1 = tl.load(sums + (own[:, None] + D0 + tl.arange(0, D1)[None, :])) * scale
            if q_norm is not None:
                at = rows_of(t, h, w, q_t, q_h, q_w, UNIT, WIDE)
                q0, q1 = load_rows(q, at, seen, q_d, DIM, D0, D1, True)
                dq0, dq1, more0, more1 = norm_backward(dq0, dq1, q0, q1, w0q, w1q, seen, norm_eps, DIM, D0, D1)
                kp0 += more0
                kp1 += more1
            if grad_q is not None:
                store_rows(grad_q + rows, local * (heads * DIM), inside, dq0, dq1, DIM, D0, D1)
        if q_partial is not None:
            store_row(q_partial + program.to(tl.int64) * DIM, kp0, kp1, DIM, D0, D1)
