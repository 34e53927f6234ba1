"""Interleaved timing, the machine's own ceilings, and the line that says what machine it was."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Quantiles:
    """Milliseconds of one call: 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(
    functions: dict[str, Callable[[], object]], *, device: str = "cpu", seconds: float = 1.0, least: int = 5
) -> dict[str, Quantiles]:
    """Times all functions in turn (A B C A B C ...), so that what disturbs the machine disturbs all of them alike.

    Every function is called once before, then at least ``least`` times, and on until about ``seconds`` per function
    are spent.
    """
    for function in functions.values():
        function()
    synchronize(device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    deadline = time.perf_counter() + seconds * len(functions)
    while len(next(iter(times.values()))) < least or time.perf_counter() < deadline:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            synchronize(device)
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: quantiles(values) for name, values in times.items()}


def quantiles(values: list[float]) -> Quantiles:
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Quantiles(cuts[1], statistics.median(values), cuts[7])


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches on a plain copy (GB/s, read + write) and a plain matrix product (GFLOP/s)."""
    source = torch.ones(64 << 20, device=device)
    target = torch.empty_like(source)
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = interleaved({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, device=device, seconds=0.5)
    return {"gbps": 2 * source.nbytes / times["copy"].p20 / 1e6, "gflops": 2 * n**3 / times["matmul"].p20 / 1e6}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine(device: str) -> dict[str, str]:
    """What must stand beside every number."""
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=root).stdout
    hardware = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "hardware": hardware,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "commit": commit.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }
