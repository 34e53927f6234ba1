"""What the machine is, and what it reaches: the line beside every number, and the two ceilings of the roofline."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from walt_kernels import _native

from .timing import interleaved, seconds_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def ceilings(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What this machine reaches on a plain copy (GB/s, read + write) and on a plain matrix product (GFLOP/s).

    On a CPU a 16-bit product may be emulated and slower than float32 by orders of magnitude; both are tried at a small
    size, and the faster one ("product") is measured at the sizes that matter.
    """
    source = torch.ones(64 << 20, device=device)
    target = torch.empty_like(source)
    copy = interleaved({"copy": lambda: target.copy_(source)}, device=device, seconds=0.5)["copy"]

    def product(n: int, kind: torch.dtype) -> float:
        a, b = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
        a @ b
        return 2 * n**3 / min(seconds_of(lambda: a @ b, device) for _ in range(5)) / 1e9

    tried = {torch.float32, dtype} if device == "cpu" else {dtype}
    fastest = max(tried, key=lambda kind: product(256, kind))
    sizes = (512, 1024, 2048) if device == "cpu" else (4096, 8192)
    return {
        "gbps": 2 * source.nbytes / copy.p20 / 1e6,
        "gflops": max(product(n, fastest) for n in sizes),
        "product": str(fastest).removeprefix("torch."),
    }


def level(device: str = "cpu") -> str:
    """The instruction set that the CPU kernels use, or the GPU's architecture: what a results file is named by."""
    if device == "cuda":
        return "sm{}{}".format(*torch.cuda.get_device_capability())
    return str(_native.C.build_info()["isa"]) if _native.C is not None else "reference"


def machine(device: str) -> dict[str, str]:
    """What must stand beside every number."""
    versions = {}
    if device == "cuda":
        versions = {"driver": _driver(), "cudnn": str(torch.backends.cudnn.version()), "triton": _version("triton")}
    return {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "isa": level(device),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        **versions,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def sentence(machine: dict[str, str]) -> str:
    """The machine in one line."""
    isa = f" ({machine['isa']})" if "isa" in machine else ""
    if "driver" in machine:
        parts = {"driver": "driver", "CUDA": "cuda", "cuDNN": "cudnn", "Triton": "triton"}
        where = ", ".join(f"{name} {machine[key]}" for name, key in parts.items())
    else:
        where = f"{machine['threads']} thread" + "s" * (machine["threads"] != "1")
    return (
        f"{machine['hardware']}{isa}, {where}, torch {machine['torch']}, commit {machine['commit']}, {machine['date']}"
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit that is checked out; with a + where the kernels or the benchmark were edited since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT).stdout.strip()

    edited = git("status", "--porcelain", "--", "csrc", "walt_kernels", "walt", "benchmarks/*.py", "setup.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(edited)
