"""A case of an op: its inputs, everything that computes the same, and the check that comes before any time."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

import walt_kernels
from walt_kernels import testing

from .cases import Case, Inputs
from .contender import COMPILED, REFERENCE, Contender, Subject, in_float32, on_reference

ROOMS = {"adaln_residual_modulate": "adaln_lora"}  # ops whose baselines live in another op's file
# With --quick the compiler is asked only where its fusion is the strongest baseline; elsewhere it takes too long.
QUICK_COMPILED = ("adaln_residual_modulate",)


def room(op: str) -> str:
    """The file, in benchmarks/ and after test_ in tests/, that knows ``op``."""
    return ROOMS.get(op, op)


def inputs_of(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    return {
        name: testing.leaf(value.detach().to(device).requires_grad_(value.requires_grad))
        if isinstance(value, Tensor)
        else value
        for name, value in case.inputs(dtype).items()
    }


def subject(case: Case, dtype: torch.dtype, device: str, quick: bool) -> Subject:
    """Ours and all baselines. In 16 bits on a CPU, each also by way of float32: it may well be the faster one."""
    op = getattr(walt_kernels, case.op)
    inputs = inputs_of(case, dtype, device)
    vendor = importlib.import_module(f".{room(case.op)}", __package__).baselines(inputs)
    if dtype is not torch.float32 and device == "cpu":
        through = {
            f"{name} in float32": Contender(in_float32(contender.function))
            for name, contender in vendor.items()
            if not contender.compiled
        }
        vendor = {**vendor, **through}
    torch._dynamo.reset()
    compiled = Contender(on_reference(torch.compile(op, dynamic=False)), compiled=True, like=REFERENCE)
    contenders = {
        "ours": Contender(op),
        REFERENCE: Contender(on_reference(op)),
        **vendor,
        COMPILED: compiled,
    }
    if not quick or case.op in QUICK_COMPILED:
        return Subject(inputs, contenders)
    left_out = [name for name, contender in contenders.items() if contender.compiled]
    kept = {name: contender for name, contender in contenders.items() if name not in left_out}
    return Subject(inputs, kept, tuple(f"{name}: left out by --quick, it would compile for long" for name in left_out))


def check(case: Case, dtype: torch.dtype, device: str, reference_runs: bool) -> tuple[float, list[str]]:
    """The largest error ratio of the op's outputs and gradients (at most 1), and notes; AssertionError if it is wrong.

    Where the reference cannot be had in ``dtype`` in reasonable time, the yardstick is the reference in float32 on the
    same rounded inputs, rounded once at the end: a stricter one.
    """
    op = getattr(walt_kernels, case.op)
    reference = on_reference(op)
    yardstick = reference if reference_runs else in_float32(reference)
    inputs = inputs_of(case, dtype, device)
    ratios = testing.check_op(op, yardstick, inputs, rows=case.terms if dtype is torch.float32 else 1)
    return max(ratios.values()), [] if reference_runs else ["checked against the reference in float32, rounded once"]


def backend(case: Case, inputs: Inputs) -> str:
    return next(name for name, reason in walt_kernels.explain(case.op, **inputs).items() if reason is None)
