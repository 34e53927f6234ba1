"""Keeps a measuring process going: one that crashes or hangs is replaced, and goes on behind the case it was at."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

from .gpu_child import UNUSABLE, Message, Plan
from .machine import ROOT
from .measure import Effort

CASE_SECONDS = 180.0  # for everything about one case, compilation and the start of the process included
CHILD = (sys.executable, "-m", "benchmarks.gpu_child")


def watched(
    plan: Plan,
    effort: Effort,
    device: str,
    deadline: float,
    *,
    case_seconds: float = CASE_SECONDS,
    child: tuple[str, ...] = CHILD,
) -> Iterator[Message]:
    """The messages of as many processes as it takes; none after ``deadline``, a time of time.monotonic()."""
    first = 0
    while first < len(plan):
        wanted = {"plan": plan[first:], "quick": effort.quick, "backends": effort.backends, "device": device}
        process = subprocess.Popen(child, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        at, end, begun = first, time.monotonic() + case_seconds, False
        try:
            json.dump(wanted, process.stdin)
            process.stdin.close()
            lines = lines_of(process.stdout)
            while True:
                try:
                    line = lines.get(timeout=max(min(end, deadline) - time.monotonic(), 0.0))
                except queue.Empty:
                    if time.monotonic() >= deadline:
                        return
                    yield {"failed": f"{plan[at]}: stopped, it took more than {case_seconds:.0f} s"}
                    break
                if line is None:
                    status = process.wait()
                    if status == 0:
                        return
                    if status != UNUSABLE:  # of which it has told
                        yield {"failed": f"{plan[at]}: the process ended with status {status}"}
                    break
                message: dict[str, Any] = json.loads(line)
                if "begin" in message:
                    begun = True
                    at, end = first + message["begin"], time.monotonic() + case_seconds
                else:
                    yield message
        finally:
            process.kill()
            process.wait()
        if not begun:
            return  # the next one would not begin either
        first = at + 1


def lines_of(pipe: IO[str]) -> queue.Queue[str | None]:
    """What is written into ``pipe``, line by line, then None; a thread waits for it."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in pipe:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines
