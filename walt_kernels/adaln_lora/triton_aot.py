"""Calls that reach every Triton kernel of the adaln ops and every entry of their tile tables, for ``_aot``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from . import triton_kernels as kernels

# On sm_100 the assembler uses a few bytes of stack although registers are left.
SPILLS = {"lora_hidden_kernel": 16, "lora_down_backward_kernel": 8}

# x and modulation; models train with float32 modulation beside 16-bit tokens as well.
_DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16, float32 rows": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
}


def _modulation(D: int, x_dtype: torch.dtype, row_dtype: torch.dtype, residual: bool) -> None:
    """Forward and backward of one op with the strided rows of a chunked 6 D table."""
    B, N = 2, 1280
    x, branch, grad = (torch.empty(B, N, D, dtype=x_dtype) for _ in range(3))
    gate, shift, scale = torch.empty(B, 6 * D, dtype=row_dtype).chunk(6, 1)[2:5]
    if residual:
        _, _, mean, rstd = kernels.adaln_residual_modulate(x, branch, gate, shift, scale, 1e-6)
        kernels.adaln_residual_modulate_backward(grad, grad, x, branch, gate, scale, mean, rstd, 0)
    else:
        _, mean, rstd = kernels.adaln_modulate(x, shift, scale, 1e-6)
        kernels.adaln_modulate_backward(grad, x, scale, mean, rstd, 0)


def _only_h_has_a_gradient(D: int, dtype: torch.dtype) -> None:
    x, gate, mean = torch.empty(2, 1280, D, dtype=dtype), torch.empty(2, D, dtype=dtype), torch.empty(2, 1280)
    kernels.adaln_residual_modulate_backward(None, x, x, x, gate, gate, mean, mean, 0)


def _residual(D: int, dtype: torch.dtype) -> None:
    x, gate = torch.empty(2, 1280, D, dtype=dtype), torch.empty(2, 20, D, dtype=dtype)
    kernels.adaln_residual(x, x, gate)
    kernels.adaln_residual_backward(x, x, gate)


def _lora(rank: int, dtype: torch.dtype) -> None:
    def tensor(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    cond, base, down, up = tensor(2, 1024), tensor(2, 6144), tensor(24, rank, 1024), tensor(24, 6144, rank)
    out, hidden = kernels.adaln_lora(cond, base, down, up)
    kernels.adaln_lora_backward(out, hidden, cond, down, up)


def aot_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    for name, (x, rows) in _DTYPES.items():
        yield f"residual_modulate D 1024, {name}", partial(_modulation, 1024, x, rows, True)
    for D in (16, 32, 64, 128, 256, 512, 1152, 4096, 5120):
        yield f"residual_modulate D {D}, bf16", partial(_modulation, D, torch.bfloat16, torch.bfloat16, True)
    yield "modulate D 1024, bf16", partial(_modulation, 1024, torch.bfloat16, torch.bfloat16, False)
    yield "residual D 1024, bf16", partial(_residual, 1024, torch.bfloat16)
    yield "residual_modulate D 1024, bf16, gradient of h alone", partial(_only_h_has_a_gradient, 1024, torch.bfloat16)
    for rank in (2, 256):
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            yield f"lora rank {rank}, {name}", partial(_lora, rank, dtype)
