"""What the Triton backend runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .triton_data import backward_data
from .triton_forward import forward
from .triton_patch import in_boxes, takes
from .triton_weight import backward_bias, backward_weight


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    history: Tensor | None,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_history: Tensor | None,
    **options: Any,
) -> None:
    plain = (options["stride"], options["dilation"], options["space_padding"], options["groups"])
    if history is None and (grad_x is not None or grad_weight is not None) and takes(grad_y, x, weight, *plain):
        grad_y = in_boxes(grad_y)  # once for both
    if grad_x is not None or grad_history is not None:
        backward_data(grad_y, x, weight, history, grad_x, grad_history, **options)
    if grad_weight is not None:
        backward_weight(grad_y, x, weight, history, grad_weight, **options)
    if grad_bias is not None:
        backward_bias(grad_y, grad_bias)


__all__ = ["backward", "forward"]
