# mypy: disable-error-code="no-untyped-def"
"""Triton kernel of the gated residual and the modulated norm.

A program holds whole rows of tokens, ROWS of them at once, in registers: one pass over memory. Its next rows are on
their way while it works on these. Rows wider than a block are walked in pieces, and read again from the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .triton_rows import (
    Runs,
    load_modulation,
    load_residual,
    load_rows,
    matrices,
    matrix_of,
    modulation,
    run_of,
    segments_of,
)
from .triton_tiles import FORWARD_ELEMENTS, MODULATION, block_of, fitting, parts_of


@triton.jit
def adaln_forward_kernel(
    x, branch, gate, shift, scale, x_new, h, mean, rstd, runs, D, eps,
    SINGLE: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The tokens of a run; ``SINGLE``: a block holds a whole row."""
    b, begin, end = run_of(runs)
    columns = tl.arange(0, BLOCK_D).to(tl.int64)
    x = matrix_of(x, b)
    if branch.at is not None:
        branch = matrix_of(branch, b)
    if SINGLE:
        within = columns < D
        n = begin + tl.arange(0, ROWS)
        inside = (n < end)[:, None] & within[None, :]
        next_x = load_rows(x, n, columns, inside)
        if branch.at is not None:
            next_branch = load_rows(branch, n, columns, inside)
            factor = load_modulation(gate, b, begin, columns, within)
        if h is not None:
            gain = 1.0 + load_modulation(scale, b, begin, columns, within)
            offset = load_modulation(shift, b, begin, columns, within)
    for first in range(begin, end, ROWS):
        n = first + tl.arange(0, ROWS)
        token = b * runs.tokens + n
        valid = n < end
        if SINGLE:
            inside = valid[:, None] & within[None, :]
            ahead = (n + ROWS < end)[:, None] & within[None, :]
            out = token[:, None] * D + columns[None, :]
            value = next_x.to(tl.float32)
            next_x = load_rows(x, n + ROWS, columns, ahead)
            if branch.at is not None:
                value += factor * next_branch.to(tl.float32)
                next_branch = load_rows(branch, n + ROWS, columns, ahead)
                tl.store(x_new + out, value.to(x_new.dtype.element_ty), mask=inside)
            if h is not None:
                row_mean = tl.sum(value, 1) / D
                centred = tl.where(inside, value - row_mean[:, None], 0.0)
                row_rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / D + eps)
                normal = centred * row_rstd[:, None] * gain + offset
                tl.store(h + out, normal.to(h.dtype.element_ty), mask=inside)
                tl.store(mean + token, row_mean, mask=valid)
                tl.store(rstd + token, row_rstd, mask=valid)
        else:
            total = tl.zeros((ROWS, BLOCK_D), tl.float32)
            for piece in range(0, D, BLOCK_D):
                at = piece + columns
                within = at < D
                inside = valid[:, None] & within[None, :]
                value = load_residual(x, branch, gate, b, first, n, at, within, inside)
                if branch.at is not None:
                    out = token[:, None] * D + at[None, :]
                    tl.store(x_new + out, value.to(x_new.dtype.element_ty), mask=inside)
                total += value
            if h is not None:
                row_mean = tl.sum(total, 1) / D
                total = tl.zeros((ROWS, BLOCK_D), tl.float32)
                for piece in range(0, D, BLOCK_D):
                    at = piece + columns
                    within = at < D
                    inside = valid[:, None] & within[None, :]
                    value = load_residual(x, branch, gate, b, first, n, at, within, inside)
                    centred = tl.where(inside, value - row_mean[:, None], 0.0)
                    total += centred * centred
                row_rstd = 1.0 / tl.sqrt_rn(tl.sum(total, 1) / D + eps)
                for piece in range(0, D, BLOCK_D):
                    at = piece + columns
                    within = at < D
                    inside = valid[:, None] & within[None, :]
                    value = load_residual(x, branch, gate, b, first, n, at, within, inside)
                    gain = load_modulation(scale, b, first, at, within)
                    offset = load_modulation(shift, b, first, at, within)
                    normal = (value - row_mean[:, None]) * row_rstd[:, None] * (1.0 + gain) + offset
                    tl.store(h + token[:, None] * D + at[None, :], normal.to(h.dtype.element_ty), mask=inside)
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
    block, single = block_of(D)
    segments = segments_of(gate, shift, scale)
    length = N // segments
    processors = _triton.target(x.device).processors

    def run(tile: _triton.Tile) -> None:
        tile = fitting(tile, length)
        steps = triton.cdiv(length, tile.blocks["ROWS"])
        parts = parts_of(steps, B * segments, block, FORWARD_ELEMENTS, processors)
        _triton.launch(
            adaln_forward_kernel,
            (B * segments * parts,),
            tile,
            **{"x": matrices(x), "branch": matrices(branch), "runs": Runs(N, segments, parts)},
            **{"gate": modulation(gate, N), "shift": modulation(shift, N), "scale": modulation(scale, N)},
            **{"x_new": x_new, "h": h, "mean": mean, "rstd": rstd, "eps": eps},
            **{"D": D, "SINGLE": single, "BLOCK_D": block},
        )

    run(_triton.pick(MODULATION, ("forward", block), x.device, run))
