"""Calls that reach every Triton kernel of the adaln ops and every entry of their tile tables, for ``_aot``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._aot import Call

# On sm_90 and sm_100 the assembler uses a few bytes of stack although registers are left.
SPILLS = {"lora_hidden_kernel": 16, "lora_down_backward_kernel": 8, "lora_out_kernel, lora rank 256, bf16": 8}

# x and modulation; models train with float32 modulation beside 16-bit tokens as well.
_DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16, float32 rows": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
}


def _modulation(D: int, x_dtype: torch.dtype, row_dtype: torch.dtype) -> dict[str, Tensor]:
    """The strided rows of a chunked 6 D table."""
    B, N = 2, 1280
    gate, shift, scale = torch.empty(B, 6 * D, dtype=row_dtype, device="meta").chunk(6, 1)[2:5]
    x, branch = torch.empty(2, B, N, D, dtype=x_dtype, device="meta")
    return {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale}


def _lora(rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {"cond": (2, 1024), "base": (2, 6144), "down": (24, rank, 1024), "up": (24, 6144, rank)}
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}


def aot_calls() -> Iterator[Call]:
    both, half = "adaln_residual_modulate", torch.bfloat16
    for name, (x, rows) in _DTYPES.items():
        yield Call(f"residual_modulate D 1024, {name}", both, _modulation(1024, x, rows))
    for D in (16, 32, 64, 128, 256, 512, 1152, 4096, 5120):
        yield Call(f"residual_modulate D {D}, bf16", both, _modulation(D, half, half))
    inputs = _modulation(1024, half, half)
    modulated = {name: inputs[name] for name in ("x", "shift", "scale")}
    yield Call("modulate D 1024, bf16", "adaln_modulate", modulated)
    gate = torch.empty(2, 20, 1024, dtype=half, device="meta")
    yield Call("residual D 1024, bf16", "adaln_residual", {"x": inputs["x"], "branch": inputs["branch"], "gate": gate})
    yield Call("residual_modulate D 1024, bf16, gradient of h alone", both, inputs, ("x_new",))
    for rank in (2, 256):
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            yield Call(f"lora rank {rank}, {name}", "adaln_lora", _lora(rank, dtype))
