"""What the kernels of window attention share on the device: tokens of a window, their rows, the norm, the products.

A window is numbered as if it were whole; tokens that the video does not have are masked. Rows of dim D are held as two
tiles, D0 and D1 wide (72 = 64 + 16, 88 = 64 + 32; D1 = 0 where one is enough), the second a dummy when D1 = 0.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def window_at(window, windows_t, windows_h, windows_w, WT, WH, WW):
    """Sample and first token of a window."""
    w0 = window % windows_w * WW
    rest = window // windows_w
    h0 = rest % windows_h * WH
    rest = rest // windows_h
    return rest // windows_t, rest % windows_t * WT, h0, w0


@triton.jit
def moving_frames(image, image_b, image_t, b, t0, T, WT):
    """Bit t: the video has frame t0 + t, and it is no image. 0: the window has nothing to attend to.

    Read once, before any loop: a load that only feeds a mask must not be in a pipelined loop. Windows of more than 31
    frames have one bit for all of them, and ``tokens_at`` loads flags.
    """
    image += b.to(tl.int64) * image_b + t0.to(tl.int64) * image_t
    moving = t0 - t0
    for t in tl.static_range(WT):
        flag = tl.load(image + t * image_t, mask=t0 + t < T, other=1).to(tl.int32)
        moving |= (1 - flag) << (t if WT < 32 else 0)
    return moving


@triton.jit
def tokens_at(start, b, t0, h0, w0, T, H, W, image, image_b, image_t, moving, BLOCK, N, WT, WH, WW):
    """Positions of BLOCK tokens in their window, which of them the video has, which are of image frames.

    Positions of tokens behind the last one repeat it: all stay inside the window.
    """
    n = start + tl.arange(0, BLOCK)
    inside = n < N
    n = tl.minimum(n, N - 1)
    t = n // (WH * WW)
    h = n // WW % WH
    w = n % WW
    inside = inside & (t0 + t < T) & (h0 + h < H) & (w0 + w < W)
    still = n < 0
    if image is not None:
        if WT < 32:
            still = ((moving >> t) & 1) == 0
        else:
            flags = image + b.to(tl.int64) * image_b + t0.to(tl.int64) * image_t
            still = tl.load(flags + t * image_t, mask=inside, other=1) != 0
    return t, h, w, inside, still


@triton.jit
def keys_end(t0, T, N, WT, WH, WW, MASKED):
    """Behind the last token of a window that the video may have."""
    end = N
    if MASKED:
        end = tl.minimum(WT, T - t0) * (WH * WW)
    return end


@triton.jit
def base_of(b, t0, h0, w0, head, s_b, s_t, s_h, s_w, s_n, UNIT):
    """Where a window of one head begins, in elements: 64 bits. Strides are in units of UNIT elements."""
    far = b.to(tl.int64) * s_b + t0.to(tl.int64) * s_t + h0.to(tl.int64) * s_h + w0.to(tl.int64) * s_w
    return (far + head.to(tl.int64) * s_n) * UNIT


@triton.jit
def rows_of(t, h, w, s_t, s_h, s_w, UNIT, WIDE):
    """Where the rows of tokens lie from there: 32 bits, unless the launcher found that too few."""
    if WIDE:
        t, h, w = t.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    return (t * s_t + h * s_h + w * s_w) * UNIT


@triton.jit
def packed_base(b, t0, h0, w0, T, H, W):
    """The first token's number in [B, T, H, W]."""
    return ((b.to(tl.int64) * T + t0) * H + h0) * W + w0


@triton.jit
def context_at(start, L, mask, mask_l, BLOCK):
    """Numbers of BLOCK tokens of a context, which of them there are, which can be seen."""
    n = start + tl.arange(0, BLOCK)
    inside = n < L
    seen = inside
    if mask is not None:
        seen = inside & (tl.load(mask + n * mask_l, mask=inside, other=0) != 0)
    return n, inside, seen


@triton.jit
def context_rows(n, s_l, UNIT, WIDE):
    if WIDE:
        n = n.to(tl.int64)
    return n * s_l * UNIT


@triton.jit
def load_part(pointer, rows, mask, s_d, FIRST, WIDTH, DIM, MASKED):
    d = FIRST + tl.arange(0, WIDTH)
    pointers = pointer + (rows[:, None] + d[None, :] * s_d)
    if FIRST + WIDTH > DIM:
        return tl.load(pointers, mask=mask[:, None] & (d < DIM)[None, :], other=0.0)
    if MASKED:
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def load_rows(pointer, rows, mask, s_d, DIM, D0, D1, MASKED):
    """The rows as two tiles; zeros where ``mask`` is false and beyond DIM."""
    x0 = load_part(pointer, rows, mask, s_d, 0, D0, DIM, MASKED)
    x1 = x0
    if D1 > 0:
        x1 = load_part(pointer, rows, mask, s_d, D0, D1, DIM, MASKED)
    return x0, x1


@triton.jit
def store_rows(pointer, rows, mask, x0, x1, DIM, D0, D1):
    kind = pointer.dtype.element_ty
    d = tl.arange(0, D0)
    tl.store(pointer + (rows[:, None] + d[None, :]), x0.to(kind), mask=mask[:, None] & (d < DIM)[None, :])
    if D1 > 0:
        d = D0 + tl.arange(0, D1)
        tl.store(pointer + (rows[:, None] + d[None, :]), x1.to(kind), mask=mask[:, None] & (d < DIM)[None, :])


