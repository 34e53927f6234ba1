"""What users run today for AdaLN: layer_norm and elementwise operations; linears one by one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .contender import Contender


def baselines(inputs: dict[str, Any]) -> dict[str, Contender]:
    """Functions of the same keyword arguments as the op."""

    def linears(cond: Tensor, base: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return torch.stack([base + F.linear(F.linear(cond, d), u) for d, u in zip(down, up, strict=True)])

    def elementwise(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x = x + gate[:, None] * branch
        return x, F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    if "down" in inputs:
        return {"linears": Contender(linears)}
    return {"layer_norm + elementwise": Contender(elementwise)}
