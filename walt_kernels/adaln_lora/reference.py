"""The definition of the adaln ops in plain PyTorch: right in float64, differentiable any number of times."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .._library import autocast_enabled


def adaln_lora(cond: Tensor, base: Tensor, down: Tensor, up: Tensor) -> Tensor:
    device = cond.device.type
    if autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return adaln_lora(cond, base, down, up)
    layers, rank, width = down.shape
    hidden = functional.linear(cond, down.reshape(layers * rank, width)).unflatten(1, (layers, rank)).transpose(0, 1)
    return base + hidden @ up.transpose(1, 2)


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    return _modulate(_widen(x), shift, scale, eps).to(x.dtype)


def adaln_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return _residual(x, branch, gate).to(x.dtype)


def adaln_residual_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    x_new = _residual(x, branch, gate)  # unrounded: the norm sees more digits than x_new has in 16 bits
    return x_new.to(x.dtype), _modulate(x_new, shift, scale, eps).to(x.dtype)


def _residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return _widen(x) + _per_token(_widen(branch), gate, torch.mul)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    normal = functional.layer_norm(x, x.shape[-1:], eps=eps)
    return _per_token(_per_token(normal, 1 + _widen(scale), torch.mul), shift, torch.add)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _per_token(x: Tensor, rows: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """combine(x, rows): one row of ``rows`` ([B, D] or [B, F, D]) for every N / F consecutive tokens of x [B, N, D]."""
    frames = rows.shape[1] if rows.dim() == 3 else 1
    rows = _widen(rows).reshape(rows.shape[0], frames, 1, rows.shape[-1])
    return combine(x.unflatten(1, (frames, x.shape[1] // frames)), rows).flatten(1, 2)
