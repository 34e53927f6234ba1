"""The tests that need a GPU, in several processes under a time limit; a backend of which nothing ran is a failure."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .machine import ROOT

Outcome = dict[str, Any]
Report = dict[str, Any]  # a line of gpu_outcomes: of a test, or how many tests a file has

REQUIRED = ("triton", "cuda")
OPTIONAL = ("cudnn", "flash")  # need a package that not everybody has
GRACE = 20.0  # seconds for pytest to end
SELECTION = "gpu and not large"


def files(folder: Path = ROOT / "tests") -> list[Path]:
    """All test files with a test that needs a GPU."""
    marked = re.compile(r"mark\.gpu|from on_gpu import .*marks")
    return [path for path in sorted(folder.glob("test_*.py")) if marked.search(path.read_text())]


def backend_of(path: Path) -> str:
    """What the file's name says: test_triton_adaln.py, test_cuda_adaln.py, test_flash.py."""
    return next((name for name in (*REQUIRED, *OPTIONAL) if name in path.stem.split("_")), "")


def run(paths: list[Path], seconds: float, say: Callable[[str], None], reports: Path, jobs: int = 1) -> list[Outcome]:
    """One outcome per file. ``reports`` has that of every test as soon as it is known; failures are said then, too."""
    reports.write_text("")
    command = [sys.executable, "-m", "pytest", "-q", "-m", SELECTION, "-p", "no:cacheprovider", "-p", PLUGIN]
    command += ["--continue-on-collection-errors", *_spread(jobs), *map(str, paths)]
    ended = threading.Event()
    watcher = threading.Thread(target=_say_failures, args=(reports, say, ended))
    watcher.start()
    try:
        finished, tail = limited(command, seconds, {"WALT_TEST_REPORTS": str(reports.resolve())})
    finally:
        ended.set()
        watcher.join()
    told = read(reports)
    outcomes = [
        outcome(path, [report for report in told if report["file"] == path.name], finished, tail) for path in paths
    ]
    for found in outcomes:
        say(line(found))
    return outcomes


PLUGIN = f"{__package__}.gpu_outcomes"


def _spread(jobs: int) -> list[str]:
    """Options for so many processes, where pytest-xdist is installed."""
    if jobs > 1 and importlib.util.find_spec("xdist"):
        return ["-n", str(jobs), "--dist", "worksteal"]
    return []


def limited(command: list[str], seconds: float, more: dict[str, str]) -> tuple[bool, str]:
    """Runs ``command``, interrupted after ``seconds``; whether it ended by itself, and its last words."""
    forced = ("TRITON_INTERPRET", "WALT_KERNELS_BACKEND")
    environment = {
        name: value  # without those of a pytest-xdist that this runs in
        for name, value in os.environ.items()
        if name not in forced and not name.startswith("PYTEST_XDIST")
    }
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | more,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its own processes end with it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        )
        finished = True
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            finished = False
            child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        output.seek(0)
        words = output.read().strip().splitlines()
    return finished, words[-1] if words else "no output"


def read(reports: Path) -> list[Report]:
    """Whole lines; the last one may be on its way."""
    return [json.loads(text) for text in reports.read_text().splitlines(keepends=True) if text.endswith("\n")]


def _say_failures(reports: Path, say: Callable[[str], None], ended: threading.Event) -> None:
    known, last = 0, False
    while not last:
        last = ended.wait(1.0)
        told = read(reports)
        for report in told[known:]:
            if report.get("outcome") == "failed":
                say(f"FAILED {report['file']} {report['test']}: {report['message']}")
        known = len(told)


def outcome(path: Path, told: list[Report], finished: bool, tail: str) -> Outcome:
    """Counts of a file's tests; messages are those of what failed, else the reasons of what was skipped."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    messages: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for report in told:
        if (kind := report.get("outcome")) is not None:
            counts[kind] += 1
            message = f"{report['test']}: " * (kind == "failed") + report["message"]
            if message not in messages[kind]:
                messages[kind].append(message)
    wanted = sum(report.get("tests", 0) for report in told)
    whole = finished or 0 < wanted <= sum(counts.values())
    said = (messages["failed"] or messages["skipped"])[:10] if any(counts.values()) else [tail]
    return {"file": path.name, "backend": backend_of(path), "finished": whole, **counts, "messages": said}


def failures(outcomes: list[Outcome]) -> list[str]:
    """What is wrong with a run that claims a GPU: failing tests, and backends of which nothing ran."""
    found = [line(outcome) for outcome in outcomes if outcome["failed"]]
    for backend in REQUIRED:
        mine = [outcome for outcome in outcomes if outcome["backend"] == backend]
        if not any(outcome["passed"] + outcome["failed"] for outcome in mine):
            reasons = dict.fromkeys(message for outcome in mine for message in outcome["messages"])
            found.append(f"no test of the {backend} backend ran: {'; '.join(reasons) or 'there is none'}")
    return found


def line(outcome: Outcome) -> str:
    counts = ", ".join(f"{outcome[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
    stopped = "" if outcome["finished"] else ", stopped by the time limit"
    messages = f": {'; '.join(outcome['messages'][:3])}" if outcome["messages"] else ""
    return f"{outcome['file']}: {counts}{stopped}{messages}"
