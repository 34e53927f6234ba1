"""The one torch.library of this package, and what all ops share: definition, derivatives, autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

LIBRARY = torch.library.Library("walt_kernels", "DEF")

# What an op's autograd knows: tensors and options in the order of the schema. None where an argument has no tangent.
Tangents = Sequence[Tensor | None]
Tangent = Callable[[Sequence[Any], Tangents], tuple[Tensor | None, ...]]


def define(
    name: str,
    schema: str,
    *,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    tangent: Tangent | None = None,
) -> None:
    """Defines ``walt_kernels::name``: implementation, fake, reverse and forward derivative, vmap.

    ``backward`` is autograd's, with ``setup_context``. ``tangent(arguments, tangents)`` returns the tangent of every
    output, None for those without. An op without them is itself a backward pass: differentiating it raises an error
    that says so, and never gives a zero.
    """
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"walt_kernels::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.walt_kernels, name).default

    def no_second_derivative(*_: Any) -> Any:
        raise RuntimeError(
            f"{name.removesuffix('_backward')} has no second derivative; "
            "run it with use_backend('reference') where one is needed"
        )

    kernel = _autograd_kernel(op, setup_context, backward or no_second_derivative, tangent or no_second_derivative)
    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    torch.library.register_vmap(op, _one_by_one(op), lib=LIBRARY)


def transformed() -> bool:
    """Whether forward mode or a transform of torch.func is at work: more than an autograd.Function has to know of."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _autograd_kernel(
    op: Any, setup_context: Callable[..., None] | None, backward: Callable[..., Any], tangent: Tangent
) -> Callable[..., Any]:
    """Autograd for an op, as ``torch.library.register_autograd`` makes it, and more: forward mode and torch.func.

    PyTorch's own knows reverse mode only: under ``torch.func.jvp`` its result has no tangent, which counts as zero,
    and ``torch.func.grad`` refuses it.
    """

    def below(keyset: Any, arguments: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    # "Single level": torch.func's levels come through the dispatcher, one at a time.
    class Node(_SingleLevelFunction):
        apply: Callable[..., Any]  # of its base in C++

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            *inputs, keyset = arguments
            if torch._C._are_functorch_transforms_active():
                # PyTorch switches derivatives off in here; the levels of torch.func below this one need theirs.
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                    output = below(keyset, inputs)
            else:
                output = below(keyset, inputs)
            if setup_context is not None:
                setup_context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (*backward(ctx, *grads), None)

    Node.__name__ = Node.__qualname__ = f"{op._opname}_node"

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if transformed():
            arguments = unwrap_dead_wrappers(arguments)
            duals = [forward_ad.unpack_dual(a, level=0) if isinstance(a, Tensor) else (a, None) for a in arguments]
            primals, tangents = zip(*duals, strict=True)
            if any(t is not None for t in tangents):
                return _with_tangents(kernel(keyset, *primals), tangent(primals, tangents))
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return below(keyset, arguments)
        if not torch._C._are_functorch_transforms_active():
            return Node.apply(*arguments, keyset)
        with enable_single_level_autograd_function():
            return Node.apply(*arguments, keyset)

    return kernel


def _with_tangents(outputs: Any, tangents: Tangents) -> Any:
    if isinstance(outputs, Tensor):
        return _with_tangents((outputs,), tangents)[0]
    return tuple(
        output if tangent is None else forward_ad.make_dual(output, tangent, level=0)
        for output, tangent in zip(outputs, tangents, strict=True)
    )


def composed_tangent(reference: Callable[..., Any], outputs: int) -> Tangent:
    """The tangent of an op through PyTorch's forward mode on its reference, called with the arguments but the backend.

    ``outputs`` is how many the op has; those beyond the reference's are saved for the backward pass and have none.
    """

    def tangent(primals: Sequence[Any], tangents: Tangents) -> tuple[Tensor | None, ...]:
        duals = [
            p if t is None else forward_ad.make_dual(p, t, level=0) for p, t in zip(primals, tangents, strict=True)
        ]
        results = reference(*duals[:-1])
        results = results if isinstance(results, tuple) else (results,)
        found = [forward_ad.unpack_dual(result, level=0).tangent for result in results]
        return (*found, *[None] * (outputs - len(found)))

    return tangent


def _one_by_one(op: Any) -> Callable[..., Any]:
    """vmap: the op for each element of the mapped dimension, results stacked."""

    def rule(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
        results = [
            op(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Casts floating tensors as autocast does for convolutions and attention; outside it returns them as they are."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    castable = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if t is not None and t.dtype in castable else t for t in tensors)
