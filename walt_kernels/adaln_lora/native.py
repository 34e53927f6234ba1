"""Tensors to addresses: calls the C++ kernels and allocates what they write."""

from __future__ import annotations

import torch

from .._native import C, view


def adaln_residual(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    x_new = torch.empty(x.shape, dtype=x.dtype)
    C.adaln_residual(view(x), view(branch), view(gate), view(x_new), threads=torch.get_num_threads())
    return x_new


def adaln_residual_backward(grad: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor, ...]:
    frames = gate.shape[1]
    wide = grad.float().unflatten(1, (frames, -1))
    grad_gate = (wide * branch.float().unflatten(1, (frames, -1))).sum(2).to(gate.dtype)
    grad_branch = (wide * gate.float()[:, :, None]).flatten(1, 2).to(branch.dtype)
    return grad_branch, grad_gate
