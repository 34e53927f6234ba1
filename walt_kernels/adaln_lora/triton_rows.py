# mypy: disable-error-code="no-untyped-def"
"""What the Triton kernels of the adaln ops share: tensors with their strides, runs of tokens, and loading of rows.

Tokens that share a row of every modulation tensor are a segment. A program has a run: one part of one segment. Its rows
of modulation are loaded once.

A tensor and its strides are a named tuple, whose items Triton specialises as it does arguments; of an absent tensor
``at`` is None.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Matrix(NamedTuple):
    """[rows, columns]: where it begins, and its strides."""

    at: Any
    row: int
    column: int


class Matrices(NamedTuple):
    """[matrices, rows, columns], one of each sample or layer."""

    at: Any
    matrix: int
    row: int
    column: int


class Modulation(NamedTuple):
    """[B, D] or [B, F, D], each row of which belongs to so many tokens of a sample."""

    at: Any
    b: int
    f: int
    d: int
    tokens: int


class Runs(NamedTuple):
    """Tokens and segments of a sample, parts of each segment."""

    tokens: int
    segments: int
    parts: int


@triton.jit
def run_of(runs):
    """Sample, first token and end of this program's run."""
    program = tl.program_id(0)
    length = runs.tokens // runs.segments
    first = program // runs.parts % runs.segments * length
    part = (program % runs.parts).to(tl.int64)
    begin = first + (length * part // runs.parts).to(tl.int32)
    end = first + (length * (part + 1) // runs.parts).to(tl.int32)
    return (program // (runs.segments * runs.parts)).to(tl.int64), begin, end


@triton.jit
def matrix_of(x, number):
    """One of the matrices of ``x``; ``number`` has 64 bits."""
    return Matrix(x.at + number * x.matrix, x.row, x.column)


@triton.jit
def load_rows(x, n, columns, inside):
    """Rows of the tokens ``n``, in their dtype; read for the last time: nothing else need leave the caches for them."""
    at = x.at + n.to(tl.int64)[:, None] * x.row + columns[None, :] * x.column
    return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_modulation(x, b, n, columns, within):
    """The modulation row of token n of sample b, [1, columns]."""
    at = x.at + b * x.b + (n // x.tokens).to(tl.int64) * x.f + columns * x.d
    return tl.load(at, mask=within, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_residual(x, branch, gate, b, first, n, columns, within, inside):
    """x + gate * branch of the tokens ``n``, which share the gate of token ``first``; x where there is no branch."""
    value = load_rows(x, n, columns, inside).to(tl.float32)
    if branch.at is not None:
        factor = load_modulation(gate, b, first, columns, within)
        value += factor * load_rows(branch, n, columns, inside).to(tl.float32)
    return value


def frames_of(rows: Tensor | None) -> int:
    """Rows that a sample has of a modulation tensor, [B, D] or [B, F, D]."""
    return 1 if rows is None or rows.dim() == 2 else rows.shape[1]


def segments_of(*modulation: Tensor | None) -> int:
    return math.lcm(*map(frames_of, modulation))


def matrix(tensor: Tensor) -> Matrix:
    return Matrix(tensor, *tensor.stride())


def matrices(tensor: Tensor | None) -> Matrices:
    return Matrices(tensor, *((0, 0, 0) if tensor is None else tensor.stride()))


def modulation(tensor: Tensor | None, tokens: int) -> Modulation:
    """The modulation of samples of so many tokens."""
    b, f, d = 0, 0, 0
    if tensor is not None:
        b, d = tensor.stride(0), tensor.stride(-1)
        f = tensor.stride(1) if tensor.dim() == 3 else 0
    return Modulation(tensor, b, f, d, max(1, tokens // frames_of(tensor)))
