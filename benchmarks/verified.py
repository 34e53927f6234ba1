"""README's table of what ran on which GPU, and what is known of backends that did not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from walt_kernels import _dispatch

from .gpu_tests import OPTIONAL
from .machine import sentence
from .report import mean

Results = dict[str, Any]

MARKS = ("<!-- verified: begin -->", "<!-- verified: end -->")
WITHOUT = {  # what a backend's kernels went through where there is no GPU
    "triton": "compiles; interpreted; not yet run on a GPU",
    "cuda": "compiles; not yet run on a GPU",
    "cudnn": "not yet run on a GPU",
    "flash": "layout tested; not yet run on a GPU",
}


def _file(op: str) -> str:
    """The folder that declares the op."""
    return _dispatch.op(op).function.__module__.split(".")[-2] if op in _dispatch.ops() else op


def _label(file: str) -> str:
    """What README calls the ops of a folder."""
    names = [op for op in _dispatch.ops() if _file(op) == file]
    return names[0] if len(names) == 1 else f"{file.split('_')[0]}_*"


def backends() -> Iterator[tuple[str, str]]:
    """All pairs of an op's file and a GPU backend that one of its ops has."""
    seen = set()
    for op in _dispatch.ops():
        name = _file(op)
        for backend in _dispatch._ops[op].backends:
            if backend.name in WITHOUT and (name, backend.name) not in seen:
                seen.add((name, backend.name))
                yield name, backend.name


def section(results: Results) -> str:
    """The table. Speed-ups are over the fastest baseline: geometric mean and lowest of all cases in bfloat16."""
    lines = ["| op | backend | tests on the GPU | forward | backward | targets |", "|---" * 6 + "|"]
    for op, backend in backends():
        cells = [f"`{_label(op)}`", backend, *_cells(op, backend, results)]
        lines.append(f"| {' | '.join(cells)} |")
    about = f"Written by `{results['command']}` on {sentence(results['machine'])}."
    return "\n".join(
        [about, "Speed-ups: geometric mean and lowest of all cases, over the fastest baseline.", "", *lines]
    )


def unproven(rows: list[dict[str, Any]]) -> list[str]:
    """Ops and GPU backends that are a default without a row of theirs; flash also without one that shows it faster."""
    found = []
    for op in _dispatch.ops():
        for backend in _dispatch._ops[op].backends:
            least = 1.0 if backend.name == "flash" else 0.0
            own = [row for row in rows if row["backend"] == backend.name and _file(row["op"]) == _file(op)]
            if backend.name in WITHOUT and backend.opt_in is None and not any(r["speedup"] > least for r in own):
                found.append(f"{op}, {backend.name}")
    return found


def _cells(op: str, backend: str, results: Results) -> list[str]:
    tests = [test for test in results["tests"] if test["backend"] == backend and _tests(op, test["file"])]
    ran = sum(test["passed"] + test["failed"] for test in tests)
    rows = [row for row in results["rows"] if _file(row["op"]) == op and row["backend"] == backend]
    if not ran and not rows:
        return [WITHOUT[backend], "-", "-", "-"]
    counts = ", ".join(f"{sum(test[kind] for test in tests)} {kind}" for kind in ("passed", "failed", "skipped"))
    stopped = "" if all(test["finished"] for test in tests) else ", stopped by the time limit"
    judged = [entry["met"] for entry in results["targets"] if _file(entry["op"]) == op and entry["backend"] == backend]
    met = f"{sum(verdict is True for verdict in judged)} of {len(judged)} met" if judged else "-"
    return [counts + stopped if ran else "not run", *(_speedups(rows, mode) for mode in ("forward", "backward")), met]


def _tests(op: str, file: str) -> bool:
    """Whether the test file is about the op: test_cuda_adaln_lora.py, test_triton_causal_conv3d.py, test_flash.py."""
    alone = next((name for name in OPTIONAL if name in file), None)
    return op in file if alone is None else (op, alone) in set(backends())


def _speedups(rows: list[dict[str, Any]], mode: str) -> str:
    found = [row["speedup"] for row in rows if row["mode"] == mode and row["dtype"] == "bfloat16"]
    return f"**{mean(found):.2f}x**, {min(found):.2f}x" if found else "-"
