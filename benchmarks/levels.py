"""Every way that a CPU has of running a case, interleaved: which is ahead, and whether the op takes it.

A way is a backend, and for our own kernels an instruction level: what the processor can run of avx2, avx512 and so on.
The tables by which an op chooses (``behind`` of its backends) are to say what this prints, on every processor.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import walt_kernels
from walt_kernels import _dispatch, _native

from . import ops
from .case import Case
from .cases import CASES, chosen
from .contender import on_backend, step
from .machine import RESULTS, level, machine, sentence
from .say import say
from .timing import interleaved

BACKENDS = ("cpu", "onednn")  # backends that are kernels for CPUs
MARGIN = 1.10  # times the fastest way: beyond this the default is behind
DTYPES = ("float32", "bfloat16")

Row = dict[str, Any]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks levels", description=__doc__)
    parser.add_argument("--op", choices=sorted({case.op for case in CASES} - {"training_step"}), help="only this op")
    parser.add_argument("--case", metavar="NAME", help="only cases whose name contains this text")
    parser.add_argument("--dtype", choices=DTYPES, help="only this dtype")
    parser.add_argument("--quick", action="store_true", help="fewer cases, shorter runs")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=RESULTS / f"levels-{level()}.json",
        metavar="FILE",
        help="write the rows and the machine here; without FILE to benchmarks/results/, named by its level",
    )
    parser.add_argument(
        "--check", action="store_true", help=f"exit with 1 where the default takes {MARGIN:g} times as long"
    )
    options = parser.parse_args(arguments)
    existing = [case for case in chosen(options.op, None, options.quick) if case.op != "training_step"]
    cases = [case for case in existing if (options.case or "") in case.name]
    if not cases:
        names = ", ".join(case.name for case in existing)
        parser.error(f"--case {options.case!r} matches nothing; cases: {names}")
    if _native.C is None:
        parser.error(f"there are no levels: {_native.reason}")
    if options.json and options.json.is_dir():
        parser.error(f"--json {options.json} is a folder, expected a file")
    where = machine("cpu")
    say(sentence(where))
    rows: list[Row] = []
    wrong = []
    for name in [options.dtype] if options.dtype else DTYPES:
        for case in cases:
            try:
                found = rows_of(case, getattr(torch, name), 0.25 if options.quick else 1.0)
            except AssertionError as error:
                wrong.append(f"{case.op}, {case.name}, {name}: wrong result, not timed: {error}")
                found = []
            rows += found
            for row in found:
                say(line(row))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")
    late = [row for row in rows if row["behind"] > MARGIN]
    for row in late:
        print(f"behind {row['best']}: {line(row)}")
    for text in wrong:
        print(text)
    return 1 if wrong or (options.check and late) else 0


def rows_of(case: Case, dtype: torch.dtype, seconds: float) -> list[Row]:
    """One row a mode. What gives a wrong result is an AssertionError."""
    inputs = ops.inputs_of(case, dtype, "cpu")
    default = name_of(ops.backend(case, inputs), _native.C.build_info()["isa"])
    ways = ways_of(case.op, inputs)
    for way in ways.values():
        with at_level(way.level):
            ops.check(case, dtype, "cpu", False, way.backend)
    rows = []
    for mode in case.modes:
        times = interleaved({name: way.call(case.op, inputs, mode) for name, way in ways.items()}, seconds=seconds)
        ms = {name: value.p50 for name, value in times.items()}
        best = min(ms, key=ms.__getitem__)
        row = {"op": case.op, "case": case.name, "mode": mode, "dtype": str(dtype).removeprefix("torch.")}
        rows.append({**row, "ms": ms, "default": default, "best": best, "behind": ms[default] / ms[best]})
    return rows


class Way(NamedTuple):
    """A backend, and the instruction level of our own kernels, which "" leaves as it is."""

    backend: str
    level: str = ""

    def call(self, op: str, inputs: dict[str, Any], mode: str) -> Callable[[], object]:
        call = step(on_backend(getattr(walt_kernels, op), self.backend), inputs, mode)

        def at() -> object:
            with at_level(self.level):
                return call()

        return at


def name_of(backend: str, level: str) -> str:
    return f"{backend}, {level}" if backend == "cpu" else backend


def ways_of(op: str, inputs: dict[str, Any]) -> dict[str, Way]:
    """Every way that takes these inputs, by name."""
    existing = [found.name for found in _dispatch.op(op).backends]
    info = _native.C.build_info()
    levels = [level for level in info["isa_runnable"] if level in ("avx2", "avx512", "amx", info["isa"])]
    ways = {}
    for backend in (name for name in BACKENDS if name in existing and ops.why_not(op, name, inputs) is None):
        for isa in levels if backend == "cpu" else [""]:
            ways[name_of(backend, isa)] = Way(backend, isa)
    return ways


@contextlib.contextmanager
def at_level(level: str) -> Iterator[None]:
    """Our own kernels run at this instruction level."""
    if not level:
        yield
        return
    before = _native.C.build_info()["isa"]
    _native.C.set_isa(level)
    try:
        yield
    finally:
        _native.C.set_isa(before)


def line(row: Row) -> str:
    ways = ", ".join(f"{name}: {ms:.3f}" for name, ms in row["ms"].items())
    behind = f"the default is {row['default']}, {row['behind']:.2f}x of the best"
    return f"{row['op']:<24} {row['case']:<30} {row['mode']:<17} {row['dtype']:<9} {behind}; ms: {ways}"
