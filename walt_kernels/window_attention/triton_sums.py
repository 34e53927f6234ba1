"""Sums of partial rows in a fixed order."""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .triton_tiles import SUMS


@triton.jit
def sum_rows_kernel(rows, out, other_out, count, other_count, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row i of ``out`` becomes the sum of the i-th of as many runs of the first ``count`` rows as axis 0 has programs.

    There are no more runs than tiles of rows. The second programs along axis 2 do the same for ``other_out`` with the
    ``other_count`` rows behind those.
    """
    which = tl.program_id(2)
    rows += which.to(tl.int64) * count * columns
    count = tl.where(which == 0, count, other_count)
    part = tl.program_id(0)
    parts = tl.maximum(1, tl.minimum(tl.num_programs(0), tl.cdiv(count, ROWS)))
    first = part.to(tl.int64) * count // parts
    last = tl.where(part < parts, (part + 1).to(tl.int64) * count // parts, first)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, (last - first).to(tl.int32), ROWS):
        row = first + start + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & (column < columns)[None, :]
        total += tl.load(rows + row[:, None] * columns + column[None, :], mask=mask, other=0.0)
    at = part.to(tl.int64) * columns + column
    mask = (column < columns) & (part < parts)
    if which == 0:
        tl.store(out + at, tl.sum(total, 0).to(out.dtype.element_ty), mask=mask)
    elif other_out is not None:
        tl.store(other_out + at, tl.sum(total, 0).to(other_out.dtype.element_ty), mask=mask)


def sum_rows(rows: Tensor, *sums: tuple[int, Tensor]) -> None:
    """Of one or two (count, out): out[columns] = the sum of the next ``count`` of rows [all counts, columns], float32.

    Over the machine first, then over its parts.
    """
    columns = rows.shape[1]
    counts, outs = [count for count, _ in sums], [out for _, out in sums]
    tile = _triton.pick(SUMS, ("sum_rows",), rows.device)
    most = _triton.target(rows.device).processors
    parts = [max(1, min(most, -(-count // tile.blocks["ROWS"]))) for count in counts]

    def launch(programs: int, rows: Tensor, counts: list[int], outs: list[Tensor]) -> None:
        grid = (programs, -(-columns // tile.blocks["COLUMNS"]), len(outs))
        more: dict[str, Any] = {"out": outs[0], "other_out": None if len(outs) == 1 else outs[1], "count": counts[0]}
        _triton.launch(sum_rows_kernel, grid, tile, rows=rows, other_count=counts[-1], columns=columns, **more)

    if max(parts) > 1:
        halfway = _triton.empty((sum(parts), columns), torch.float32, rows.device)
        launch(max(parts), rows, counts, list(halfway.split(parts)))
        rows, counts = halfway, parts
    launch(1, rows, counts, outs)
