from __future__ import annotations

from typing import Any

import torch

from .._dispatch import select
from . import op, reference


def _prepare_residual(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> dict[str, Any]:
    return {"x": x, "branch": branch, "gate": gate[:, None] if gate.dim() == 2 else gate}


op.register_ops(_prepare_residual)


def adaln_residual(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    inputs = _prepare_residual(x, branch, gate)
    chosen = select("adaln_residual", inputs)
    if chosen == "reference":
        return reference.adaln_residual(**inputs)
    return torch.ops.walt_kernels.adaln_residual(*inputs.values(), chosen)
