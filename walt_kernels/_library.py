"""The one torch.library of this package, and what all ops share: definition, derivatives, autocast."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.nn import Parameter

LIBRARY = torch.library.Library("walt_kernels", "DEF")

# torch.jit.trace fears for every check of a size that it makes the trace depend on the size. Ours do not.
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module="walt_kernels")

# What an op's autograd knows: tensors and options in the order of the schema. None where an argument has no tangent.
Tangents = Sequence[Tensor | None]
Tangent = Callable[[Sequence[Any], Tangents], tuple[Tensor | None, ...]]

# Of options, and of tensors that are not given. For these ``isinstance(value, Tensor)`` takes three times as long.
NO_TENSORS = frozenset((type(None), bool, int, float, str, tuple, list))


def define(
    name: str,
    schema: str,
    *,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    reference: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    tangent: Tangent | None = None,
    composed: frozenset[str] = frozenset(),
) -> Any:
    """Defines ``walt_kernels::name``: implementation, fake, reverse and forward derivative, vmap, decomposition.

    ``reference`` composes it of PyTorch's own ops: it is called with the arguments but the backend, and returns the
    first of the op's outputs; those after them are saved for the backward pass.
    ``backward`` is autograd's, with ``setup_context``. ``tangent(arguments, tangents)`` returns the tangent of every
    output, None for those without; by default it is the reference's. The backends ``composed`` run PyTorch's own ops,
    which have derivatives themselves.

    An op without these is itself a backward pass: differentiating it raises an error that says so, never gives a zero.
    Returns the overload.
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

    if reference is not None:
        _decompose(op, reference)
        tangent = tangent or _composed_tangent(op, reference)
    backward, tangent = backward or no_second_derivative, tangent or no_second_derivative
    kernel = _autograd_kernel(op, setup_context, backward, tangent, composed, impl)
    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    torch.library.register_vmap(op, _one_by_one(op), lib=LIBRARY)
    return op


def transformed() -> bool:
    """Whether forward mode or a transform of torch.func is at work: more than an autograd.Function has to know of."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def in_backward(op: Any, arguments: Sequence[Any]) -> Any:
    """The op as a backward pass calls it: past its autograd kernel where nobody may differentiate the pass again."""
    if torch.is_grad_enabled() or transformed():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _autograd_kernel(
    op: Any,
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any],
    tangent: Tangent,
    composed: frozenset[str],
    impl: Callable[..., Any],
) -> Callable[..., Any]:
    """Autograd for an op, as ``torch.library.register_autograd`` makes it, and more: forward mode and torch.func.

    PyTorch's own knows reverse mode only: under ``torch.func.jvp`` its result has no tangent, which counts as zero,
    and ``torch.func.grad`` refuses it.
    """

    redispatch = op._handle.redispatch_boxed  # op.redispatch is one more call

    def below(keyset: Any, arguments: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def node_forward(ctx: Any, *arguments: Any) -> Any:
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

    def node_backward(ctx: Any, *grads: Any) -> Any:
        return (*backward(ctx, *grads), None)

    # "Single level": torch.func's levels come through the dispatcher, one at a time. Of the op's name, which anomaly
    # detection and profilers show.
    methods = {"forward": staticmethod(node_forward), "backward": staticmethod(node_backward)}
    Node: Any = type(op._opname, (_SingleLevelFunction,), methods)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if arguments[-1] in composed:
            return impl(*arguments)
        if transformed() and not torch.is_inference_mode_enabled():
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


def past_dispatcher(
    name: str,
    impl: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[[Sequence[Any]], Any]:
    """The op on a sequence of arguments for which it is ``unwatched``: a third of the host time of a call is saved."""

    def node_forward(ctx: Any, *arguments: Any) -> Any:
        output = impl(*arguments)
        setup_context(ctx, arguments, output)
        ctx.unwatched = True
        return output

    methods = {"forward": staticmethod(node_forward), "backward": staticmethod(backward)}
    Node: Any = type(name, (_SingleLevelFunction,), methods)

    def run(arguments: Sequence[Any]) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return Node.apply(*arguments)
        return impl(*arguments)

    return run


def unwatched(arguments: Iterable[Any]) -> bool:
    """Whether PyTorch's dispatcher would do no more with this call than hand it to autograd and to the backend.

    Not so where a compiler, a mode, a transform or a profiler looks on, or a tensor is more than memory and strides: of
    a subclass, without memory, negated lazily.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or transformed()
        or torch._C._is_tracing()
        or torch.autograd._profiler_enabled()
    ):
        return False
    for argument in arguments:
        kind = type(argument)
        if kind is Tensor or kind is Parameter:
            if argument.is_meta or argument.is_neg():
                return False
        elif kind not in NO_TENSORS:
            return False
    return True


