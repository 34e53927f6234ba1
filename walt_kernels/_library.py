"""The one torch.library of this package, and what all ops share: definition, second derivatives, autocast."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("walt_kernels", "DEF")

# torch.jit.trace fears for every check of a size that it makes the trace depend on the size. Ours do not.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module="walt_kernels")


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


def decompose(name: str, reference: Callable[..., Any], outputs: int) -> None:
    """Tells torch how ``walt_kernels::name`` is composed of PyTorch's own ops: what torch.onnx.export translates.

    ``reference`` is called with the arguments but the backend. ``outputs`` is how many the op has; those beyond the
    reference's are saved for the backward pass. An exported program has none, so they are NaN.
    """

    def decomposition(*arguments: Any) -> Any:
        results = reference(*arguments[:-1])
        if outputs == 1:
            return results
        results = results if isinstance(results, tuple) else (results,)
        return (*results, *[arguments[0].new_full((), math.nan)] * (outputs - len(results)))

    op = getattr(torch.ops.walt_kernels, name).default
    torch._decomp.decomposition_table[op] = decomposition
    # With open sizes a FakeTensor would run the decomposition in place of the fake, but for the ops in this table.
    torch._decomp.meta_table[op] = decomposition


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for tensors on such a device; never where PyTorch has none, as on "meta"."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Casts floating tensors as autocast does for convolutions and attention; outside it returns them as they are."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    castable = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if t is not None and t.dtype in castable else t for t in tensors)


def is_open(size: int) -> bool:
    """Whether a graph that is being captured leaves this size open: no branch in Python may then depend on it."""
    if torch.jit.is_tracing():
        return True
    if type(size) is int and not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(size)
