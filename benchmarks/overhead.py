"""Host time of a call of every op: Python, PyTorch's dispatcher and autograd, and the launches, not the kernels.

On a GPU the calls are enqueued, none is waited for, and Triton's launcher is part of them. Without one, tensors of the
CPU stand for those of an H200 and a launch does nothing: what a call costs before the launcher.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from walt_kernels import _dispatch, _plans, _triton, testing, use_backend

from .machine import machine, sentence
from .say import say

MICROSECONDS = {"forward": 40.0, "forward+backward": 150.0}  # what a call may take
CALLS, ROUNDS = 50, 40  # a round's calls are enqueued without a pause


class Row(NamedTuple):
    """Microseconds of a call: of the round that nothing disturbed, and where no call is planned."""

    op: str
    mode: str
    us: float
    us_without_plans: float
    limit: float


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks overhead", description=__doc__)
    parser.add_argument("--op", choices=_dispatch.ops(), help="only this op")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the machine here")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a call takes longer than it may")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args(arguments)
    if _triton.reason is not None:
        parser.error(_triton.reason)
    if not _plans.enabled:
        parser.error("calls have no plans under TRITON_INTERPRET=1 and WALT_KERNELS_PLANS=0; unset them")
    if options.json and options.json.is_dir():
        parser.error(f"--json {options.json} is a folder, expected a file")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = machine(device)
    say(sentence(where))
    say(f"{'op':<24} {'mode':<17} {'us a call':>9} {'may take':>9} {'without plans':>14}")
    rows = []
    for op in [options.op] if options.op else _dispatch.ops():
        for mode in MICROSECONDS:
            rows.append(row_of(op, mode, device, ROUNDS // 8 if options.quick else ROUNDS))
            say(line(rows[-1]))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        written = {"machine": where, "launches": device == "cuda", "rows": [row._asdict() for row in rows]}
        options.json.write_text(json.dumps(written, indent=1) + "\n")
    return int(options.check and any(row.us > row.limit for row in rows))


def line(row: Row) -> str:
    return f"{row.op:<24} {row.mode:<17} {row.us:>9.1f} {row.limit:>9.0f} {row.us_without_plans:>14.1f}"


def row_of(op: str, mode: str, device: str, rounds: int = ROUNDS) -> Row:
    call = call_of(op, mode, device)
    gpu = _plans.imagine(_triton.TARGETS["sm_90"]) if device == "cpu" else contextlib.nullcontext()
    with gpu, use_backend("triton"):
        planned = microseconds(call, rounds)
        with _plans.none():
            without = microseconds(call, max(2, rounds // 4))
    return Row(op, mode, planned, without, MICROSECONDS[mode])


def call_of(op: str, mode: str, device: str) -> Callable[[], object]:
    """A small call in bfloat16, with gradients for all tensors; its cotangents are made once."""
    arguments = testing.sample_call(op, device, torch.bfloat16)
    leaves = [value.requires_grad_() for value in arguments.values() if isinstance(value, Tensor)]
    function = _dispatch.op(op).function

    def forward() -> Any:
        return function(**arguments)

    if mode == "forward":
        return forward
    cotangents: list[Tensor] = []

    def both() -> object:
        made = forward()
        outputs = made if isinstance(made, tuple) else (made,)
        if not cotangents:
            cotangents.extend(torch.ones_like(output) for output in outputs)
        return torch.autograd.grad(outputs, leaves, cotangents)

    return both


def microseconds(call: Callable[[], object], rounds: int) -> float:
    call()
    return min(_round(call) for _ in range(rounds))


def _round(call: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6
