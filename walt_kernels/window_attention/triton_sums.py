"""Sums of partial rows in a fixed order."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .triton_tiles import SUMS


@triton.jit
def sum_rows_kernel(rows, out, count, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row i of ``out`` becomes the sum of the i-th of as many runs of ``rows`` as there are programs along axis 0."""
    part = tl.program_id(0)
    first = part.to(tl.int64) * count // tl.num_programs(0)
    last = (part + 1).to(tl.int64) * count // tl.num_programs(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, (last - first).to(tl.int32), ROWS):
        row = first + start + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & (column < columns)[None, :]
        total += tl.load(rows + row[:, None] * columns + column[None, :], mask=mask, other=0.0)
    kind = out.dtype.element_ty
    tl.store(out + part.to(tl.int64) * columns + column, tl.sum(total, 0).to(kind), mask=column < columns)


def sum_rows(rows: Tensor, out: Tensor | None) -> None:
    """out[columns] = the sum of rows [count, columns], float32: over the machine first, then over its parts."""
    count, columns = rows.shape
    tile = _triton.pick(SUMS, ("sum_rows",), rows.device)
    blocks = -(-columns // tile.blocks["COLUMNS"])
    parts = min(_triton.target(rows.device).processors, -(-count // tile.blocks["ROWS"]))
    if parts > 1:
        halfway = _triton.empty((parts, columns), torch.float32, rows.device)
        _triton.launch(sum_rows_kernel, (parts, blocks), tile, rows=rows, out=halfway, count=count, columns=columns)
        rows, count = halfway, parts
    _triton.launch(sum_rows_kernel, (1, blocks), tile, rows=rows, out=out, count=count, columns=columns)
