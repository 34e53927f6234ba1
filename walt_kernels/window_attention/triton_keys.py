"""Gradients of keys and values, a window's own and the context's: one program per tile of keys."""

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
def key_backward_kernel(
    k, queries, keys, v, best_of, log_of, delta, grad, bias, image, q_norm, k_norm,
    context_keys, context_v, context_mask, grad_k, grad_v, partial, sums,
    k_b, k_t, k_h, k_w, k_n, k_d, queries_b, queries_t, queries_h, queries_w, queries_n, queries_d,
    keys_b, keys_t, keys_h, keys_w, keys_n, keys_d, v_b, v_t, v_h, v_w, v_n, v_d,
    grad_b, grad_t, grad_h, grad_w, grad_n, grad_d,
    context_keys_b, context_keys_l, context_keys_n, context_keys_d,
    context_v_b, context_v_l, context_v_n, context_v_d, q_norm_d, k_norm_d,
    image_b, image_t, context_mask_b, context_mask_l,
    B, T, H, W, L, heads, windows_t, windows_h, windows_w, parts, scale, norm_eps,
    N: tl.constexpr, PADDED: tl.constexpr, WT: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr, NORMED: tl.constexpr, CONTEXT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v of one tile of keys: a window's own, or (CONTEXT) the context's over a part of the windows.

    The context's are gradients of the normed keys, in float32, one block of ``sums`` [parts, 2, B, heads, L, dim] each.
    ``queries``, ``keys`` and ``context_keys`` are normed already where NORMED; ``k`` is not. ``bias`` is by key.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(L, BLOCK_N) if CONTEXT else (N + BLOCK_N - 1) // BLOCK_N
    start = program % tiles * BLOCK_N
    head = program // tiles % heads
    group = program // tiles // heads
    w0q, w1q = load_weight(q_norm, q_norm_d, DIM, D0, D1)
    w0k, w1k = load_weight(k_norm, k_norm_d, DIM, D0, D1)
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dk1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else 1], tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dv1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else 1], tl.float32)
    moving = 0
    if CONTEXT:  # never beside images
        b = group // parts
        part = group % parts
        per_sample = windows_t * windows_h * windows_w
        first_window = b * per_sample + (part * per_sample) // parts
        last_window = b * per_sample + ((part + 1) * per_sample) // parts
        if context_mask is not None:
            context_mask += b.to(tl.int64) * context_mask_b
        n, inside_k, seen_k = context_at(start, L, context_mask, context_mask_l, BLOCK_N)
        keys = context_keys + (b.to(tl.int64) * context_keys_b + head * context_keys_n) * UNIT
        v = context_v + (b.to(tl.int64) * context_v_b + head * context_v_n) * UNIT
        k0, k1 = load_rows(keys, context_rows(n, context_keys_l, UNIT, WIDE), seen_k, context_keys_d, DIM, D0, D1, True)
        v0, v1 = load_rows(v, context_rows(n, context_v_l, UNIT, WIDE), seen_k, context_v_d, DIM, D0, D1, True)
    else:
        first_window = group
        last_window = group + 1
        b, t0, h0, w0 = window_at(group, windows_t, windows_h, windows_w, WT, WH, WW)
        if image is not None:
            moving = moving_frames(image, image_b, image_t, b, t0, T, WT)
        tk, hk, wk, inside_k, still_k = tokens_at(
            start, b, t0, h0, w0, T, H, W, image, image_b, image_t, moving, BLOCK_N, N, WT, WH, WW
        )
        seen_k = inside_k & ~still_k
        own_grad = grad + base_of(b, t0, h0, w0, head, grad_b, grad_t, grad_h, grad_w, grad_n, UNIT)
        at_grad = rows_of(tk, hk, wk, grad_t, grad_h, grad_w, UNIT, WIDE)
        rows = (packed_base(b, t0, h0, w0, T, H, W) * heads + head) * DIM
        at_own = rows_of(tk, hk, wk, H * W, W, 1, 1, WIDE) * (heads * DIM)
        if partial is not None:
            partial += program.to(tl.int64) * DIM
        if image is not None and moving == 0:  # out = v
            if grad_v is not None:
                g0, g1 = load_rows(own_grad, at_grad, inside_k, grad_d, DIM, D0, D1, True)
                store_rows(grad_v + rows, at_own, inside_k, g0, g1, DIM, D0, D1)
            if grad_k is not None:
                store_rows(grad_k + rows, at_own, inside_k, dk0, dk1, DIM, D0, D1)
            if partial is not None:
                store_row(partial, tl.sum(dk0, 0), tl.sum(dk1, 0), DIM, D0, D1)
            return
        keys += base_of(b, t0, h0, w0, head, keys_b, keys_t, keys_h, keys_w, keys_n, UNIT)
        v += base_of(b, t0, h0, w0, head, v_b, v_t, v_h, v_w, v_n, UNIT)
        at = rows_of(tk, hk, wk, keys_t, keys_h, keys_w, UNIT, WIDE)
        k0, k1 = load_rows(keys, at, seen_k, keys_d, DIM, D0, D1, True)
        v0, v1 = load_rows(v, rows_of(tk, hk, wk, v_t, v_h, v_w, UNIT, WIDE), seen_k, v_d, DIM, D0, D1, True)
    k0, k1 = norm_rows(k0, k1, k_norm, w0k, w1k, seen_k, norm_eps, DIM, D0, D1, NORMED)

    for window in range(first_window, last_window):
        b, t0, h0, w0 = window_at(window, windows_t, windows_h, windows_w, WT, WH, WW)
        many = queries + base_of(b, t0, h0, w0, head, queries_b, queries_t, queries_h, queries_w, queries_n, UNIT)
        grads = grad + base_of(b, t0, h0, w0, head, grad_b, grad_t, grad_h, grad_w, grad_n, UNIT)
        lines = ((b.to(tl.int64) * heads + head) * T + t0) * H * W + h0 * W + w0
        for first in range(0, keys_end(t0, T, N, WT, WH, WW, MASKED), BLOCK_M):
            t, h, w, inside, still = tokens_at(
                first, b, t0, h0, w0, T, H, W, image, image_b, image_t, moving, BLOCK_M, N, WT, WH, WW
            )
            seen = inside & ~still
            local = lines + rows_of(t, h, w, H * W, W, 1, 1, WIDE)
            best, log_total = load_lines(best_of, log_of, local, seen, v)
            each = tl.load(delta + local, mask=seen, other=0.0)
            at_q = rows_of(t, h, w, queries_t, queries_h, queries_w, UNIT, WIDE)
            q0, q1 = load_rows(many, at_q, seen, queries_d, DIM, D0, D1, MASKED)
            q0, q1 = norm_rows(q0, q1, q_norm, w0q, w1q, seen, norm_eps, DIM, D0, D1, NORMED)
            s = products(k0, k1, q0, q1, D1, PRECISION)
            s = scores_of(s, scale, bias, head, start + tl.arange(0, BLOCK_N), first + tl.arange(0, BLOCK_M), PADDED)
            p = probabilities(s, best[None, :], log_total[None, :])
            p = tl.where(seen_k[:, None], p, 0.0)
            at_g = rows_of(t, h, w, grad_t, grad_h, grad_w, UNIT, WIDE)
            g0, g1 = load_rows(grads, at_g, seen, grad_d, DIM, D0, D1, MASKED)
            dv0, dv1 = add_rows(dv0, dv1, p, g0, g1, D1, PRECISION)
            ds = p * (products(v0, v1, g0, g1, D1, PRECISION) - each[None, :])
            dk0, dk1 = add_rows(dk0, dk1, ds, q0, q1, D1, PRECISION)
    dk0 *= scale
    dk1 *= scale

    if CONTEXT:
        block = (part.to(tl.int64) * 2 * B + b) * heads + head
        at = context_rows(n, DIM, 1, WIDE)
        store_rows(sums + block * L * DIM, at, inside_k, dk0, dk1, DIM, D0, D1)
        block += B * heads
        store_rows(sums + block * L * DIM, at, inside_k, dv0, dv1, DIM, D0, D1)
    else:
        if grad_v is not None:
            if image is not None:  # image frames: out = v
                g0, g1 = load_rows(own_grad, at_grad, still_k, grad_d, DIM, D0, D1, True)
                dv0 = tl.where(still_k[:, None], g0.to(tl.float32), dv0)
                if D1 > 0:
                    dv1 = tl.where(still_k[:, None], g1.to(tl.float32), dv1)
            store_rows(grad_v + rows, at_own, inside_k, dv0, dv1, DIM, D0, D1)
        if k_norm is not None:
            k += base_of(b, t0, h0, w0, head, k_b, k_t, k_h, k_w, k_n, UNIT)
            w0k, w1k = load_weight(k_norm, k_norm_d, DIM, D0, D1)  # not kept in registers all along the loop
            k0, k1 = load_rows(k, rows_of(tk, hk, wk, k_t, k_h, k_w, UNIT, WIDE), seen_k, k_d, DIM, D0, D1, True)
            dk0, dk1, part0, part1 = norm_backward(dk0, dk1, k0, k1, w0k, w1k, seen_k, norm_eps, DIM, D0, D1)
            if partial is not None:
                store_row(partial, part0, part1, DIM, D0, D1)
        if grad_k is not None:
            store_rows(grad_k + rows, at_own, inside_k, dk0, dk1, DIM, D0, D1)