def _with_tangents(outputs: Any, tangents: Tangents) -> Any:
    if isinstance(outputs, Tensor):
        return _with_tangents((outputs,), tangents)[0]
    return tuple(
        output if tangent is None else forward_ad.make_dual(output, tangent, level=0)
        for output, tangent in zip(outputs, tangents, strict=True)
    )


def _composed_tangent(op: Any, reference: Callable[..., Any]) -> Tangent:
    """PyTorch's forward mode through the reference."""

    def tangent(primals: Sequence[Any], tangents: Tangents) -> tuple[Tensor | None, ...]:
        duals = [
            p if t is None else forward_ad.make_dual(p, t, level=0) for p, t in zip(primals, tangents, strict=True)
        ]
        results = _outputs(op, reference(*duals[:-1]))
        return tuple(None if r is None else forward_ad.unpack_dual(r, level=0).tangent for r in results)

    return tangent


def _decompose(op: Any, reference: Callable[..., Any]) -> None:
    """Tells torch how the op is composed of PyTorch's own, which torch.onnx.export translates: without derivatives."""

    def decomposition(*arguments: Any) -> Any:
        return complete(op, reference(*arguments[:-1]))

    torch._decomp.decomposition_table[op] = decomposition
    # With open sizes a FakeTensor would run the decomposition in place of the fake, but for the ops in this table.
    torch._decomp.meta_table[op] = decomposition


def complete(op: Any, results: Any) -> Any:
    """All that the op returns from what users get: what is saved for a backward pass of its own is NaN."""
    tensors = _outputs(op, results)
    given = as_tuple(results)[0]
    return tensors[0] if len(tensors) == 1 else tuple(given.new_full((), math.nan) if t is None else t for t in tensors)


def _grown(empty: Tensor, dim: int) -> Tensor:
    """One element of zeros in a dimension that has none; in the tensor's graph."""
    return torch.cat([empty, empty.new_zeros([*empty.shape[:dim], 1, *empty.shape[dim + 1 :]])], dim)


def _outputs(op: Any, results: Any) -> tuple[Tensor | None, ...]:
    """All outputs of the op, None for what its reference does not return."""
    return (*as_tuple(results), *[None] * (len(op._schema.returns) - len(as_tuple(results))))


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def _one_by_one(op: Any) -> Callable[..., Any]:
    """vmap: the op for each element of the mapped dimension, results stacked."""

    def rule(info: Any, in_dims: Sequence[Any], *arguments: Any) -> Any:
        given = list(zip(arguments, in_dims, strict=True))
        if not info.batch_size:  # one element of zeros, for the shapes alone
            given = [(_grown(a, d) if isinstance(d, int) else a, d) for a, d in given]
        results = [
            as_tuple(op(*(a.select(d, i) if isinstance(d, int) else a for a, d in given)))
            for i in range(info.batch_size or 1)
        ]
        stacked = [torch.stack(outputs)[: info.batch_size] for outputs in zip(*results, strict=True)]
        return (tuple(stacked), (0,) * len(stacked)) if len(stacked) > 1 else (stacked[0], 0)

    return rule


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for tensors on such a device. "meta" has none."""
    return torch._C._is_any_autocast_enabled() and device != "meta" and torch.is_autocast_enabled(device)


def autocast(first: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts floating tensors as autocast does for convolutions and attention; outside it returns them as they are."""
    tensors = (first, *others)
    device = first.device.type
    if not autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    castable = [other for other in (torch.float32, torch.float16, torch.bfloat16) if other is not dtype]
    return tuple([t.to(dtype) if isinstance(t, Tensor) and t.dtype in castable else t for t in tensors])


def is_open(size: int) -> bool:
    """Whether a graph that is being captured leaves this size open: no branch in Python may then depend on it."""
    if torch.jit.is_tracing():
        return True
    if type(size) is int and not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(size)
