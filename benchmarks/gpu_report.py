"""``python -m benchmarks gpu-report --out DIR``: the proof on a GPU, in one command and a given time.

The tests marked ``gpu`` in several processes, the machine's ceilings, then every op and mode of our GPU backends
against the fastest PyTorch path, the most important cases first, and last whole models. Compiling takes most of the
time, so all that will be measured is compiled beside the tests, in processes of its own; what is timed is alone on the
machine. The results file is written again after every row, and DIR/tests.jsonl after every test, so that a run which
is cut off leaves what it has; a kernel that crashes or hangs costs its own case only. Nothing is built.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from . import gpu_models, gpu_tests, gpu_watch, plots, report, targets, verified
from .case import Case
from .cases import GPU_CASES, chosen
from .gpu_ahead import Ahead, Work
from .gpu_child import Message, Plan
from .machine import ROOT, level, machine, sentence
from .measure import GPU_BACKENDS, Effort
from .say import say

TESTS_SHARE = 0.35  # of the time; what is compiled beside the tests ends with them
MODELS_SHARE = 0.22
MODEL = (sys.executable, "-m", "benchmarks.gpu_models")

Tests = Callable[[float], list[gpu_tests.Outcome]]  # of the seconds that it may take
Measured = Callable[[float], Iterable[Message]]  # until a time of time.monotonic()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu-report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results file and the plots")
    parser.add_argument("--minutes", type=float, default=5.0, help="what is not done then is left out")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="processes that test (with pytest-xdist) and compile, half of them each; default: %(default)s",
    )
    parser.add_argument("--readme", type=Path, metavar="FILE", help="write its 'verified on' table")
    parser.add_argument("--op", choices=sorted({case.op for case in chosen(None, None, False, "cuda")}))
    parser.add_argument("--quick", action="store_true", help="fewer cases, torch.compile only where it is strongest")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument("--no-models", action="store_true", help="ops only")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device, and torch sees none here; `python -m benchmarks floors` needs none")
    if options.readme:
        try:
            report.split(options.readme, verified.MARKS)
        except (OSError, ValueError) as error:
            parser.error(str(error))

    planned = plan(chosen(options.op, None, options.quick, "cuda"))
    effort = Effort(options.quick, GPU_BACKENDS)
    models = [] if options.no_models or options.op else [(m, b) for b in gpu_models.BACKENDS for m in gpu_models.MODELS]
    half = max(options.jobs // 2, 1)
    ahead = Ahead(work(planned, effort, models), options.jobs if options.no_tests else half)

    def tests(seconds: float) -> list[gpu_tests.Outcome]:
        if options.no_tests:
            return []
        return gpu_tests.run(gpu_tests.files(), seconds, say, options.out / "tests.jsonl", options.jobs - half)

    def measured(deadline: float) -> Iterable[Message]:
        seconds = 60 * options.minutes
        compiled = ahead.finish(deadline - (1 - TESTS_SHARE) * seconds)
        say(f"{compiled} of {len(planned) + len(gpu_models.MODELS) * bool(models)} compiled ahead")
        yield from gpu_watch.watched(planned, effort, "cuda", deadline - MODELS_SHARE * seconds * bool(models))
        yield from steps(models, deadline)

    command = " ".join(["python -m benchmarks gpu-report", *arguments])
    try:
        results, failed = run(options.out, 60 * options.minutes, command=command, tests=tests, measured=measured)
    finally:
        ahead.finish(0.0)
    if not options.no_tests:
        failed += gpu_tests.failures(results["tests"])
    publish(results, options.out, options.readme)
    for failure in failed:
        say(failure)
    return 1 if failed else 0


def run(
    out: Path, seconds: float, *, command: str, tests: Tests, measured: Measured, device: str = "cuda"
) -> tuple[dict[str, Any], list[str]]:
    """The results, which are also in ``out``, and what failed."""
    deadline = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{device}-{level(device)}.json"
    failed: list[str] = []
    results: dict[str, Any] = {"command": command, "machine": machine(device)}
    results |= {"ceilings": {}, "rows": [], "models": []}
    say(sentence(results["machine"]))
    results |= {"tests": tests(TESTS_SHARE * seconds), "failed": failed}
    save(results, path)
    for message in measured(deadline):
        for name, peak in message.get("ceilings", {}).items():
            results["ceilings"][name] = peak
            say(f"{name}: copy {peak['gbps']:.0f} GB/s, matrix product {peak['gflops'] / 1e3:.0f} TFLOP/s")
        if "row" in message:
            results["rows"].append(message["row"])
            say(report.line(message["row"]))
        if "model" in message:
            results["models"].append(message["model"])
            say(gpu_models.line(message["model"]))
        if "failed" in message:
            failed.append(message["failed"])
            say(failed[-1])
        save(results, path)
        if time.monotonic() > deadline:
            break
    if time.monotonic() > deadline:
        say("out of time; the rest is left out")
    return results, failed


def plan(cases: list[Case]) -> Plan:
    """bfloat16 for all cases, the most important first; then float32 for the quick ones."""
    wanted = [GPU_CASES.index(case) for case in cases]
    return [("bfloat16", i) for i in wanted] + [("float32", i) for i in wanted if GPU_CASES[i].quick]


def work(planned: Plan, effort: Effort, models: list[tuple[str, str]]) -> list[Work]:
    """What is compiled ahead, in this order: whole models take longest; the reference of one compiles nothing."""
    found = [Work((*MODEL, model, backend, "--ahead")) for model, backend in models if backend != "reference"]
    for entry in planned:
        asked = {"plan": [entry], "quick": effort.quick, "backends": effort.backends, "device": "cuda", "ahead": True}
        found.append(Work(gpu_watch.CHILD, json.dumps(asked)))
    return found


def steps(models: list[tuple[str, str]], deadline: float, more: tuple[str, ...] = ()) -> Iterable[Message]:
    """A training step of each model on each backend, in a process of its own."""
    for model, backend in models:
        left = deadline - time.monotonic()
        if left <= 0:
            return
        try:
            done = subprocess.run(
                [*MODEL, model, backend, *more], cwd=ROOT, capture_output=True, text=True, timeout=left
            )
        except subprocess.TimeoutExpired:
            yield {"failed": f"{model}, {backend}: stopped by the time limit"}
            return
        if done.returncode == 0:
            yield {"model": json.loads(done.stdout.splitlines()[-1])}
        else:
            yield {"failed": f"{model}, {backend}: {(done.stderr.strip().splitlines() or ['no output'])[-1][:200]}"}


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
    for found in results.get("models", []):
        print(gpu_models.line(found))
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
