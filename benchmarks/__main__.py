"""``python -m benchmarks``: every op on the model's shapes against the fastest PyTorch path for the same work."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import walt_kernels
from walt_kernels import testing

from .cases import CASES, Case
from .timing import ceilings, interleaved, machine

MODES = ("forward", "forward+backward")
ROOMS = {"adaln_residual_modulate": "adaln_lora"}  # ops whose baselines live in another op's file


def on_reference(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with every op of it on plain PyTorch."""

    def forced(**inputs: Any) -> Any:
        with walt_kernels.use_backend("reference"):
            return function(**inputs)

    return forced


def step(function: Callable[..., Any], inputs: dict[str, Any], mode: str) -> Callable[[], object]:
    """One call of ``function``; with the gradients of everything when the mode says so."""
    if mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function(**inputs)

        return forward
    wanted = [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [torch.randn_like(output) for output in outputs]

    def both() -> object:
        outputs = function(**inputs)
        return torch.autograd.grad(outputs if isinstance(outputs, tuple) else (outputs,), wanted, cotangents)

    return both


def rows_of(case: Case, dtype: torch.dtype, device: str, peak: dict[str, float], options: Any) -> list[dict[str, Any]]:
    """Checks the op on this case first; a case whose check fails is never timed."""
    inputs = {
        name: testing.leaf(value.detach().to(device).requires_grad_(value.requires_grad))
        if isinstance(value, torch.Tensor)
        else value
        for name, value in case.inputs(dtype).items()
    }
    room = importlib.import_module(f".{ROOMS.get(case.op, case.op)}", __package__)
    op = getattr(walt_kernels, case.op)
    reference = on_reference(op)
    ratios = testing.check_op(op, reference, inputs, rows=case.terms if dtype is torch.float32 else 1)
    backend = next(name for name, reason in walt_kernels.explain(case.op, **inputs).items() if reason is None)
    functions = {"ours": op, "eager reference": reference, **room.baselines(inputs)}
    if not options.quick:
        torch._dynamo.reset()
        functions["compiled reference"] = on_reference(torch.compile(op))
    rows = []
    for mode in MODES:
        steps = {name: step(function, inputs, mode) for name, function in functions.items()}
        times = interleaved(steps, device=device, seconds=0.3 if options.quick else 1.0)
        ours = times.pop("ours")
        best = min(times, key=lambda name: times[name].p50)
        backward = mode != "forward"
        flops = case.flops * (case.flops_factor if backward else 1)
        moved = case.elements * (case.elements_factor if backward else 1) * dtype.itemsize
        gflops, gbps = flops / ours.p50 / 1e6, moved / ours.p50 / 1e6
        rows.append(
            {
                "op": case.op,
                "case": case.name,
                "mode": mode,
                "dtype": str(dtype).removeprefix("torch."),
                "backend": backend,
                "ms": ours.p50,
                "ms_p20": ours.p20,
                "ms_p80": ours.p80,
                "baselines": {name: value.p50 for name, value in times.items()},
                "best_baseline": best,
                "speedup": times[best].p50 / ours.p50,
                "gflops": gflops,
                "gbps": gbps,
                "share_of_peak": max(gflops / peak["gflops"], gbps / peak["gbps"]),
                "error_ratio": max(ratios.values()),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| op | case | mode | dtype | backend | ms | fastest baseline | its ms | speedup | GFLOP/s | GB/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        base = row["baselines"][row["best_baseline"]]
        lines.append(
            f"| {row['op']} | {row['case']} | {row['mode']} | {row['dtype']} | {row['backend']} | {row['ms']:.2f} "
            f"| {row['best_baseline']} | {base:.2f} | {row['speedup']:.2f}x | {row['gflops']:.0f} | {row['gbps']:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--op", choices=sorted({case.op for case in CASES}), help="only this op")
    parser.add_argument("--case", help="only cases whose name contains this text")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="only this dtype")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases, shorter runs, no torch.compile")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    options = parser.parse_args()
    cases = [
        case
        for case in CASES
        if options.op in (None, case.op) and (options.case or "") in case.name and (case.quick or not options.quick)
    ]
    if not cases:
        parser.error(f"--case {options.case!r} matches nothing; cases: {', '.join(case.name for case in CASES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    dtypes = [getattr(torch, options.dtype)] if options.dtype else [torch.float32, torch.bfloat16]
    rows, failed = [], []
    for dtype in dtypes:
        peak = ceilings(options.device, dtype)
        print(f"{dtype}: copy {peak['gbps']:.1f} GB/s, matrix product {peak['gflops']:.0f} GFLOP/s", file=sys.stderr)
        for case in cases:
            try:
                rows += rows_of(case, dtype, options.device, peak, options)
            except AssertionError as error:
                failed.append(f"{case.op}, {case.name}, {dtype}: wrong result, not timed: {error}")
                print(failed[-1], file=sys.stderr)
                continue
            for row in rows[-len(MODES) :]:
                print(
                    f"{row['op']:<24} {row['case']:<26} {row['mode']:<17} {row['dtype']:<9} {row['ms']:9.2f} ms "
                    f"{row['speedup']:6.2f}x over {row['best_baseline']}",
                    file=sys.stderr,
                )
    print(table(rows))
    for op in dict.fromkeys(row["op"] for row in rows):
        for mode in MODES:
            speedups = [row["speedup"] for row in rows if row["op"] == op and row["mode"] == mode]
            mean = math.exp(sum(map(math.log, speedups)) / len(speedups))
            print(f"{op}, {mode}: geometric mean {mean:.2f}x, lowest {min(speedups):.2f}x")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine(options.device), "rows": rows}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
