"""Gradients of keys and values, a window's own and the context's: one program per tile of keys."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import (
    add_rows,
    context_at,
    context_flags,
    context_from,
    context_packed,
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
def key_backward_kernel(
    k, queries, keys, v, best_of, log_of, delta, grad, bias, image, q_norm, k_norm,
    context_keys, context_v, context_mask, grad_k, grad_v, partial, sums,
    B, video, L, parts, scale, norm_eps, window, layout,
    PADDED: tl.constexpr, MASKED: tl.constexpr, NORMED: tl.constexpr, CONTEXT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v of one tile of keys: a window's own, or (CONTEXT) the context's over a part of the windows.

    The context's are gradients of the normed keys, in float32, one block of ``sums`` [parts, 2, B, heads, L, dim] each.
    ``queries``, ``keys`` and ``context_keys`` are normed already where NORMED; ``k`` is not. ``bias`` is by key.
    """
    program = tl.program_id(0)
    tiles = tl.cdiv(L, BLOCK_N) if CONTEXT else (window.N + BLOCK_N - 1) // BLOCK_N
    start = program % tiles * BLOCK_N
    head = program // tiles % video.heads
    group = program // tiles // video.heads
    w0q, w1q = load_weight(q_norm, layout)
    w0k, w1k = load_weight(k_norm, layout)
    dk0 = tl.zeros([BLOCK_N, layout.D0], tl.float32)
    dk1 = tl.zeros([BLOCK_N, layout.D1 if layout.D1 > 0 else 1], tl.float32)
    dv0 = tl.zeros([BLOCK_N, layout.D0], tl.float32)
    dv1 = tl.zeros([BLOCK_N, layout.D1 if layout.D1 > 0 else 1], tl.float32)
    moving = 0
    if CONTEXT:  # never beside images
        b = group // parts
        part = group % parts
        per_sample = video.windows_t * video.windows_h * video.windows_w
        first_window = b * per_sample + (part * per_sample) // parts
        last_window = b * per_sample + ((part + 1) * per_sample) // parts
        flags = context_flags(context_mask, b)
        n, inside_k, seen_k = context_at(start, L, flags, context_mask, BLOCK_N)
        own_keys = context_from(context_keys, b, head, layout)
        own_v = context_from(context_v, b, head, layout)
        k0, k1 = load_rows(own_keys, context_rows(n, context_keys.token, layout), seen_k, context_keys.d, layout, True)
        v0, v1 = load_rows(own_v, context_rows(n, context_v.token, layout), seen_k, context_v.d, layout, True)
    else:
        first_window = group
        last_window = group + 1
        b, t0, h0, w0 = window_at(group, video, window)
        if image.at is not None:
            moving = moving_frames(image, b, t0, video, window)
        tk, hk, wk, inside_k, still_k = tokens_at(start, b, t0, h0, w0, video, window, image, moving, BLOCK_N)
        seen_k = inside_k & ~still_k
        own_grad = rows_from(grad, b, t0, h0, w0, head, layout)
        at_grad = rows_of(tk, hk, wk, grad, layout)
        rows = packed_rows(b, t0, h0, w0, head, video, layout)
        at_own = packed_of(tk, hk, wk, video, layout) * (video.heads * layout.DIM)
        if partial is not None:
            partial += program.to(tl.int64) * layout.DIM
        if image.at is not None and moving == 0:  # out = v
            if grad_v is not None:
                g0, g1 = load_rows(own_grad, at_grad, inside_k, grad.d, layout, True)
                store_rows(grad_v + rows, at_own, inside_k, g0, g1, layout)
            if grad_k is not None:
                store_rows(grad_k + rows, at_own, inside_k, dk0, dk1, layout)
            if partial is not None:
                store_row(partial, tl.sum(dk0, 0), tl.sum(dk1, 0), layout)
            return
        own_keys = rows_from(keys, b, t0, h0, w0, head, layout)
        own_v = rows_from(v, b, t0, h0, w0, head, layout)
        at = rows_of(tk, hk, wk, keys, layout)
        k0, k1 = load_rows(own_keys, at, seen_k, keys.d, layout, True)
        v0, v1 = load_rows(own_v, rows_of(tk, hk, wk, v, layout), seen_k, v.d, layout, True)
    k0, k1 = norm_rows(k0, k1, k_norm, w0k, w1k, seen_k, norm_eps, layout, NORMED)

    for number in range(first_window, last_window):
        b, t0, h0, w0 = window_at(number, video, window)
        many = rows_from(queries, b, t0, h0, w0, head, layout)
        grads = rows_from(grad, b, t0, h0, w0, head, layout)
        lines = packed_lines(b, t0, h0, w0, head, video)
        for first in range(0, keys_end(t0, video, window, MASKED), BLOCK_M):
            t, h, w, inside, still = tokens_at(first, b, t0, h0, w0, video, window, image, moving, BLOCK_M)
            seen = inside & ~still
            local = lines + packed_of(t, h, w, video, layout)
            best, log_total = load_lines(best_of, log_of, local, seen, v.at)
            each = tl.load(delta + local, mask=seen, other=0.0)
            at_q = rows_of(t, h, w, queries, layout)
            q0, q1 = load_rows(many, at_q, seen, queries.d, layout, MASKED)
            q0, q1 = norm_rows(q0, q1, q_norm, w0q, w1q, seen, norm_eps, layout, NORMED)
            s = products(k0, k1, q0, q1, layout, PRECISION)
            s = scores_of(s, scale, bias, head, start + tl.arange(0, BLOCK_N), first + tl.arange(0, BLOCK_M), PADDED)
            p = probabilities(s, best[None, :], log_total[None, :])
            p = tl.where(seen_k[:, None], p, 0.0)
            at_g = rows_of(t, h, w, grad, layout)
            g0, g1 = load_rows(grads, at_g, seen, grad.d, layout, MASKED)
            dv0, dv1 = add_rows(dv0, dv1, p, g0, g1, layout, PRECISION)
            ds = p * (products(v0, v1, g0, g1, layout, PRECISION) - each[None, :])
            dk0, dk1 = add_rows(dk0, dk1, ds, q0, q1, layout, PRECISION)
    dk0 *= scale
    dk1 *= scale

    if CONTEXT:
        block = (part.to(tl.int64) * 2 * B + b) * video.heads + head
        at = context_packed(n, layout)
        store_rows(sums + block * L * layout.DIM, at, inside_k, dk0, dk1, layout)
        block += B * video.heads
        store_rows(sums + block * L * layout.DIM, at, inside_k, dv0, dv1, layout)
    else:
        if grad_v is not None:
            if image.at is not None:  # image frames: out = v
                g0, g1 = load_rows(own_grad, at_grad, still_k, grad.d, layout, True)
                dv0 = tl.where(still_k[:, None], g0.to(tl.float32), dv0)
                if layout.D1 > 0:
                    dv1 = tl.where(still_k[:, None], g1.to(tl.float32), dv1)
            store_rows(grad_v + rows, at_own, inside_k, dv0, dv1, layout)
        if k_norm.at is not None:
            own_k = rows_from(k, b, t0, h0, w0, head, layout)
            w0k, w1k = load_weight(k_norm, layout)  # not kept in registers all along the loop
            k0, k1 = load_rows(own_k, rows_of(tk, hk, wk, k, layout), seen_k, k.d, layout, True)
            dk0, dk1, part0, part1 = norm_backward(dk0, dk1, k0, k1, w0k, w1k, seen_k, norm_eps, layout)
            if partial is not None:
                store_row(partial, part0, part1, layout)
        if grad_k is not None:
            store_rows(grad_k + rows, at_own, inside_k, dk0, dk1, layout)


