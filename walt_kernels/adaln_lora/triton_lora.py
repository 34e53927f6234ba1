"""Triton kernels of adaln_lora: all layers in one launch, forward (hidden, then out) and backward (up, hidden,
then down).

Products are summed in float32 in an order that depends on shapes alone. Plain sums over partial rows are torch.sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .triton_tiles import LORA, PROGRAMS_PER_PROCESSOR, block_of_rank

BLOCK_B = 16  # conditioning vectors of a program: the least a product takes


@triton.jit
def _tile(pointer, rows, row_stride, row_count, columns, column_stride, column_count):
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    return tl.load(pointer + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=inside, other=0.0)


@triton.jit
def lora_hidden_kernel(
    cond, down, hidden, batch, rank, D, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """hidden[l, b, r] = sum over d of cond[b, d] * down[l, r, d]"""
    layer = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    b = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    total = tl.zeros((BLOCK_B, BLOCK_R), tl.float32)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        c = _tile(cond, b, D, batch, d, 1, D)
        w = _tile(down + layer * rank * D, d, 1, D, r, D, rank)
        total = tl.dot(c, w, total, input_precision="ieee")
    inside = (b < batch)[:, None] & (r < rank)[None, :]
    tl.store(hidden + layer * batch * rank + b[:, None] * rank + r[None, :], total, mask=inside)


@triton.jit
def lora_out_kernel(
    base, up, hidden, out, batch, rank, K, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr
):
    """out[l, b, k] = base[b, k] + sum over r of hidden[l, b, r] * up[l, k, r]"""
    layer = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    b = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    total = _tile(base, b, K, batch, k, 1, K).to(tl.float32)
    for begin in range(0, rank, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        h = _tile(hidden + layer * batch * rank, b, rank, batch, r, 1, rank)
        w = _tile(up + layer * K * rank, r, 1, rank, k, rank, K).to(tl.float32)
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
        g = _tile(grad + layer * batch * K, b, K, batch, k, 1, K).to(tl.float32)
        h = _tile(hidden + layer * batch * rank, r, 1, rank, b, rank, batch)
        total = tl.dot(h, g, total, input_precision="ieee")
    to = grad_up + layer * K * rank + k[None, :] * rank + r[:, None]
    tl.store(to, total.to(grad_up.dtype.element_ty), mask=(r < rank)[:, None] & (k < K)[None, :])


@triton.jit
def lora_hidden_backward_kernel(
    grad, up, partial, batch, rank, K, parts,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One part of grad_hidden[l, b, r] = sum over k of grad[l, b, k] * up[l, k, r]: a run of blocks of k."""
    layer = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    b = tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    blocks = tl.cdiv(K, BLOCK_K)
    total = tl.zeros((BLOCK_B, BLOCK_R), tl.float32)
    for block in range(blocks * part // parts, blocks * (part + 1) // parts):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        g = _tile(grad + layer * batch * K, b, K, batch, k, 1, K)
        w = _tile(up + layer * K * rank, k, rank, K, r, 1, rank)
        total = tl.dot(g, w, total, input_precision="ieee")
    layers = tl.num_programs(0) // parts
    to = partial + (part * layers + layer) * batch * rank + b[:, None] * rank + r[None, :]
    tl.store(to, total, mask=(b < batch)[:, None] & (r < rank)[None, :])


@triton.jit
def lora_down_backward_kernel(
    grad_hidden, cond, down, grad_down, partial, batch, rank, D,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_down[l, r, d] = sum over b of grad_hidden[l, b, r] * cond[b, d], and this layer's part of
    grad_cond[b, d] = sum over l and r of grad_hidden[l, b, r] * down[l, r, d]."""
    layer = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    for begin in range(0, rank, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
        for first in range(0, batch, BLOCK_B):
            b = first + tl.arange(0, BLOCK_B)
            dh = _tile(grad_hidden + layer * batch * rank, b, rank, batch, r, 1, rank)
            c = _tile(cond, b, D, batch, d, 1, D).to(tl.float32)
            total = tl.dot(tl.trans(dh), c, total, input_precision="ieee")
        to = grad_down + layer * rank * D + r[:, None] * D + d[None, :]
        tl.store(to, total.to(grad_down.dtype.element_ty), mask=(r < rank)[:, None] & (d < D)[None, :])
    for first in range(0, batch, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        part = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
        for begin in range(0, rank, BLOCK_R):
            r = begin + tl.arange(0, BLOCK_R)
            dh = _tile(grad_hidden + layer * batch * rank, b, rank, batch, r, 1, rank)
            w = _tile(down + layer * rank * D, r, D, rank, d, 1, D).to(tl.float32)
            part = tl.dot(dh, w, part, input_precision="ieee")
        to = partial + (layer * batch + b[:, None]) * D + d[None, :]
        tl.store(to, part, mask=(b < batch)[:, None] & (d < D)[None, :])


def lora_forward(cond: Tensor, base: Tensor, down: Tensor, up: Tensor, out: Tensor, hidden: Tensor) -> None:
    cond, base, down, up = cond.contiguous(), base.contiguous(), down.contiguous(), up.contiguous()
    (layers, rank, D), (batch, K) = down.shape, base.shape
    if out.numel() == 0 or hidden.numel() == 0:
        out.copy_(base.expand_as(out))
        return
    sizes, batches = {"batch": batch, "rank": rank, "BLOCK_B": BLOCK_B}, triton.cdiv(batch, BLOCK_B)
    tile = _triton.pick(LORA, ("hidden", block_of_rank(rank)), cond.device)
    grid = (layers, triton.cdiv(rank, tile.blocks["BLOCK_R"]), batches)
    _triton.launch(lora_hidden_kernel, grid, tile, cond=cond, down=down, hidden=hidden, D=D, **sizes)
    tile = _triton.pick(LORA, ("out", block_of_rank(rank)), cond.device)
    grid = (layers, triton.cdiv(K, tile.blocks["BLOCK_K"]), batches)
    _triton.launch(lora_out_kernel, grid, tile, base=base, up=up, hidden=hidden, out=out, K=K, **sizes)


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
    grad, cond, down, up = grad_out.contiguous(), cond.contiguous(), down.contiguous(), up.contiguous()
    grad_base.copy_(grad.sum(0, dtype=torch.float32))
    (layers, rank, D), (_, batch, K) = down.shape, grad.shape
    if grad.numel() == 0 or hidden.numel() == 0:
        for gradient in (grad_cond, grad_down, grad_up):
            gradient.zero_()
        return
    sizes = {"batch": batch, "rank": rank, "BLOCK_B": BLOCK_B}
    tile = _triton.pick(LORA, ("up_backward", block_of_rank(rank)), cond.device)
    grid = (layers, triton.cdiv(K, tile.blocks["BLOCK_K"]), triton.cdiv(rank, tile.blocks["BLOCK_R"]))
    _triton.launch(lora_up_backward_kernel, grid, tile, grad=grad, hidden=hidden, grad_up=grad_up, K=K, **sizes)

    tile = _triton.pick(LORA, ("hidden_backward", block_of_rank(rank)), cond.device)
    ranks, batches = triton.cdiv(rank, tile.blocks["BLOCK_R"]), triton.cdiv(batch, BLOCK_B)
    programs = PROGRAMS_PER_PROCESSOR * _triton.target(cond.device).processors
    parts = max(1, min(triton.cdiv(K, tile.blocks["BLOCK_K"]), programs // (layers * ranks * batches)))
    partial = torch.empty((parts, layers, batch, rank), dtype=torch.float32, device=cond.device)
    inputs = {"grad": grad, "up": up, "K": K, "parts": parts}
    _triton.launch(
        lora_hidden_backward_kernel, (layers * parts, ranks, batches), tile, partial=partial, **inputs, **sizes
    )

    tile = _triton.pick(LORA, ("down_backward", block_of_rank(rank)), cond.device)
    inputs = {"grad_hidden": partial.sum(0), "cond": cond, "down": down}
    partial = torch.empty((layers, batch, D), dtype=torch.float32, device=cond.device)
    grid = (layers, triton.cdiv(D, tile.blocks["BLOCK_D"]), 1)
    outputs = {"grad_down": grad_down, "partial": partial}
    _triton.launch(lora_down_backward_kernel, grid, tile, D=D, **inputs, **outputs, **sizes)
    grad_cond.copy_(partial.sum(0))
