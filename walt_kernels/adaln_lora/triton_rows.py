# mypy: disable-error-code="no-untyped-def"
"""What the Triton kernels of the adaln ops share: runs of tokens, loading of rows, and the arguments that say where.

Tokens that share a row of every modulation tensor are a segment. A program has a run: one part of one segment. Its rows
of modulation are loaded once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def run_of(tokens, segments, parts):
    """Sample, first token and end of this program's run."""
    program = tl.program_id(0)
    length = tokens // segments
    first = program // parts % segments * length
    part = (program % parts).to(tl.int64)
    begin = first + (length * part // parts).to(tl.int32)
    end = first + (length * (part + 1) // parts).to(tl.int32)
    return (program // (segments * parts)).to(tl.int64), begin, end


@triton.jit
def load_rows(pointer, n, stride_n, columns, stride_d, inside):
    """Rows of the tokens ``n``, in their dtype; read for the last time: nothing else need leave the caches for them."""
    at = pointer + n.to(tl.int64)[:, None] * stride_n + columns[None, :] * stride_d
    return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_modulation(pointer, b, n, tokens_per_row, stride_b, stride_f, stride_d, columns, within):
    """The modulation row of token n of sample b, [1, columns]."""
    at = pointer + b * stride_b + (n // tokens_per_row).to(tl.int64) * stride_f + columns * stride_d
    return tl.load(at, mask=within, other=0.0).to(tl.float32)[None, :]


class Runs(NamedTuple):
    """Segments of a sample, parts of each."""

    segments: int
    parts: int


def frames_of(rows: Tensor | None) -> int:
    """Rows that a sample has of a modulation tensor, [B, D] or [B, F, D]."""
    return 1 if rows is None or rows.dim() == 2 else rows.shape[1]


def segments_of(*modulation: Tensor | None) -> int:
    return math.lcm(*map(frames_of, modulation))


def arguments_of(name: str, tensor: Tensor | None) -> dict[str, object]:
    """Arguments of a [B, N, D] tensor."""
    steps = (0, 0, 0) if tensor is None else tensor.stride()
    return {name: tensor, **{f"{name}_{axis}": step for axis, step in zip("bnd", steps, strict=True)}}


def arguments_of_rows(name: str, tensor: Tensor | None, tokens: int) -> dict[str, object]:
    """Arguments of modulation rows, [B, D] or [B, F, D], each of which belongs to some of the tokens of a sample."""
    b, f, d = 0, 0, 0
    if tensor is not None:
        b, d = tensor.stride(0), tensor.stride(-1)
        f = tensor.stride(1) if tensor.dim() == 3 else 0
    each = max(1, tokens // frames_of(tensor))
    return {name: tensor, f"{name}_b": b, f"{name}_f": f, f"{name}_d": d, f"{name}_tokens": each}
