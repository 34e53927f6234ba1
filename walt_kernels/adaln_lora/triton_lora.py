# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of adaln_lora: all layers in one launch, forward (hidden, then out) and backward (up, hidden, down,
then sums over layers).

Products are summed in float32 in an order that depends on shapes alone.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32

from .. import _triton
from .triton_rows import Matrix, matrices, matrix, matrix_of
from .triton_tiles import LORA, PROGRAMS_PER_PROCESSOR, block_of_rank

BLOCK_B = 16  # conditioning vectors of a program: the least a product takes


@triton.jit
def _tile(x, rows, row_count, columns, column_count):
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    return tl.load(x.at + rows[:, None] * x.row + columns[None, :] * x.column, mask=inside, other=0.0)


@triton.jit
def lora_hidden_kernel(
    cond, down, hidden, batch, rank, D, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """hidden[l, b, r] = sum over d of cond[b, d] * down[l, r, d], whose matrices come transposed."""
    layer = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    b = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    total = tl.zeros((BLOCK_B, BLOCK_R), tl.float32)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        c = _tile(cond, b, batch, d, D)
        w = _tile(matrix_of(down, layer), d, D, r, rank)
        total = tl.dot(c, w, total, input_precision="ieee")
    inside = (b < batch)[:, None] & (r < rank)[None, :]
    tl.store(hidden + layer * batch * rank + b[:, None] * rank + r[None, :], total, mask=inside)


@triton.jit
def lora_out_kernel(
    base, up, hidden, out, batch, rank, K, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):
    """out[l, b, k] = base[b, k] + sum over r of hidden[l, b, r] * up[l, k, r], whose matrices come transposed."""
    layer = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    b = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    total = _tile(base, b, batch, k, K).to(tl.float32)
    for begin in range(0, rank, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        h = _tile(Matrix(hidden + layer * batch * rank, rank, 1), b, batch, r, rank)
        w = _tile(matrix_of(up, layer), r, rank, k, K).to(tl.float32)
        total = tl.dot(h, w, total, input_precision="ieee")
    inside = (b < batch)[:, None] & (k < K)[None, :]
    to = out + layer * batch * K + b[:, None] * K + k[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def lora_up_backward_kernel(
    grad, hidden, grad_up, batch, rank, K, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):
    """grad_up[l, k, r] = sum over b of grad[l, b, k] * hidden[l, b, r]"""
    layer = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    # Transposed, for the sake of sm_100: with BLOCK_K rows the compiler takes tf32 tensor cores in spite of "ieee".
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for begin in range(0, batch, BLOCK_B):
        b = begin + tl.arange(0, BLOCK_B)
        g = _tile(matrix_of(grad, layer), b, batch, k, K).to(tl.float32)
        h = _tile(Matrix(hidden + layer * batch * rank, 1, rank), r, rank, b, batch)
        total = tl.dot(h, g, total, input_precision="ieee")
    to = grad_up + layer * K * rank + k[None, :] * rank + r[:, None]
    tl.store(to, total.to(grad_up.dtype.element_ty), mask=(r < rank)[:, None] & (k < K)[None, :])


@triton.jit
def lora_hidden_backward_kernel(
    grad, up, partial, batch, rank, K, parts, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One part of grad_hidden[l, b, r] = sum over k of grad[l, b, k] * up[l, k, r]: a run of blocks of k."""
    layer = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    b = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    blocks = tl.cdiv(K, BLOCK_K)
    total = tl.zeros((BLOCK_B, BLOCK_R), tl.float32)
    for block in range(blocks * part // parts, blocks * (part + 1) // parts):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        g = _tile(matrix_of(grad, layer), b, batch, k, K)
        w = _tile(matrix_of(up, layer), k, K, r, rank)
        total = tl.dot(g, w, total, input_precision="ieee")
    layers = tl.num_programs(0) // parts
    to = partial + (part * layers + layer) * batch * rank + b[:, None] * rank + r[None, :]
    tl.store(to, total, mask=(b < batch)[:, None] & (r < rank)[None, :])


@triton.jit
def _grad_hidden(partial, parts, layers, layer, b, batch, r, rank):
    """The sum of the parts of grad_hidden."""
    total = tl.zeros((b.shape[0], r.shape[0]), tl.float32)
    for part in range(parts):
        total += _tile(Matrix(partial + (part * layers + layer) * batch * rank, rank, 1), b, batch, r, rank)
    return total


@triton.jit
def lora_down_backward_kernel(
    grad_hidden, cond, down, grad_down, partial, batch, rank, D, parts,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_down[l, r, d] = sum over b of grad_hidden[l, b, r] * cond[b, d], and this layer's part of
    grad_cond[b, d] = sum over l and r of grad_hidden[l, b, r] * down[l, r, d]. ``grad_hidden`` comes in parts."""
    layer = tl.program_id(0).to(tl.int64)
    layers = tl.num_programs(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    for begin in range(0, rank, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for first in range(0, batch, BLOCK_B):
            b = first + tl.arange(0, BLOCK_B)
            dh = _grad_hidden(grad_hidden, parts, layers, layer, b, batch, r, rank)
            c = _tile(cond, b, batch, d, D).to(tl.float32)
            total = tl.dot(tl.trans(dh), c, total, input_precision="ieee")
        to = grad_down + layer * rank * D + r[:, None] * D + d[None, :]
        tl.store(to, total.to(grad_down.dtype.element_ty), mask=(r < rank)[:, None] & (d < D)[None, :])
    for first in range(0, batch, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        part = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
        for begin in range(0, rank, BLOCK_R):
            r = begin + tl.arange(0, BLOCK_R)
            dh = _grad_hidden(grad_hidden, parts, layers, layer, b, batch, r, rank)
            w = _tile(matrix_of(down, layer), r, rank, d, D).to(tl.float32)
            part = tl.dot(dh, w, part, input_precision="ieee")
        to = partial + (layer * batch + b[:, None]) * D + d[None, :]
        tl.store(to, part, mask=(b < batch)[:, None] & (d < D)[None, :])


@triton.jit
def lora_sum_kernel(source, out, layers, D, BLOCK: tl.constexpr):
    """out[b, d] = sum over layers of source[layer, b, d]"""
    b = tl.program_id(0).to(tl.int64)
    d = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    at = source.at + b * source.row + d * source.column
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(layers):
        total += tl.load(at, mask=d < D, other=0.0).to(tl.float32)
        at += source.matrix
    tl.store(out + b * D + d, total.to(out.dtype.element_ty), mask=d < D)


def lora_forward(cond: Tensor, base: Tensor, down: Tensor, up: Tensor, out: Tensor, hidden: Tensor) -> None:
    (layers, rank, D), (batch, K) = down.shape, base.shape
    sizes, batches = {"batch": batch, "rank": rank, "BLOCK_B": BLOCK_B}, triton.cdiv(batch, BLOCK_B)
    tile = _triton.pick(LORA, ("hidden", block_of_rank(rank)), cond.device)
    grid = (layers, triton.cdiv(rank, tile.blocks["BLOCK_R"]), batches)
    inputs = {"cond": matrix(cond), "down": matrices(down.mT)}
    _triton.launch(lora_hidden_kernel, grid, tile, hidden=hidden, D=D, **inputs, **sizes)
    tile = _triton.pick(LORA, ("out", block_of_rank(rank)), cond.device)
    grid = (layers, triton.cdiv(K, tile.blocks["BLOCK_K"]), batches)
    inputs = {"base": matrix(base), "up": matrices(up.mT)}
    _triton.launch(lora_out_kernel, grid, tile, hidden=hidden, out=out, K=K, **inputs, **sizes)


def lora_backward(
    grad_out: Tensor,
    hidden: Tensor,
    cond: Tensor,
    down: Tensor,
    up: Tensor,
    grad_cond: Tensor,
    grad_base: Tensor,
    grad_down: Tensor,
    grad_up: Tensor,
) -> None:
    (layers, rank, D), (_, batch, K) = down.shape, grad_out.shape
    sizes = {"batch": batch, "rank": rank, "BLOCK_B": BLOCK_B}
    grad = matrices(grad_out)
    tile = _triton.pick(LORA, ("up_backward", block_of_rank(rank)), cond.device)
    grid = (layers, triton.cdiv(K, tile.blocks["BLOCK_K"]), triton.cdiv(rank, tile.blocks["BLOCK_R"]))
    _triton.launch(lora_up_backward_kernel, grid, tile, grad=grad, hidden=hidden, grad_up=grad_up, K=K, **sizes)

    tile = _triton.pick(LORA, ("hidden_backward", block_of_rank(rank)), cond.device)
    ranks, batches = triton.cdiv(rank, tile.blocks["BLOCK_R"]), triton.cdiv(batch, BLOCK_B)
    programs = PROGRAMS_PER_PROCESSOR * _triton.target(cond.device).processors
    parts = max(1, min(triton.cdiv(K, tile.blocks["BLOCK_K"]), programs // max(1, layers * ranks * batches)))
    grad_hidden = _triton.empty((parts, layers, batch, rank), float32, cond.device)
    _triton.launch(
        lora_hidden_backward_kernel,
        (layers * parts, ranks, batches),
        tile,
        **{"grad": grad, "up": matrices(up), "partial": grad_hidden, "K": K, "parts": parts},
        **sizes,
    )

    tile = _triton.pick(LORA, ("down_backward", block_of_rank(rank)), cond.device)
    partial = _triton.empty((layers, batch, D), float32, cond.device)
    _triton.launch(
        lora_down_backward_kernel,
        (layers, triton.cdiv(D, tile.blocks["BLOCK_D"]), 1),
        tile,
        **{"grad_hidden": grad_hidden, "cond": matrix(cond), "down": matrices(down), "grad_down": grad_down},
        **{"partial": partial, "D": D, "parts": parts},
        **sizes,
    )
    tile = _triton.pick(LORA, ("sum",), cond.device)
    for source, total in ((grad_out, grad_base), (partial, grad_cond)):
        width = total.shape[1]
        _triton.launch(
            lora_sum_kernel,
            (batch, triton.cdiv(width, tile.blocks["BLOCK"])),
            tile,
            **{"source": matrices(source), "out": total, "layers": layers, "D": width},
        )
