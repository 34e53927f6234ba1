"""Triton kernel of the gated residual and the modulated norm.

A program holds whole rows of tokens, ROWS of them, in registers: one pass over memory. Rows wider than a block are
walked in pieces, and read again from the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .triton_rows import arguments_of, arguments_of_rows, load_rows, row_offset, unrounded
from .triton_tiles import MODULATION, block_of


@triton.jit
def adaln_forward_kernel(
    x, branch, gate, shift, scale, x_new, h, mean, rstd,
    x_b, x_n, branch_b, branch_n, gate_b, gate_f, gate_tokens,
    shift_b, shift_f, shift_tokens, scale_b, scale_f, scale_tokens,
    count, tokens, D, eps,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, SINGLE: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = token < count
    x_rows = row_offset(token, tokens, x_b, x_n, False, 1)
    branch_rows = x_rows
    gate_rows = x_rows
    if RESIDUAL:
        branch_rows = row_offset(token, tokens, branch_b, branch_n, False, 1)
        gate_rows = row_offset(token, tokens, gate_b, gate_f, True, gate_tokens)
    out_rows = token.to(tl.int64) * D
    columns = tl.arange(0, BLOCK_D)
    if SINGLE:
        inside = valid[:, None] & (columns < D)[None, :]
        value = unrounded(x, branch, gate, x_rows, branch_rows, gate_rows, columns, inside, RESIDUAL)
        if RESIDUAL:
            tl.store(x_new + out_rows[:, None] + columns[None, :], value.to(x_new.dtype.element_ty), mask=inside)
        if NORM:
            row_mean = tl.sum(value, 1) / D
            centred = tl.where(inside, value - row_mean[:, None], 0.0)
            row_rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / D + eps)
            scale_rows = row_offset(token, tokens, scale_b, scale_f, True, scale_tokens)
            shift_rows = row_offset(token, tokens, shift_b, shift_f, True, shift_tokens)
            out = centred * row_rstd[:, None] * (1.0 + load_rows(scale, scale_rows, columns, inside))
            out += load_rows(shift, shift_rows, columns, inside)
            tl.store(h + out_rows[:, None] + columns[None, :], out.to(h.dtype.element_ty), mask=inside)
            tl.store(mean + token, row_mean, mask=valid)
            tl.store(rstd + token, row_rstd, mask=valid)
    else:
        total = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for begin in range(0, D, BLOCK_D):
            at = begin + columns
            inside = valid[:, None] & (at < D)[None, :]
            value = unrounded(x, branch, gate, x_rows, branch_rows, gate_rows, at, inside, RESIDUAL)
            if RESIDUAL:
                tl.store(x_new + out_rows[:, None] + at[None, :], value.to(x_new.dtype.element_ty), mask=inside)
            total += value
        if NORM:
            row_mean = tl.sum(total, 1) / D
            total = tl.zeros((ROWS, BLOCK_D), tl.float32)
            for begin in range(0, D, BLOCK_D):
                at = begin + columns
                inside = valid[:, None] & (at < D)[None, :]
                value = unrounded(x, branch, gate, x_rows, branch_rows, gate_rows, at, inside, RESIDUAL)
                centred = tl.where(inside, value - row_mean[:, None], 0.0)
                total += centred * centred
            row_rstd = 1.0 / tl.sqrt_rn(tl.sum(total, 1) / D + eps)
            scale_rows = row_offset(token, tokens, scale_b, scale_f, True, scale_tokens)
            shift_rows = row_offset(token, tokens, shift_b, shift_f, True, shift_tokens)
            for begin in range(0, D, BLOCK_D):
                at = begin + columns
                inside = valid[:, None] & (at < D)[None, :]
                value = unrounded(x, branch, gate, x_rows, branch_rows, gate_rows, at, inside, RESIDUAL)
                out = (value - row_mean[:, None]) * row_rstd[:, None] * (1.0 + load_rows(scale, scale_rows, at, inside))
                out += load_rows(shift, shift_rows, at, inside)
                tl.store(h + out_rows[:, None] + at[None, :], out.to(h.dtype.element_ty), mask=inside)
            tl.store(mean + token, row_mean, mask=valid)
            tl.store(rstd + token, row_rstd, mask=valid)


def forward(
    *,
    x: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    x_new: Tensor | None = None,
    h: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    B, N, D = x.shape
    if B * N == 0:
        return
    block, single = block_of(D)

    def run(tile: _triton.Tile) -> None:
        _triton.launch(
            adaln_forward_kernel,
            (triton.cdiv(B * N, tile.blocks["ROWS"]),),
            tile,
            **(arguments_of("x", x) | arguments_of("branch", branch)),
            **(
                arguments_of_rows("gate", gate, N)
                | arguments_of_rows("shift", shift, N)
                | arguments_of_rows("scale", scale, N)
            ),
            **{"x_new": x_new, "h": h, "mean": mean, "rstd": rstd, "count": B * N, "tokens": N, "D": D, "eps": eps},
            **{"RESIDUAL": branch is not None, "NORM": h is not None, "SINGLE": single, "BLOCK_D": block},
        )

    run(_triton.pick(MODULATION, ("forward", block), x.device, run))
