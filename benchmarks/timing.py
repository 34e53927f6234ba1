"""Interleaved timing, which keeps slow contenders from eating the run."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SLOW = 25.0  # times the pace of the first function,
SECONDS = 0.5  # and longer than this: such a function is slow
LEAST, FEW = 5, 2  # calls of a function that is timed, and of a slow one
PATIENCE = 5.0  # times the planned seconds
SHORT = 0.02  # seconds of a call to which it matters what the one before it left in caches and allocator
LEAST_FLUSH = 256 << 20  # bytes
HEAD_START = 1_500_000  # cycles of a GPU, about a millisecond


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call (20th, 50th and 80th percentile), and of how many calls."""

    p20: float
    p50: float
    p80: float
    calls: int


@functools.cache
def _flush() -> torch.Tensor:
    """A buffer that is larger than the GPU's second-level cache."""
    cache = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0)
    return torch.empty(max(4 * cache, LEAST_FLUSH), dtype=torch.int8, device="cuda")


def seconds_of(function: Callable[[], object], device: str = "cpu") -> float:
    """One call. On a GPU: of device time, with nothing in the second-level cache.

    There the device is kept busy at first, so that the host has enqueued the call before the clock starts: time is that
    of the kernels, as in a training step whose queue is full.
    """
    if device != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    _flush().zero_()
    begin.record()
    function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def interleaved(
    functions: dict[str, Callable[[], object]], *, device: str = "cpu", seconds: float = 1.0, least: int = LEAST
) -> dict[str, Times]:
    """Times all functions in turn (A B C A B C ...), so that what disturbs the machine disturbs all of them alike.

    On a CPU a short call follows one of the same function that is not timed: it finds caches and allocator as it leaves
    them itself, not as its neighbour does.
    Every function is called once before, then at least ``least`` times, and on until about ``seconds`` per function
    are spent. A function that is far slower than the first one is called ``FEW`` times, and so are all of them where
    ``least`` calls would take several times as long as planned.
    """
    warm = {name: seconds_of(function, device) for name, function in functions.items()}
    pace = next(iter(warm.values()))
    slow = {name for name, first in warm.items() if first > SECONDS and first > SLOW * pace}
    times: dict[str, list[float]] = {name: [] for name in functions}
    planned = seconds * len(functions)
    start, rounds = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < planned or rounds < (least if spent < PATIENCE * planned else FEW):
        for name, function in functions.items():
            if name not in slow or rounds < FEW:
                if device != "cuda" and warm[name] < SHORT:
                    function()
                times[name].append(seconds_of(function, device) * 1e3)
        rounds += 1
    return {name: summary(values) for name, values in times.items()}


def summary(values: list[float]) -> Times:
    if len(values) == 1:
        return Times(values[0], values[0], values[0], 1)
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Times(cuts[1], statistics.median(values), cuts[7], len(values))