@triton.jit
def context_finish_kernel(
    sums, k_norm, context_k, grad_k, grad_v, partial, context_k_b, context_k_l, context_k_n, context_k_d,
    k_norm_d, B, L, heads, parts, norm_eps,
    DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the parts of the context's gradients, and takes that of the keys through the norm."""
    program = tl.program_id(0)
    tiles = tl.cdiv(L, BLOCK)
    n = program % tiles * BLOCK + tl.arange(0, BLOCK)
    head = program // tiles % heads
    b = program // tiles // heads
    inside = n < L
    rows = context_rows(n, DIM, 1, WIDE)
    half = tl.full([], DIM, tl.int64) * B * heads * L  # of the keys, then of the values
    sums += (b.to(tl.int64) * heads + head) * L * DIM
    dk0 = tl.zeros([BLOCK, D0], tl.float32)
    dk1 = tl.zeros([BLOCK, D1 if D1 > 0 else 1], tl.float32)
    dv0 = tl.zeros([BLOCK, D0], tl.float32)
    dv1 = tl.zeros([BLOCK, D1 if D1 > 0 else 1], tl.float32)
    for _ in range(0, parts):
        x0, x1 = load_rows(sums, rows, inside, 1, DIM, D0, D1, True)
        dk0 += x0
        if D1 > 0:
            dk1 += x1
        x0, x1 = load_rows(sums + half, rows, inside, 1, DIM, D0, D1, True)
        dv0 += x0
        if D1 > 0:
            dv1 += x1
        sums += 2 * half
    if k_norm is not None:
        context_k += (b.to(tl.int64) * context_k_b + head * context_k_n) * UNIT
        k0, k1 = load_rows(context_k, context_rows(n, context_k_l, UNIT, WIDE), inside, context_k_d, DIM, D0, D1, True)
        w0k, w1k = load_weight(k_norm, k_norm_d, DIM, D0, D1)
        dk0, dk1, part0, part1 = norm_backward(dk0, dk1, k0, k1, w0k, w1k, inside, norm_eps, DIM, D0, D1)
        if partial is not None:
            store_row(partial + program.to(tl.int64) * DIM, part0, part1, DIM, D0, D1)
    block = (b.to(tl.int64) * L * heads + head) * DIM
    if grad_k is not None:
        store_rows(grad_k + block, rows * heads, inside, dk0, dk1, DIM, D0, D1)
    if grad_v is not None:
        store_rows(grad_v + block, rows * heads, inside, dv0, dv1, DIM, D0, D1)