@triton.jit
def store_row(pointer, x0, x1, DIM, D0, D1):
    d = tl.arange(0, D0)
    tl.store(pointer + d, x0, mask=d < DIM)
    if D1 > 0:
        d = D0 + tl.arange(0, D1)
        tl.store(pointer + d, x1, mask=d < DIM)


@triton.jit
def load_weight(pointer, stride, DIM, D0, D1):
    """The scale of a norm as two rows in float32, zeros beyond DIM; dummies without one."""
    w0 = tl.zeros([D0], tl.float32)
    w1 = w0
    if pointer is not None:
        d = tl.arange(0, D0)
        w0 = tl.load(pointer + d * stride, mask=d < DIM, other=0.0).to(tl.float32)
        if D1 > 0:
            d = D0 + tl.arange(0, D1)
            w1 = tl.load(pointer + d * stride, mask=d < DIM, other=0.0).to(tl.float32)
    return w0, w1


@triton.jit
def standardise(x0, x1, mask, eps, DIM, D0, D1):
    """(x - mean) * rstd in float32, zeros beyond DIM and where ``mask`` is false; and rstd."""
    x0 = x0.to(tl.float32)
    total = tl.sum(x0, 1)
    if D1 > 0:
        x1 = x1.to(tl.float32)
        total += tl.sum(x1, 1)
    mean = total / DIM
    x0 = tl.where((tl.arange(0, D0) < DIM)[None, :], x0 - mean[:, None], 0.0)
    total = tl.sum(x0 * x0, 1)
    if D1 > 0:
        x1 = tl.where((D0 + tl.arange(0, D1) < DIM)[None, :], x1 - mean[:, None], 0.0)
        total += tl.sum(x1 * x1, 1)
    rstd = tl.where(mask, tl.rsqrt(total / DIM + eps), 0.0)
    x0 = x0 * rstd[:, None]
    if D1 > 0:
        x1 = x1 * rstd[:, None]
    return x0, x1, rstd


@triton.jit
def norm_rows(x0, x1, weight, w0, w1, mask, eps, DIM, D0, D1, NORMED):
    """The LayerNorm of rows, rounded to their dtype; themselves where it has been taken or ``weight`` is None."""
    if weight is not None and not NORMED:
        kind = x0.dtype
        x0, x1, _ = standardise(x0, x1, mask, eps, DIM, D0, D1)
        x0 = (x0 * w0[None, :]).to(kind)
        if D1 > 0:
            x1 = (x1 * w1[None, :]).to(kind)
    return x0, x1


@triton.jit
def norm_backward(g0, g1, x0, x1, w0, w1, mask, eps, DIM, D0, D1):
    """The gradient of rows from that of their norm; and the scale's gradient over these rows, as two rows."""
    x0, x1, rstd = standardise(x0, x1, mask, eps, DIM, D0, D1)
    part0 = tl.sum(g0 * x0, 0)
    part1 = tl.sum(g1, 0)  # a dummy
    if D1 > 0:
        part1 = tl.sum(g1 * x1, 0)
    g0 = g0 * w0[None, :]
    mean = tl.sum(g0, 1)
    slope = tl.sum(g0 * x0, 1)
    if D1 > 0:
        g1 = g1 * w1[None, :]
        mean += tl.sum(g1, 1)
        slope += tl.sum(g1 * x1, 1)
    mean = (mean / DIM)[:, None]
    slope = (slope / DIM)[:, None]
    g0 = (g0 - mean - x0 * slope) * rstd[:, None]
    if D1 > 0:
        g1 = (g1 - mean - x1 * slope) * rstd[:, None]
    return g0, g1, part0, part1


@triton.jit
def products(a0, a1, b0, b1, D1, PRECISION: tl.constexpr):
    """Inner products of the rows a with the rows b."""
    s = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if D1 > 0:
        s = tl.dot(a1, tl.trans(b1), s, input_precision=PRECISION)
    return s


@triton.jit
def add_rows(acc0, acc1, p, x0, x1, D1, PRECISION: tl.constexpr):
    """acc + p x, p in the rows' dtype."""
    p = p.to(x0.dtype)
    acc0 = tl.dot(p, x0, acc0, input_precision=PRECISION)
    if D1 > 0:
        acc1 = tl.dot(p, x1, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def scores_of(s, scale, bias, head, rows, columns, PADDED):
    """The scores of a tile of inner products; ``bias`` [heads, PADDED, PADDED] or None."""
    s = s * scale
    if bias is not None:
        at = head.to(tl.int64) * PADDED * PADDED + (rows[:, None] * PADDED + columns[None, :])
        s += tl.load(bias + at).to(tl.float32)
    return s


@triton.jit
def load_lines(best_of, log_of, at, mask, tokens):
    """``best`` and ``log_total`` of rows of scores; where mask is false, ``best`` that makes all probabilities 0.

    Beside 16-bit tokens both are one number: what their sum loses is far below a probability's own rounding.
    """
    best = tl.load(best_of + at, mask=mask, other=float("inf"))
    log_total = tl.load(log_of + at, mask=mask, other=0.0)
    if tokens.dtype.element_ty != tl.float32:
        best += log_total
        log_total = tl.zeros_like(best)
    return best, log_total


@triton.jit
def probabilities(s, best, log_total):
    """exp(s) / total, where ``best`` is log2(e) times the row's largest score, rounded, as the forward pass had it.

    The fused product is exact, so large scores keep their digits, and the rounding of ``best`` is one for a whole row.
    """
    return tl.exp2(tl.fma(s, LOG2E, -best) - log_total)
