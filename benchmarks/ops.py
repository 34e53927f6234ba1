"""A case of an op: its inputs, everything that computes the same, and the check that comes before any time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import walt_kernels
from walt_kernels import _dispatch, testing

from .case import Case, Inputs
from .cases import FILE_OF
from .contender import COMPILED, REFERENCE, Contender, Subject, in_float32, on_backend, on_reference


def inputs_of(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    """The case's inputs on ``device``. Views of one packed tensor, as q, k and v are, stay views of one."""
    storages: dict[int, Tensor] = {}

    def moved(value: Tensor, wanted: bool) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = torch.empty(0, dtype=value.dtype).set_(storage).to(device)
        flat = storages[storage.data_ptr()]
        view = flat.as_strided(value.shape, value.stride(), value.storage_offset())
        return testing.leaf(view.requires_grad_(wanted))

    made = case.inputs(dtype)
    return {
        name: moved(value.detach(), value.requires_grad) if isinstance(value, Tensor) else value
        for name, value in made.items()
    }


def why_not(op: str, backend: str, inputs: Inputs) -> str | None:
    """Why ``backend`` cannot be forced on this call, or None."""
    return _dispatch.backend(op, backend).unsupported(**_dispatch.prepare(op, **inputs))


def subject(case: Case, dtype: torch.dtype, device: str, quick: bool, backends: Sequence[str] = ()) -> Subject:
    """Ours and all baselines. In 16 bits on a CPU, each also by way of float32: it may well be the faster one.

    Ours are those of ``backends`` that take the case, or what the op itself chooses where none are named.
    """
    op = getattr(walt_kernels, case.op)
    inputs = inputs_of(case, dtype, device)
    existing = [found.name for found in _dispatch._ops[case.op].backends]
    refused = {name: why_not(case.op, name, inputs) for name in backends if name in existing}
    ours = {name: Contender(on_backend(op, name)) for name, reason in refused.items() if reason is None}
    notes = tuple(f"{name}: {reason}" for name, reason in refused.items() if reason is not None)
    if not backends:
        ours = {"ours": Contender(op)}
    vendor = FILE_OF[case.op].baselines(inputs)
    if dtype is not torch.float32 and device == "cpu":
        through = {
            f"{name} in float32": replace(contender, function=in_float32(contender.function))
            for name, contender in vendor.items()
            if not contender.compiled
        }
        vendor = {**vendor, **through}
    torch._dynamo.reset()
    if "backward" in case.modes:  # a graph that is kept for another backward pass may not give its buffers away
        torch._functorch.config.donated_buffer = False
    compiled = Contender(on_reference(torch.compile(op, dynamic=False)), compiled=True, like=REFERENCE)
    contenders = {
        **ours,
        REFERENCE: Contender(on_reference(op)),
        **vendor,
        COMPILED: compiled,
    }
    if not quick or case.fused:  # elsewhere the compiler takes too long
        return Subject(inputs, contenders, notes, tuple(ours))
    left_out = [name for name, contender in contenders.items() if contender.compiled]
    kept = {name: contender for name, contender in contenders.items() if name not in left_out}
    notes += tuple(f"{name}: left out by --quick, it would compile for long" for name in left_out)
    return Subject(inputs, kept, notes, tuple(ours))


def check(
    case: Case, dtype: torch.dtype, device: str, reference_runs: bool, ours: str = "ours"
) -> tuple[float, list[str]]:
    """The largest error ratio of the op's outputs and gradients (at most 1), and notes; AssertionError if it is wrong.

    ``ours`` is the backend to force, or "ours" for what the op itself chooses.

    Where the reference cannot be had in ``dtype`` in reasonable time, the yardstick is the reference in float32 on the
    same rounded inputs, rounded once at the end: a stricter one.
    """
    op = getattr(walt_kernels, case.op)
    reference = on_reference(op)
    yardstick = reference if reference_runs else in_float32(reference)
    inputs = inputs_of(case, dtype, device)
    tested = op if ours == "ours" else on_backend(op, ours)
    ratios = testing.check_op(tested, yardstick, inputs, rows=case.terms if dtype is torch.float32 else 1)
    return max(ratios.values()), [] if reference_runs else ["checked against the reference in float32, rounded once"]


def backend(case: Case, inputs: Inputs) -> str:
    return next(name for name, reason in walt_kernels.explain(case.op, **inputs).items() if reason is None)
