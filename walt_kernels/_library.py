"""The one torch.library of this package, and what all ops share: definition, second derivatives, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("walt_kernels", "DEF")


def define(
    name: str,
    schema: str,
    *,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Defines ``walt_kernels::name`` with its implementation, fake and autograd formula.

    Without ``backward`` the op is itself a backward pass: differentiating it raises an error that says so.
    """
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"walt_kernels::{name}", fake, lib=LIBRARY)
    if backward is None:
        forward_name = name.removesuffix("_backward")

        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(
                f"{forward_name} has no second derivative; run it with use_backend('reference') where one is needed"
            )

    torch.library.register_autograd(f"walt_kernels::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Casts floating tensors as autocast does for convolutions and attention; outside it returns them as they are."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    castable = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if t is not None and t.dtype in castable else t for t in tensors)
