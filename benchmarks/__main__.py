"""Every op on the model's shapes against the fastest PyTorch path for the same work.

``python -m benchmarks`` measures. Further commands, each with its own --help:
  table RESULTS.json   an earlier run's tables and plots again
  floors               FLOPs, bytes and the least time on an H200 of every case, without running anything
  gpu-report           the proof on a GPU: tests, every op and mode, whole models, targets, README's "verified on" table
  blocks               the blocks of docs/kernels.md, plain and with our ops
  levels               every instruction level and library that this CPU has; whether the op takes the fastest
  models               other libraries' models before and after walt_kernels.integrations.accelerate
  overhead             host time of a call of every op on a GPU, which this needs none of, and what it may be
  overview             README's first table, of all machines that have a file in benchmarks/results
  memory               peak memory of a training step of the L tokenizer, ours beside eager PyTorch's
  verified             that table again, from a file of gpu-report
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import (
    blocks,
    floors,
    gpu_report,
    levels,
    models,
    overhead,
    overview,
    plots,
    report,
    scaling,
    training_memory,
    verified,
)
from .cases import CASES, chosen
from .machine import RESULTS, ceilings, level, machine, sentence
from .measure import GPU_BACKENDS, Effort, rows_of
from .say import say

DTYPES = ("float32", "bfloat16", "float16")
OPS = sorted({case.op for case in CASES})
NAMED_BY_MACHINE = Path()  # --json without a file: benchmarks/results/cpu-avx2.json, or what the machine is


def measure_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", choices=OPS, help="only this op")
    parser.add_argument("--case", metavar="NAME", help="only cases whose name contains this text")
    parser.add_argument("--dtype", choices=DTYPES, help="only this dtype; float32 and bfloat16 by default")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help=f"cuda measures {', '.join(GPU_BACKENDS)}, each forced"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer cases, shorter runs, little torch.compile: minutes on two cores",
    )
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=NAMED_BY_MACHINE,
        metavar="FILE",
        help="write the rows and the machine here; without FILE to benchmarks/results/, named by the machine",
    )
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write bars and rooflines as PNG here")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="write the table between the markers of this file")
    return parser


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {
        "blocks": blocks.main,
        "table": table,
        "floors": floors_of,
        "gpu-report": gpu_report.main,
        "levels": levels.main,
        "memory": training_memory.main,
        "models": models.main,
        "overhead": overhead.main,
        "overview": overview.main,
        "verified": verified_on,
    }
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    return measure(arguments)


def floors_of(arguments: list[str]) -> int:
    """FLOPs, least bytes and the time that they take on an H200; nothing is run, no GPU is needed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks floors", description=floors_of.__doc__)
    parser.add_argument("--op", choices=OPS, help="only this op")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="whose cases")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options = parser.parse_args(arguments)
    cases = [case for case in chosen(options.op, None, False, options.device) if case.op != "training_step"]
    print(floors.table(cases, getattr(torch, options.dtype)))
    return 0


def verified_on(arguments: list[str]) -> int:
    """README's "verified on" table from a file of gpu-report; nothing is run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks verified", description=verified_on.__doc__)
    parser.add_argument(
        "results",
        type=Path,
        nargs="?",
        default=RESULTS / "cuda-sm90.json",
        help="a file that gpu-report wrote (default: that of benchmarks/results/)",
    )
    parser.add_argument("--readme", type=Path, metavar="FILE", help="write it between the markers of this file")
    options = parser.parse_args(arguments)
    try:
        text = verified.section(json.loads(options.results.read_text()))
        if options.readme:
            report.rewrite(options.readme, text, verified.MARKS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{options.results} is not a file of gpu-report: {error}")
    print(text)
    return 0


def table(arguments: list[str]) -> int:
    """Tables and plots of a results file, without measuring anything."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks table", description=table.__doc__)
    parser.add_argument("results", type=Path, help="a file that --json wrote")
    parser.add_argument("--plot", type=Path, metavar="DIR")
    parser.add_argument("--readme", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        results = json.loads(options.results.read_text())
        results["machine"], [row["baselines"] for row in results["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{options.results} is not a results file: {error}")
    check_targets(options, parser)
    publish(results, options)
    return 0


def measure(arguments: list[str]) -> int:
    parser = measure_parser()
    options = parser.parse_args(arguments)
    cases = chosen(options.op, options.case, options.quick, options.device)
    if not cases:
        names = ", ".join(case.name for case in chosen(options.op, None, options.quick, options.device))
        parser.error(f"--case {options.case!r} matches nothing; cases: {names}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if options.device == "cuda":
        say("training_step: left out, walt makes its batches on the CPU")
    check_targets(options, parser)
    started = time.perf_counter()
    where = machine(options.device)
    say(sentence(where))
    results: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks", *arguments]),
        "machine": where,
        "ceilings": {},
        "rows": [],
        "scaling": [],
    }
    failed = []
    effort = Effort(options.quick, GPU_BACKENDS if options.device == "cuda" else ())
    for name in [options.dtype] if options.dtype else DTYPES[:2]:
        dtype = getattr(torch, name)
        peak = results["ceilings"][name] = ceilings(options.device, dtype)
        say(f"{name}: copy {peak['gbps']:.1f} GB/s, matrix product {peak['gflops']:.0f} GFLOP/s ({peak['product']})")
        for case in cases:
            if case.op == "training_step" and dtype is torch.float16:
                say("training_step: left out, walt does not train in float16")
                continue
            try:
                for row in rows_of(case, dtype, options.device, peak, effort):
                    results["rows"].append(row)
                    say(report.line(row))
            except AssertionError as error:
                failed.append(f"{case.op}, {case.name}, {dtype}: wrong result, not timed: {error}")
                say(failed[-1])
        if not options.quick and not options.case:
            try:
                results["scaling"] += scaling.growths(options.op, dtype, options.device, effort)
            except AssertionError as error:
                failed.append(f"scaling, {dtype}: wrong result, not timed: {error}")
    if options.json is not None:
        path = options.json
        if path == NAMED_BY_MACHINE:
            path = RESULTS / f"{options.device}-{level(options.device)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    publish(results, options)
    say(f"{time.perf_counter() - started:.0f} s in all")
    for failure in failed:
        say(failure)
    return 1 if failed else 0


def check_targets(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """What would stop the report is told before a long run, not after it."""
    try:
        if options.readme:
            report.split(options.readme)
        if options.plot:
            plots.pyplot()
    except (OSError, ValueError, RuntimeError) as error:
        parser.error(str(error))


def publish(results: dict[str, Any], options: argparse.Namespace) -> None:
    """What is printed, and the files that are drawn from results: README's table and the plots."""
    rows = results["rows"]
    if not rows:
        return
    print(report.table(rows))
    for line in [*report.summary(rows), *map(scaling.line, results.get("scaling", []))]:
        print(line)
    for note in report.notes(rows):
        print(f"note: {note}")
    if options.readme:
        report.rewrite(options.readme, report.section(results))
    for path in plots.write(results, options.plot) if options.plot else []:
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
