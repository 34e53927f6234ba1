"""What the kernels of window attention share on the device: tokens of a window, their rows, the norm, the products.

A window is numbered as if it were whole; tokens that the video does not have are masked. Rows of dim D are held as two
tiles, D0 and D1 wide (72 = 64 + 16, 88 = 64 + 32; D1 = 0 where one is enough), the second a dummy when D1 = 0.

What belongs together is a named tuple, whose items Triton specialises as it does arguments; of an absent tensor ``at``
is None. Constants in it stand behind tensors: in front of one Triton's interpreter makes a sum a constant.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Grid(NamedTuple):
    """[B, T, H, W, heads, dim]: where it begins, and its strides, all but d's in units of ``layout.UNIT`` elements."""

    at: Any
    b: int
    t: int
    h: int
    w: int
    n: int
    d: int


class Context(NamedTuple):
    """[B, L, heads, dim], as ``Grid``."""

    at: Any
    b: int
    token: int
    n: int
    d: int


class Scale(NamedTuple):
    """Of a norm, [dim]."""

    at: Any
    d: int


class Image(NamedTuple):
    """Flags of frames, [B, T]."""

    at: Any
    b: int
    t: int


class Mask(NamedTuple):
    """Of a context, [B, L]."""

    at: Any
    b: int
    token: int


class Table(NamedTuple):
    """Of biases, [heads, 2t-1, 2h-1, 2w-1]."""

    at: Any
    n: int
    t: int
    h: int
    w: int


class Video(NamedTuple):
    """Sizes of a sample in tokens and in windows."""

    T: int
    H: int
    W: int
    heads: int
    windows_t: int
    windows_h: int
    windows_w: int


class Window(NamedTuple):
    """Sizes of a window in tokens, N in all: constants of a kernel."""

    N: Any
    T: Any
    H: Any
    W: Any


class Layout(NamedTuple):
    """How rows of DIM elements are held, the unit of strides, whether offsets need 64 bits: constants of a kernel."""

    DIM: Any
    D0: Any
    D1: Any
    UNIT: Any
    WIDE: Any


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def window_at(number, video, window):
    """Sample and first token of a window."""
    w0 = number % video.windows_w * window.W
    rest = number // video.windows_w
    h0 = rest % video.windows_h * window.H
    rest = rest // video.windows_h
    return rest // video.windows_t, rest % video.windows_t * window.T, h0, w0


@triton.jit
def moving_frames(image, b, t0, video, window):
    """Bit t: the video has frame t0 + t, and it is no image. 0: the window has nothing to attend to.

    Read once, before any loop: a load that only feeds a mask must not be in a pipelined loop. Windows of more than 31
    frames have one bit for all of them, and ``tokens_at`` loads flags.
    """
    flags = image.at + (b.to(tl.int64) * image.b + t0.to(tl.int64) * image.t)
    moving = t0 - t0
    for t in tl.static_range(window.T):
        flag = tl.load(flags + t * image.t, mask=t0 + t < video.T, other=1).to(tl.int32)
        moving |= (1 - flag) << (t if window.T < 32 else 0)
    return moving


@triton.jit
def tokens_at(start, b, t0, h0, w0, video, window, image, moving, BLOCK):
    """Positions of BLOCK tokens in their window, which of them the video has, which are of image frames.

    Positions of tokens behind the last one repeat it: all stay inside the window.
    """
    n = start + tl.arange(0, BLOCK)
    inside = n < window.N
    n = tl.minimum(n, window.N - 1)
    t = n // (window.H * window.W)
    h = n // window.W % window.H
    w = n % window.W
    inside = inside & (t0 + t < video.T) & (h0 + h < video.H) & (w0 + w < video.W)
    still = n < 0
    if image.at is not None:
        if window.T < 32:
            still = ((moving >> t) & 1) == 0
        else:
            flags = image.at + b.to(tl.int64) * image.b + t0.to(tl.int64) * image.t
            still = tl.load(flags + t * image.t, mask=inside, other=1) != 0
    return t, h, w, inside, still


@triton.jit
def keys_end(t0, video, window, MASKED):
    """Behind the last token of a window that the video may have."""
    end = window.N
    if MASKED:
        end = tl.minimum(window.T, video.T - t0) * (window.H * window.W)
    return end


