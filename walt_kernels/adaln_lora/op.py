"""Schemas, fakes and autograd of the adaln ops, and their backend tables."""

from __future__ import annotations

from typing import Any

import torch

from .. import _native
from .._dispatch import Backend, backend, register
from .._library import define
from . import native, reference


def _unsupported(**inputs: Any) -> str | None:
    return _native.unsupported(*inputs.values())


def register_ops(prepare: Any) -> None:
    register(
        "adaln_residual",
        prepare,
        [
            Backend("cpu", _unsupported, native.adaln_residual, native.adaln_residual_backward),
            Backend("reference", lambda **inputs: None, reference.adaln_residual),
        ],
    )


def _residual(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, chosen: str) -> torch.Tensor:
    return backend("adaln_residual", chosen).forward(x, branch, gate)


def _residual_fake(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, chosen: str) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _residual_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _x, branch, gate, ctx.chosen = inputs
    ctx.save_for_backward(branch, gate)
    ctx.set_materialize_grads(False)


def _residual_backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    branch, gate = ctx.saved_tensors
    grad_branch, grad_gate = torch.ops.walt_kernels.adaln_residual_backward(grad, branch, gate, ctx.chosen)
    return grad, grad_branch, grad_gate, None


define(
    "adaln_residual",
    "(Tensor x, Tensor branch, Tensor gate, str backend) -> Tensor",
    impl=_residual,
    fake=_residual_fake,
    setup_context=_residual_setup,
    backward=_residual_backward,
)


def _residual_backward_impl(grad: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, chosen: str) -> Any:
    return backend("adaln_residual", chosen).backward(grad, branch, gate)


define(
    "adaln_residual_backward",
    "(Tensor grad, Tensor branch, Tensor gate, str backend) -> (Tensor, Tensor)",
    impl=_residual_backward_impl,
    fake=lambda grad, branch, gate, chosen: (
        torch.empty(branch.shape, dtype=branch.dtype, device=branch.device),
        torch.empty(gate.shape, dtype=gate.dtype, device=gate.device),
    ),
)
