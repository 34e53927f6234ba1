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
    context_at,
    context_flags,
    context_from,
    context_rows,
    keys_end,
    load_rows,
    load_weight,
    moving_frames,
    norm_rows,
    packed_lines,
    packed_of,
    packed_rows,
    probabilities,
    products,
    rows_from,
    rows_of,
    scores_of,
    store_rows,
    tokens_at,
    window_at,
)


@triton.jit
def _softmax_step(s, best, total, acc0, acc1, v0, v1, layout, PRECISION: tl.constexpr):
    """One tile of keys of the online softmax; ``best`` is the largest score so far times log2(e)."""
    new = tl.maximum(best, tl.max(s, 1) * LOG2E)
    shift = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: exp2(-inf - 0) = 0, not NaN
    p = probabilities(s, shift[:, None], 0.0)
    fade = tl.exp2(best - shift)
    total = total * fade + tl.sum(p, 1)
    acc0 = acc0 * fade[:, None]
    if layout.D1 > 0:
        acc1 = acc1 * fade[:, None]
    acc0, acc1 = add_rows(acc0, acc1, p, v0, v1, layout, PRECISION)
    return new, total, acc0, acc1


@triton.jit
def forward_kernel(
    q, keys, v, out, best_of, log_of, bias, image, q_norm, k_norm, context_keys, context_v, context_mask,
    video, L, scale, norm_eps, window, layout,
    PADDED: tl.constexpr, MASKED: tl.constexpr, NORMED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``keys`` and ``context_keys`` are normed already where NORMED."""
    TILES: tl.constexpr = (window.N + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    start = program % TILES * BLOCK_M
    head = program // TILES % video.heads
    b, t0, h0, w0 = window_at(program // TILES // video.heads, video, window)
    own_v = rows_from(v, b, t0, h0, w0, head, layout)
    out += packed_rows(b, t0, h0, w0, head, video, layout)
    lines = packed_lines(b, t0, h0, w0, head, video)
    moving = 0
    if image.at is not None:
        moving = moving_frames(image, b, t0, video, window)
    t, h, w, inside, still = tokens_at(start, b, t0, h0, w0, video, window, image, moving, BLOCK_M)
    local = packed_of(t, h, w, video, layout)
    at_v = rows_of(t, h, w, v, layout)
    if image.at is not None and moving == 0:
        v0, v1 = load_rows(own_v, at_v, inside, v.d, layout, True)
        store_rows(out, local * (video.heads * layout.DIM), inside, v0, v1, layout)
        return

    seen = inside & ~still
    own_q = rows_from(q, b, t0, h0, w0, head, layout)
    own_keys = rows_from(keys, b, t0, h0, w0, head, layout)
    w0q, w1q = load_weight(q_norm, layout)
    w0k, w1k = load_weight(k_norm, layout)
    q0, q1 = load_rows(own_q, rows_of(t, h, w, q, layout), seen, q.d, layout, True)
    q0, q1 = norm_rows(q0, q1, q_norm, w0q, w1q, seen, norm_eps, layout, False)

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, layout.D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, layout.D1 if layout.D1 > 0 else 1], tl.float32)
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
        best, total, acc0, acc1 = _softmax_step(s, best, total, acc0, acc1, v0, v1, layout, PRECISION)
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
            best, total, acc0, acc1 = _softmax_step(s, best, total, acc0, acc1, v0, v1, layout, PRECISION)

    acc0 = acc0 / total[:, None]
    if layout.D1 > 0:
        acc1 = acc1 / total[:, None]
    if image.at is not None:  # image frames: v as it is
        v0, v1 = load_rows(own_v, at_v, still, v.d, layout, True)
        acc0 = tl.where(still[:, None], v0.to(tl.float32), acc0)
        if layout.D1 > 0:
            acc1 = tl.where(still[:, None], v1.to(tl.float32), acc1)
    store_rows(out, local * (video.heads * layout.DIM), inside, acc0, acc1, layout)
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