@triton.jit
def context_finish_kernel(
    sums, k_norm, context_k, grad_k, grad_v, partial, B, L, heads, parts, norm_eps, layout,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the parts of the context's gradients, and takes that of the keys through the norm."""
    program = tl.program_id(0)
    tiles = tl.cdiv(L, BLOCK)
    n = program % tiles * BLOCK + tl.arange(0, BLOCK)
    head = program // tiles % heads
    b = program // tiles // heads
    inside = n < L
    rows = context_packed(n, layout)
    half = tl.full([], layout.DIM, tl.int64) * B * heads * L  # of the keys, then of the values
    sums += (b.to(tl.int64) * heads + head) * L * layout.DIM
    dk0 = tl.zeros([BLOCK, layout.D0], tl.float32)
    dk1 = tl.zeros([BLOCK, layout.D1 if layout.D1 > 0 else 1], tl.float32)
    dv0 = tl.zeros([BLOCK, layout.D0], tl.float32)
    dv1 = tl.zeros([BLOCK, layout.D1 if layout.D1 > 0 else 1], tl.float32)
    for _ in range(0, parts):
        x0, x1 = load_rows(sums, rows, inside, 1, layout, True)
        dk0 += x0
        if layout.D1 > 0:
            dk1 += x1
        x0, x1 = load_rows(sums + half, rows, inside, 1, layout, True)
        dv0 += x0
        if layout.D1 > 0:
            dv1 += x1
        sums += 2 * half
    if k_norm.at is not None:
        own_k = context_from(context_k, b, head, layout)
        k0, k1 = load_rows(own_k, context_rows(n, context_k.token, layout), inside, context_k.d, layout, True)
        w0k, w1k = load_weight(k_norm, layout)
        dk0, dk1, part0, part1 = norm_backward(dk0, dk1, k0, k1, w0k, w1k, inside, norm_eps, layout)
        if partial is not None:
            store_row(partial + program.to(tl.int64) * layout.DIM, part0, part1, layout)
    block = (b.to(tl.int64) * L * heads + head) * layout.DIM
    if grad_k is not None:
        store_rows(grad_k + block, rows * heads, inside, dk0, dk1, layout)
    if grad_v is not None:
        store_rows(grad_v + block, rows * heads, inside, dv0, dv1, layout)
