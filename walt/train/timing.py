"""Where the time of training steps goes: seconds by part, memory, the share of the device's peak, and traces."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from walt.atomic import atomic_write
from walt.errors import WaltError, say

SKIPPED = 2  # steps before a trace, in which much happens once
PARTS = ("data", "compute", "optimizer", "save")

# TFLOP/s of dense matrix products that the makers state, in bfloat16, and in float32 with and without TensorFloat-32.
# The first of these names that the device's contains.
PEAKS = {
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100 NVL": (835.0, 417.5, 60.0),
    "H100": (989.4, 494.7, 66.9),
    "H200": (989.4, 494.7, 66.9),
    "B200": (2250.0, 1125.0, 75.0),
    "A100": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6),
    "L4": (121.0, 60.0, 30.3),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71.0, 35.6, 35.6),
    "MI300X": (1307.4, 653.7, 163.4),
}


class StepTimes:
    """Seconds that steps spend in each of PARTS, from one row of the log to the next.

    With `synchronize`, a part ends when the device is done with it. A GPU runs behind the host, and waiting for it at
    every boundary would let it idle: so this is for steps that are logged; in others, unfinished work counts in the
    part that waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.synchronize = device, False
        self.restart()

    def restart(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.steps, self.started = 0, time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._wait()
        started = time.perf_counter()
        with torch.profiler.record_function(name):
            yield
            self._wait()
        self.seconds[name] += time.perf_counter() - started

    def _wait(self) -> None:
        if self.synchronize and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def means(self) -> dict[str, float]:
        """Seconds a step of each part, and of all ("step"), since `restart`."""
        total = time.perf_counter() - self.started
        return {name: seconds / self.steps for name, seconds in {**self.seconds, "step": total}.items()}


def peak_gib(device: torch.device) -> float | None:
    """The peak of memory in use: a GPU's by tensors, on a CPU the process's. None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)


@functools.cache
def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOPs a second that the device could do at best: a GPU's by PEAKS, a CPU's by a product that is timed here."""
    narrow = precision == "bfloat16"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        rates = next((rates for part, rates in PEAKS.items() if part in name), None)
        column = 0 if narrow else 1 if torch.backends.cuda.matmul.allow_tf32 else 2
        return None if rates is None else rates[column] * 1e12
    if device.type != "cpu":
        return None
    # Not every processor has bfloat16 products; those that have not emulate them, slowly. The peak is the faster kind.
    return max(_product_flops(dtype) for dtype in ((torch.float32, torch.bfloat16) if narrow else (torch.float32,)))


def _product_flops(dtype: torch.dtype, n: int = 768, seconds: float = 0.2) -> float:
    a, b = (torch.ones(n, n, dtype=dtype) for _ in range(2))
    best, begun = math.inf, time.perf_counter()
    while time.perf_counter() - begun < seconds or best == math.inf:
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


@contextlib.contextmanager
def profiled(steps: int, path: Path) -> Iterator[Callable[[], None]]:
    """Trace `steps` steps into path, after SKIPPED others. Yields what to call after each step."""
    if not steps:
        yield lambda: None
        return

    taken = 0

    def write(profiler: torch.profiler.profile) -> None:
        traced = min(taken - SKIPPED, steps)
        try:
            if traced > 0:
                with atomic_write(path) as temporary:
                    profiler.export_chrome_trace(str(temporary))
                say(f"{path}: a trace of {traced} steps, to open at https://ui.perfetto.dev")
        except WaltError as error:
            say(f"{error}; training goes on")

    def step() -> None:
        nonlocal taken
        taken += 1
        profiler.step()

    schedule = torch.profiler.schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield step
    if taken <= SKIPPED:
        say(f"no trace: the first {SKIPPED} steps are not traced, and there were no more")
