"""What the Triton kernels of the adaln ops share: finding and loading rows, and the arguments that say where."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .layout import unit


@triton.jit
def row_offset(token, tokens, stride_b, stride_n, PER_ROW: tl.constexpr, tokens_per_row):
    """Offset of each token's row of a [B, N, D] tensor, or of the modulation row it shares with its neighbours."""
    n = token % tokens
    if PER_ROW:
        n = n // tokens_per_row
    return (token // tokens).to(tl.int64) * stride_b + n.to(tl.int64) * stride_n


@triton.jit
def load_rows(pointer, rows, columns, inside):
    return tl.load(pointer + rows[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def unrounded(x, branch, gate, x_rows, branch_rows, gate_rows, columns, inside, RESIDUAL: tl.constexpr):
    """x + gate * branch, or x."""
    value = load_rows(x, x_rows, columns, inside)
    if RESIDUAL:
        value += load_rows(gate, gate_rows, columns, inside) * load_rows(branch, branch_rows, columns, inside)
    return value


def arguments_of(name: str, tensor: Tensor | None) -> dict[str, object]:
    """Arguments of a [B, N, D] tensor."""
    tensor = None if tensor is None else unit(tensor)
    b, n = (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))
    return {name: tensor, f"{name}_b": b, f"{name}_n": n}


def arguments_of_rows(name: str, tensor: Tensor | None, tokens: int) -> dict[str, object]:
    """Arguments of modulation rows, [B, D] or [B, F, D]."""
    tensor = None if tensor is None else unit(tensor)
    if tensor is None:
        b = f = per_row = 0
    elif tensor.dim() == 2:
        b, f, per_row = tensor.stride(0), 0, tokens
    else:
        b, f, per_row = tensor.stride(0), tensor.stride(1), tokens // tensor.shape[1]
    return {name: tensor, f"{name}_b": b, f"{name}_f": f, f"{name}_tokens": per_row}
