"""The definition of the adaln ops in plain PyTorch: right in float64, differentiable any number of times."""

from __future__ import annotations

import torch


def rows_per_token(modulation: torch.Tensor, tokens: int) -> torch.Tensor:
    """[B, F, D] -> [B, N, D]: one modulation row for every N / F consecutive tokens."""
    return modulation.repeat_interleave(tokens // modulation.shape[1], dim=1)


def adaln_residual(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    gate = rows_per_token(gate, x.shape[1])
    return (x.to(wide) + gate.to(wide) * branch.to(wide)).to(x.dtype)
