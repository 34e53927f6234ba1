"""``python -m benchmarks gpu-report --out DIR``: the proof on a GPU, in one command and a given time.

The tests marked ``gpu``, the machine's ceilings, then every op and mode of our GPU backends against the fastest PyTorch
path, the most important cases first. The results file is written again after every row, so that a run which is cut off
leaves what it has. Nothing is built.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import gpu_tests, plots, report, targets, verified
from .cases import Case, chosen
from .contender import first_line
from .machine import ceilings, level, machine, sentence
from .measure import GPU_BACKENDS, Effort, rows_of
from .say import say

TESTS_SHARE = 0.35  # of the time
DTYPES = (torch.bfloat16, torch.float32)  # float32 only for the quick cases, and when bfloat16 is done

Tests = Callable[[float], list[gpu_tests.Outcome]]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu-report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results file and the plots")
    parser.add_argument("--minutes", type=float, default=9.0, help="no new row is begun after this time")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="write its 'verified on' table")
    parser.add_argument("--op", choices=sorted({case.op for case in chosen(None, None, False, "cuda")}))
    parser.add_argument("--quick", action="store_true", help="fewer cases, torch.compile only where it is strongest")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device, and torch sees none here; `python -m benchmarks floors` needs none")
    if options.readme:
        try:
            report.split(options.readme, verified.MARKS)
        except (OSError, ValueError) as error:
            parser.error(str(error))

    def tests(seconds: float) -> list[gpu_tests.Outcome]:
        return [] if options.no_tests else gpu_tests.run(gpu_tests.files(), seconds, say)

    results, failed = run(
        options.out,
        60 * options.minutes,
        command=" ".join(["python -m benchmarks gpu-report", *arguments]),
        cases=chosen(options.op, None, options.quick, "cuda"),
        effort=Effort(options.quick, GPU_BACKENDS),
        tests=tests,
    )
    if not options.no_tests:
        failed += gpu_tests.failures(results["tests"])
    publish(results, options.out, options.readme)
    for failure in failed:
        say(failure)
    return 1 if failed else 0


def run(
    out: Path,
    seconds: float,
    *,
    command: str,
    cases: list[Case],
    effort: Effort,
    tests: Tests,
    device: str = "cuda",
) -> tuple[dict[str, Any], list[str]]:
    """The results, which are also in ``out``, and what failed."""
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{device}-{level(device)}.json"
    results: dict[str, Any] = {"command": command, "machine": machine(device), "ceilings": {}, "rows": []}
    say(sentence(results["machine"]))
    results["tests"] = tests(TESTS_SHARE * seconds)
    save(results, path)
    failed: list[str] = []
    for row in measured(cases, effort, device, results, failed):
        results["rows"].append(row)
        save(results, path)
        say(report.line(row))
        if time.monotonic() - start > seconds:
            say("out of time; the rest is left out")
            break
    return results, failed


def measured(
    cases: list[Case], effort: Effort, device: str, results: dict[str, Any], failed: list[str]
) -> Iterator[dict[str, Any]]:
    """All rows, the most important first; a case that fails is written down, and the next one begins."""
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        peak = results["ceilings"][name] = ceilings(device, dtype)
        say(f"{name}: copy {peak['gbps']:.0f} GB/s, matrix product {peak['gflops'] / 1e3:.0f} TFLOP/s")
        for case in cases:
            if dtype is not DTYPES[0] and not case.quick:
                continue
            try:
                yield from rows_of(case, dtype, device, peak, effort)
            except Exception as error:
                reason = str(error) if isinstance(error, AssertionError) else first_line(error)
                failed.append(f"{case.op}, {case.name}, {name}: {reason}")
                say(failed[-1])


def save(results: dict[str, Any], path: Path) -> None:
    """Whole or not at all, also when the run is cut off in between."""
    results["targets"] = targets.verdicts(results)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(unfinished, path)


def publish(results: dict[str, Any], out: Path, readme: Path | None) -> None:
    """Tables, verdicts and plots."""
    if results["rows"]:
        print(report.table(results["rows"]))
        for text in report.summary(results["rows"]):
            print(text)
    for entry in results["targets"]:
        print(targets.line(entry))
    for note in report.notes(results["rows"]):
        print(f"note: {note}")
    if readme:
        report.rewrite(readme, verified.section(results), verified.MARKS)
    if results["rows"]:
        try:
            for path in plots.write(results, out):
                print(f"wrote {path}")
        except RuntimeError as error:
            say(f"no plots: {error}")
