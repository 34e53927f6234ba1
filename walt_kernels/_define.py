"""``define_op``: how an op is declared, and where the package's ops are found."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ._defaults import Defaults
from ._dispatch import Backend, Op, backend, register, select
from ._flops import count_flops
from ._layout import like
from ._library import as_tuple, complete, define, in_backward, past_dispatcher, unwatched
from ._plans import Planned

P = ParamSpec("P")
R = TypeVar("R")


def folders() -> list[str]:
    """The op folders of the package: those with a file op.py, which declares an op or several."""
    import walt_kernels

    entries = (entry for place in walt_kernels.__path__ for entry in os.scandir(place))
    return sorted({entry.name for entry in entries if os.path.isfile(os.path.join(entry.path, "op.py"))})


def define_op(
    reference: Callable[..., R],
    *,
    sample: Callable[[Callable[..., Tensor], int], dict[str, Any]],
    backends: Sequence[Backend] = (),
    returns: Sequence[str] = (),
    outputs: Callable[..., Any] | None = None,
    differentiable: Sequence[str] = (),
    gradients: Callable[..., Sequence[Tensor | None]] | None = None,
    unread: Sequence[str] = (),
    flops: tuple[Callable[..., int], Callable[..., int]] | None = None,
    backward: Callable[..., dict[str, Tensor]] | None = None,
    tangent: Callable[..., tuple[Tensor | None, ...]] | None = None,
    defaults: Defaults | None = None,
) -> Callable[[Callable[P, dict[str, Any]]], Callable[P, R]]:
    """Makes an op of a function: schema, fake, derivatives, vmap, decomposition, FLOPs, and the choice of a backend.

    The function has the op's name, its signature and the text that users read; it checks a call and returns the inputs
    of the backends by name. ``reference`` defines the op on these inputs, and its types are the schema. No op needs
    more than these two and a ``sample`` (see ``Op``): PyTorch differentiates the reference, the last of the backends.

    Kernels that have a backward pass write into memory that they are given, everything by name:
    ``forward(**inputs, **outputs)`` and ``backward(**incoming, **saved, **options, **gradients)``. The gradient of
    ``x`` is ``grad_x``; options are the inputs that are no tensors. The following arguments say what such kernels write
    and read. The functions among them get what their parameters name.

    Args:
        returns: names of the outputs; those beyond the reference's are only saved for the backward pass.
        outputs: makes memory for them. It sees the inputs and ``backend``, the name of the one that runs.
        differentiable: names of the inputs that have a gradient.
        gradients: makes memory for these gradients in this order, None for one that the kernels shall leave out. It
            sees what ``backward`` of a backend reads, and ``wanted``, a bool for each. By default all that are wanted,
            contiguous, like the inputs.
        unread: names of the inputs and outputs that the backward pass does not read, and that are not saved for it.
        flops: formulas of the two passes; they see what the passes read, shapes for tensors, and forward the outputs'.
        backward: returns gradients by name where more is to be said than ``kernels()``, those that a backend computes.
            It sees ``kernels``, what these read, and ``backend``.
        tangent: ``tangent(run, inputs, tangents)`` returns the tangents of the outputs in forward mode, where
            ``run(inputs)`` is the op; by default they are the reference's.
        defaults: which backend is the fastest on which GPU, for which calls (see ``_defaults``).
    """

    def decorate(check: Callable[P, dict[str, Any]]) -> Callable[P, R]:
        name = check.__name__
        types, visible = _schema(reference)
        arguments, names = tuple(types), (*types, "backend")
        memory = None if outputs is None else _seeing(names, outputs)
        passes = _Backward(name, types, visible, returns, differentiable, unread, gradients, backward)
        every = (*backends, Backend("reference", lambda **inputs: None, reference))
        composed = frozenset(each.name for each in every if each.differentiable)

        def impl(*values: Any) -> Any:
            chosen = backend(name, values[-1])
            if memory is None or values[-1] in composed:
                return complete(overload, chosen.forward(**dict(zip(arguments, values, strict=False))))
            made = memory(values)
            write(chosen.forward, arguments, values[:-1], returns, as_tuple(made))
            return made

        def fake(*values: Any) -> Any:
            return impl(*values) if memory is None or values[-1] in composed else memory(values)

        def run(inputs: dict[str, Any]) -> Any:
            return overload(*[inputs[argument] for argument in names])

        def tangents_of(inputs: Sequence[Any], tangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
            assert tangent is not None
            return tangent(run, *(dict(zip(names, values, strict=True)) for values in (inputs, tangents)))

        overload = define(
            name,
            _signature(types, len(returns) or visible),
            impl=impl,
            fake=fake,
            reference=reference,
            composed=composed,
            setup_context=passes.setup,
            backward=passes.autograd,
            tangent=None if tangent is None else tangents_of,
        )
        eager = past_dispatcher(name, impl, passes.setup, passes.autograd)
        if memory is not None:
            passes.define()
        if flops is not None:
            count_flops(name, _counting((*names, *returns), flops[0]), _counting(passes.reads, flops[1]))

        check.__annotations__["return"] = reference.__annotations__["return"]  # what `help` shows of the function

        @functools.wraps(check)
        def function(*args: P.args, **kwargs: P.kwargs) -> Any:
            inputs = check(*args, **kwargs)
            chosen = select(name, inputs)
            if chosen in composed:
                return backend(name, chosen).forward(**inputs)
            values = (*[inputs[argument] for argument in arguments], chosen)
            results = eager(values) if unwatched(values) else overload(*values)
            if len(returns) == visible:
                return results
            return results[:visible] if visible > 1 else results[0]

        def both_passes(chosen: str, inputs: dict[str, Any], absent: Sequence[str] = ()) -> None:
            made = impl(*[inputs[argument] for argument in arguments], chosen)
            outputs = dict(zip(returns, as_tuple(made), strict=True))
            incoming = {f"grad_{n}": None if n in absent else outputs[n] for n in returns[:visible]}
            reads = {**inputs, **outputs, **incoming, "wanted": [inputs[n] is not None for n in differentiable]}
            passes.impl(*[reads[n] for n in passes.types], chosen)

        register(name, Op(function, check, every, sample, both_passes, defaults))
        return function

    return decorate


class _Backward:
    """The op's backward pass: a torch op of its own, and how autograd calls it."""

    overload: Any  # the torch op

    def __init__(
        self,
        name: str,
        types: dict[str, str],
        visible: int,
        returns: Sequence[str],
        differentiable: Sequence[str],
        unread: Sequence[str],
        gradients: Callable[..., Sequence[Tensor | None]] | None,
        hook: Callable[..., dict[str, Tensor]] | None,
    ) -> None:
        names = list(types)
        inputs = [n for n in names if types[n].startswith("Tensor") and n not in unread]
        kept = [n for n in returns if n not in unread]
        options = [n for n in names if not types[n].startswith("Tensor") and n not in unread]
        incoming = dict.fromkeys((f"grad_{n}" for n in returns[:visible]), "Tensor?" if visible > 1 else "Tensor")
        self.types = {**incoming, **{n: types[n] for n in inputs}, **dict.fromkeys(kept, "Tensor")}
        self.types |= {n: types[n] for n in options}
        self.saved, self.writes = tuple(self.types), tuple(f"grad_{n}" for n in differentiable)
        self.chooses = gradients is None or "wanted" in _parameters(gradients)
        if self.chooses:
            self.types["wanted"] = "bool[]"
        self.reads = (*self.types, "backend")
        self.name, self.visible = name, visible
        self.hook = _seeing((*self.reads, "kernels"), hook) if hook is not None else None
        self.differentiable = tuple(differentiable)
        self.place = {n: names.index(n) for n in names}
        self.places = [self.place[n] for n in differentiable]
        self.inputs, self.options, self.needed = (_picking(names, n) for n in (inputs, options, differentiable))
        self.kept = _picking(returns, kept)
        self.gradients = _seeing(self.reads, gradients) if gradients is not None else self.like_inputs()

    def define(self) -> None:
        schema = _signature(self.types, len(self.differentiable))
        self.overload = define(f"{self.name}_backward", schema, impl=self.impl, fake=self.fake)

    def impl(self, *reads: Any) -> Any:
        return _filled(self.compute(reads), reads)

    def compute(self, reads: Sequence[Any]) -> Sequence[Tensor | None]:
        made, chosen = self.gradients(reads), backend(self.name, reads[-1])
        assert chosen.backward is not None, f"{self.name}: PyTorch differentiates {chosen.name}"
        write(chosen.backward, self.saved, reads[: len(self.saved)], self.writes, made)
        return made

    def fake(self, *reads: Any) -> Any:
        return _filled(self.gradients(reads), reads)

    def like_inputs(self) -> Callable[[Sequence[Any]], list[Tensor | None]]:
        pick = _picking(self.reads, (*self.differentiable, "wanted"))

        def gradients(reads: Sequence[Any]) -> list[Tensor | None]:
            *inputs, wanted = pick(reads)
            return [like(x) if want and x is not None else None for x, want in zip(inputs, wanted, strict=True)]

        return gradients

    def setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = as_tuple(output)
        ctx.save_for_backward(*self.inputs(inputs), *self.kept(outputs))
        ctx.options, ctx.backend, ctx.unwatched = self.options(inputs), inputs[-1], False
        if len(outputs) > self.visible:
            ctx.mark_non_differentiable(*outputs[self.visible :])
        ctx.set_materialize_grads(False)

    def autograd(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        incoming: Sequence[Tensor | None] = grads[: self.visible]
        result: list[Tensor | None] = [None] * (len(self.place) + 1)
        for grad in incoming:
            if grad is not None:
                break
        else:
            return tuple(result)
        needed = ctx.needs_input_grad
        wanted = self.needed(needed)
        reads = (*incoming, *ctx.saved_tensors, *ctx.options, *([wanted] if self.chooses else ()), ctx.backend)

        def computed() -> Sequence[Tensor | None]:
            if True not in wanted:
                return ()
            if ctx.unwatched and not torch.is_grad_enabled() and unwatched(incoming):
                return self.compute(reads)
            return as_tuple(in_backward(self.overload, reads))

        found: Iterable[tuple[int, Tensor | None]]
        if self.hook is None:
            found = zip(self.places, computed(), strict=False)
        else:
            named = self.hook((*reads, lambda: dict(zip(self.differentiable, computed(), strict=False))))
            found = [(self.place[name], gradient) for name, gradient in named.items()]
        for place, gradient in found:
            if needed[place]:
                result[place] = gradient
        return tuple(result)


def write(
    function: Callable[..., None],
    names: tuple[str, ...],
    values: Sequence[Any],
    writes: Sequence[str],
    made: Sequence[Tensor | None],
) -> None:
    """Calls what writes into memory that was made for these values: by name, but for one that repeats plans."""
    if isinstance(function, Planned):
        function.write(names, values, writes, made)
    else:
        function(**dict(zip((*names, *writes), (*values, *made), strict=True)))


def _filled(made: Sequence[Tensor | None], reads: Sequence[Any]) -> Any:
    """What the torch op returns: zero elements for a gradient that is left out."""
    for tensor in made:
        if tensor is None:
            some = next(value for value in reads if isinstance(value, Tensor))
            made = [some.new_empty(0) if tensor is None else tensor for tensor in made]
            break
    return tuple(made) if len(made) > 1 else made[0]


def _schema(reference: Callable[..., Any]) -> tuple[dict[str, str], int]:
    """Types of the reference's arguments by name, in the language of torch's schemas; and the number of its results."""
    arguments, results = torch.library.infer_schema(reference, mutates_args=())[1:].split(") -> ", 1)
    pairs = [argument.split("=")[0].split() for argument in arguments.split(", ") if argument != "*"]
    return {name: kind for kind, name in pairs}, results.count("Tensor")


def _signature(types: dict[str, str], results: int) -> str:
    arguments = ", ".join(f"{kind} {name}" for name, kind in types.items())
    tensors = ", ".join(["Tensor"] * results)
    return f"({arguments}, str backend) -> " + (f"({tensors})" if results > 1 else tensors)


def _seeing(names: Sequence[str], function: Callable[..., Any]) -> Callable[[Sequence[Any]], Any]:
    """``function`` on a sequence of values with these names, of which it gets those that its parameters name."""
    pick = _picking(names, _parameters(function))
    return lambda values: function(*pick(values))


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    code = function.__code__
    return code.co_varnames[: code.co_argcount]


def _picking(names: Sequence[str], some: Sequence[str]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Takes those called ``some`` out of values that are called ``names``."""
    places = [list(names).index(name) for name in some]
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: tuple(values[i] for i in places)


def _counting(names: Sequence[str], formula: Callable[..., int]) -> Callable[..., int]:
    """A formula as torch's counter calls it."""
    seeing = _seeing(names, formula)
    return lambda *values, out_shape: seeing(
        (*values, *([out_shape] if isinstance(out_shape, torch.Size) else out_shape))
    )
