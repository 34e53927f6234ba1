"""Tensors to addresses: calls the C++ kernels and allocates what they write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._native import C, view


def wide_dtype(q: Tensor) -> torch.dtype:
    """What sums, the table and the norms are held in."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def outputs_like(q: Tensor, parts: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Memory for out [B, T, H, W, heads, dim] and lse [*parts, B, heads, T, H, W]."""
    B, T, H, W, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty((*parts, B, heads, T, H, W), dtype=wide_dtype(q), device=q.device)


def gradients_like(inputs: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor]:
    """Contiguous memory for the gradients; zero elements for those not wanted."""
    q = inputs[0]
    assert q is not None
    return [
        torch.empty(x.shape if x is not None and w else (0,), dtype=(q if x is None else x).dtype, device=q.device)
        for x, w in zip(inputs, wanted, strict=True)
    ]


def _views(inputs: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """The inputs as ``_C`` takes them, and the tensors that must outlive the call."""
    parameters = {
        name: tensor.detach().to(wide_dtype(inputs["q"])).contiguous()
        for name in ("bias_table", "q_norm", "k_norm")
        if (tensor := inputs[name]) is not None
    }
    converted = {
        name: view(value) if isinstance(value, Tensor) else value for name, value in (inputs | parameters).items()
    }
    return converted | {"threads": torch.get_num_threads()}, list(parameters.values())


def window_attention(**inputs: Any) -> tuple[Tensor, Tensor]:
    out, lse = outputs_like(inputs["q"])
    if out.numel() == 0:
        return out, lse
    arguments, _alive = _views(inputs)
    C.window_attention(**arguments, out=view(out), lse=view(lse))
    return out, lse


def window_attention_backward(
    grad: Tensor, out: Tensor, lse: Tensor, inputs: dict[str, Any], names: Sequence[str], wanted: Sequence[bool]
) -> list[Tensor]:
    """Gradients of the inputs ``names``; those not wanted have zero elements."""
    sources = [inputs[name] for name in names]
    grads = gradients_like(sources, wanted)
    if grad.numel() == 0:
        return [g.zero_() for g in grads]
    arguments, _alive = _views(inputs)
    parameters = ("bias_table", "q_norm", "k_norm")
    sums = {
        name: torch.empty(g.shape, dtype=wide_dtype(grad)) if name in parameters and g.dtype != wide_dtype(grad) else g
        for name, g in zip(names, grads, strict=True)
    }
    views = {f"grad_{name}": view(sums[name]) if w else None for name, w in zip(names, wanted, strict=True)}
    C.window_attention_backward(**arguments, lse=view(lse), grad_out=view(grad), **views)
    return [g if sums[name] is g else g.copy_(sums[name]) for name, g in zip(names, grads, strict=True)]
