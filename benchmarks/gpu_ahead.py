"""Compiles before the measuring process does: commands side by side, of which only what they leave in caches counts.

Triton and Inductor keep on disk what they compiled, so a process that is alone on the GPU later finds it there.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from typing import NamedTuple

from .machine import ROOT

FEW_THREADS = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}


class Work(NamedTuple):
    """A command, and what it reads."""

    command: tuple[str, ...]
    text: str = ""


class Ahead:
    """Begins with the first of ``work``, ``jobs`` at a time, until ``finish`` is called."""

    def __init__(self, work: list[Work], jobs: int) -> None:
        self.todo: queue.SimpleQueue[Work] = queue.SimpleQueue()
        for each in work:
            self.todo.put(each)
        self.lock, self.stopped = threading.Lock(), False
        self.running: set[subprocess.Popen[str]] = set()
        self.done = 0
        self.threads = [threading.Thread(target=self._work, daemon=True) for _ in range(min(jobs, len(work)))]
        for thread in self.threads:
            thread.start()

    def finish(self, deadline: float) -> int:
        """Waits until a time of time.monotonic() at most, ends what still runs, and returns how many ended well."""
        for thread in self.threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        with self.lock:
            self.stopped = True
            for process in self.running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        for thread in self.threads:
            thread.join()
        return self.done

    def _work(self) -> None:
        while True:
            with self.lock:
                if self.stopped or self.todo.empty():
                    return
                command, text = self.todo.get()
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ | FEW_THREADS,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    start_new_session=True,
                )
                self.running.add(process)
            with contextlib.suppress(BrokenPipeError):
                process.communicate(text)
            with self.lock:
                self.running.discard(process)
                self.done += process.wait() == 0