@triton.jit
def rows_from(x, b, t0, h0, w0, head, layout):
    """Where the rows of a window and head begin: 64 bits."""
    far = b.to(tl.int64) * x.b + t0.to(tl.int64) * x.t + h0.to(tl.int64) * x.h + w0.to(tl.int64) * x.w
    return x.at + (far + head.to(tl.int64) * x.n) * layout.UNIT


@triton.jit
def rows_of(t, h, w, x, layout):
    """Where the rows of tokens lie from there: 32 bits, unless the launcher found that too few."""
    if layout.WIDE:
        t, h, w = t.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    return (t * x.t + h * x.h + w * x.w) * layout.UNIT


@triton.jit
def packed_of(t, h, w, video, layout):
    """The tokens' numbers in [T, H, W], from the window's first one."""
    if layout.WIDE:
        t, h, w = t.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    return t * (video.H * video.W) + h * video.W + w


@triton.jit
def packed_rows(b, t0, h0, w0, head, video, layout):
    """Where the rows of a window and head begin in [B, T, H, W, heads, dim], contiguous."""
    first = ((b.to(tl.int64) * video.T + t0) * video.H + h0) * video.W + w0
    return (first * video.heads + head) * layout.DIM


@triton.jit
def packed_lines(b, t0, h0, w0, head, video):
    """Where a window begins in [B, heads, T, H, W]."""
    return ((b.to(tl.int64) * video.heads + head) * video.T + t0) * video.H * video.W + h0 * video.W + w0


@triton.jit
def context_at(start, L, flags, mask, BLOCK):
    """Numbers of BLOCK tokens of a context, which of them there are, which can be seen by the sample's ``flags``."""
    n = start + tl.arange(0, BLOCK)
    inside = n < L
    seen = inside
    if mask.at is not None:
        seen = inside & (tl.load(flags + n * mask.token, mask=inside, other=0) != 0)
    return n, inside, seen


@triton.jit
def context_from(x, b, head, layout):
    """Where the rows of a sample and head begin."""
    return x.at + (b.to(tl.int64) * x.b + head * x.n) * layout.UNIT


@triton.jit
def context_flags(mask, b):
    flags = mask.at
    if mask.at is not None:
        flags += b.to(tl.int64) * mask.b
    return flags


@triton.jit
def context_rows(n, step, layout):
    if layout.WIDE:
        n = n.to(tl.int64)
    return n * step * layout.UNIT


@triton.jit
def context_packed(n, layout):
    """Where the rows of a sample and head lie in [..., L, dim], contiguous."""
    if layout.WIDE:
        n = n.to(tl.int64)
    return n * layout.DIM


@triton.jit
def load_part(pointer, rows, mask, step, FIRST, WIDTH, DIM, MASKED):
    d = tl.arange(0, WIDTH) + FIRST
    pointers = pointer + (rows[:, None] + d[None, :] * step)
    if FIRST + WIDTH > DIM:
        return tl.load(pointers, mask=mask[:, None] & (d < DIM)[None, :], other=0.0)
    if MASKED:
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def load_rows(pointer, rows, mask, step, layout, MASKED):
    """The rows as two tiles, ``step`` from element to element; zeros where ``mask`` is false and beyond DIM."""
    x0 = load_part(pointer, rows, mask, step, 0, layout.D0, layout.DIM, MASKED)
    x1 = x0
    if layout.D1 > 0:
        x1 = load_part(pointer, rows, mask, step, layout.D0, layout.D1, layout.DIM, MASKED)
    return x0, x1


@triton.jit
def store_rows(pointer, rows, mask, x0, x1, layout):
    kind = pointer.dtype.element_ty
    d = tl.arange(0, layout.D0)
    tl.store(pointer + (rows[:, None] + d[None, :]), x0.to(kind), mask=mask[:, None] & (d < layout.DIM)[None, :])
    if layout.D1 > 0:
        d = tl.arange(0, layout.D1) + layout.D0
        tl.store(pointer + (rows[:, None] + d[None, :]), x1.to(kind), mask=mask[:, None] & (d < layout.DIM)[None, :])


@triton.jit
def store_row(pointer, x0, x1, layout):
    d = tl.arange(0, layout.D0)
    tl.store(pointer + d, x0, mask=d < layout.DIM)
    if layout.D1 > 0:
        d = tl.arange(0, layout.D1) + layout.D0
        tl.store(pointer + d, x1, mask=d < layout.DIM)


@triton.jit
def load_weight(scale, layout):
    """The scale of a norm as two rows in float32, zeros beyond DIM; dummies without one."""
    w0 = tl.zeros([layout.D0], tl.float32)
    w1 = w0
    if scale.at is not None:
        d = tl.arange(0, layout.D0)
        w0 = tl.load(scale.at + d * scale.d, mask=d < layout.DIM, other=0.0).to(tl.float32)
        if layout.D1 > 0:
            d = tl.arange(0, layout.D1) + layout.D0
            w1 = tl.load(scale.at + d * scale.d, mask=d < layout.DIM, other=0.0).to(tl.float32)
    return w0, w1


@triton.jit
def standardise(x0, x1, mask, eps, layout):
    """(x - mean) * rstd in float32, zeros beyond DIM and where ``mask`` is false; and rstd."""
    x0 = x0.to(tl.float32)
    total = tl.sum(x0, 1)
    if layout.D1 > 0:
        x1 = x1.to(tl.float32)
        total += tl.sum(x1, 1)
    mean = total / layout.DIM
    x0 = tl.where((tl.arange(0, layout.D0) < layout.DIM)[None, :], x0 - mean[:, None], 0.0)
    total = tl.sum(x0 * x0, 1)
    if layout.D1 > 0:
        x1 = tl.where((tl.arange(0, layout.D1) + layout.D0 < layout.DIM)[None, :], x1 - mean[:, None], 0.0)
        total += tl.sum(x1 * x1, 1)
    rstd = tl.where(mask, tl.rsqrt(total / layout.DIM + eps), 0.0)
    x0 = x0 * rstd[:, None]
    if layout.D1 > 0:
        x1 = x1 * rstd[:, None]
    return x0, x1, rstd


@triton.jit
def norm_rows(x0, x1, scale, w0, w1, mask, eps, layout, NORMED):
    """The LayerNorm of rows, rounded to their dtype; themselves where it has been taken or ``scale`` is absent."""
    if scale.at is not None and not NORMED:
        kind = x0.dtype
        x0, x1, _ = standardise(x0, x1, mask, eps, layout)
        x0 = (x0 * w0[None, :]).to(kind)
        if layout.D1 > 0:
            x1 = (x1 * w1[None, :]).to(kind)
    return x0, x1


@triton.jit
def norm_backward(g0, g1, x0, x1, w0, w1, mask, eps, layout):
    """The gradient of rows from that of their norm; and the scale's gradient over these rows, as two rows."""
    x0, x1, rstd = standardise(x0, x1, mask, eps, layout)
    part0 = tl.sum(g0 * x0, 0)
    part1 = tl.sum(g1, 0)  # a dummy
    if layout.D1 > 0:
        part1 = tl.sum(g1 * x1, 0)
    g0 = g0 * w0[None, :]
    mean = tl.sum(g0, 1)
    slope = tl.sum(g0 * x0, 1)
    if layout.D1 > 0:
        g1 = g1 * w1[None, :]
        mean += tl.sum(g1, 1)
        slope += tl.sum(g1 * x1, 1)
    mean = (mean / layout.DIM)[:, None]
    slope = (slope / layout.DIM)[:, None]
    g0 = (g0 - mean - x0 * slope) * rstd[:, None]
    if layout.D1 > 0:
        g1 = (g1 - mean - x1 * slope) * rstd[:, None]
    return g0, g1, part0, part1


@triton.jit
def products(a0, a1, b0, b1, layout, PRECISION: tl.constexpr):
    """Inner products of the rows a with the rows b."""
    s = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if layout.D1 > 0:
        s = tl.dot(a1, tl.trans(b1), s, input_precision=PRECISION)
    return s


@triton.jit
def add_rows(acc0, acc1, p, x0, x1, layout, PRECISION: tl.constexpr):
    """acc + p x, p in the rows' dtype."""
    p = p.to(x0.dtype)
    acc0 = tl.dot(p, x0, acc0, input_precision=PRECISION)
    if layout.D1 > 0:
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
