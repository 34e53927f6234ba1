"""The tests that need a GPU, file by file under a time limit; a backend of which nothing ran is a failure."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .machine import ROOT

Outcome = dict[str, Any]

REQUIRED = ("triton", "cuda")  # flash needs a package that not everybody has
GRACE = 20.0  # seconds for pytest to write down what it has
SELECTION = "gpu and not large"


def files(folder: Path = ROOT / "tests") -> list[Path]:
    """All test files with a test that needs a GPU."""
    marked = re.compile(r"mark\.gpu|from on_gpu import .*marks")
    return [path for path in sorted(folder.glob("test_*.py")) if marked.search(path.read_text())]


def backend_of(path: Path) -> str:
    """What the file's name says: test_triton_adaln.py, test_cuda_adaln.py, test_flash.py."""
    return next((name for name in (*REQUIRED, "flash") if name in path.stem.split("_")), "")


def run(paths: list[Path], seconds: float, say: Callable[[str], None]) -> list[Outcome]:
    """One outcome per file. What time is left is shared by the files that are left."""
    outcomes = []
    end = time.monotonic() + seconds
    for i, path in enumerate(paths):
        share = max(end - time.monotonic(), 0.0) / (len(paths) - i)
        outcomes.append(outcome(path, share))
        say(line(outcomes[-1]))
    return outcomes


def outcome(path: Path, seconds: float) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="walt-gpu-tests-") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", SELECTION, "-p", "no:cacheprovider"]
        finished, tail = limited([*command, f"--junitxml={report}", str(path)], seconds)
        missing = {"passed": 0, "failed": 0, "skipped": 0, "messages": [tail]}
        counts = parse(report, finished) if report.exists() else missing
    return {"file": path.name, "backend": backend_of(path), "finished": finished, **counts}


def limited(command: list[str], seconds: float) -> tuple[bool, str]:
    """Runs ``command``, interrupted after ``seconds``; whether it ended by itself, and its last words."""
    forced = ("TRITON_INTERPRET", "WALT_KERNELS_BACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in forced}
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        )
        finished = True
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            finished = False
            child.send_signal(signal.SIGINT)
            try:
                child.wait(GRACE)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        output.seek(0)
        words = output.read().strip().splitlines()
    return finished, words[-1] if words else "no output"


def parse(report: Path, finished: bool) -> Outcome:
    """Counts of a JUnit file; messages are those of what failed, else the reasons of what was skipped.

    The last test of a run that was interrupted is the one that ran just then: it has no outcome.
    """
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    messages: dict[str, list[str]] = {"failed": [], "skipped": []}
    tests = list(ElementTree.parse(report).iter("testcase"))
    for test in tests if finished else tests[:-1]:
        trouble = {"failed": test.find("failure"), "skipped": test.find("skipped")}
        if trouble["failed"] is None:
            trouble["failed"] = test.find("error")
        kind = next((name for name, found in trouble.items() if found is not None), "passed")
        counts[kind] += 1
        if (found := trouble.get(kind)) is not None:
            text = (found.get("message") or "").strip().splitlines()
            message = f"{test.get('name')}: " * (kind == "failed") + (text[0][:200] if text else "")
            if message not in messages[kind]:
                messages[kind].append(message)
    return {**counts, "messages": (messages["failed"] or messages["skipped"])[:10]}


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
