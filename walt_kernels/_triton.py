"""What the Triton kernels of all ops share: whether they can run, the choice of tiles, and the launch.

A launch can be recorded in place of running (``record``): ahead-of-time compilation then sees exactly the kernels,
argument types and tiles that a call would run, for any target and without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._dispatch import Backend


def _find() -> str | None:
    """Why there is no Triton. It is imported by the first call that needs it: it takes a while."""
    try:
        return None if importlib.util.find_spec("triton") else "Triton is not installed"
    except ImportError as error:
        return f"Triton is not installed ({error})"


reason = _find()

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
OPT_IN = "compiles for every target; not yet run on a GPU, so only where it is forced"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Target(NamedTuple):
    """What decides tiles and partial sums: architecture, number of multiprocessors, shared memory of one program."""

    architecture: str
    processors: int
    shared_bytes: int


# What is compiled ahead of time. The tiles of sm_80 serve every other NVIDIA architecture too, so they are held to the
# 99 KB of its small relatives (sm_86, sm_89, sm_120).
TARGETS = {
    "sm_80": Target("sm_80", 108, 99 << 10),
    "sm_90": Target("sm_90", 132, 227 << 10),
    "sm_100": Target("sm_100", 148, 227 << 10),
    "gfx942": Target("gfx942", 304, 64 << 10),
}
_INTERPRETER = Target("interpreter", 3, 1 << 30)  # few processors, so that sums over partial rows take several steps


@dataclass(frozen=True)
class Tile:
    """Block sizes of a kernel by the names of its constexpr parameters, and how its program is compiled."""

    blocks: Mapping[str, int]
    warps: int = 4
    stages: int = 2

    def __hash__(self) -> int:
        return hash((*sorted(self.blocks.items()), self.warps, self.stages))


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: Any
    arguments: Mapping[str, Any]
    tile: Tile


_recorded: list[Launch] | None = None
_recording: Target | None = None


@contextlib.contextmanager
def record(target: Target) -> Iterator[list[Launch]]:
    """Launches inside the block run nothing and are collected, as for ``target``."""
    global _recorded, _recording
    _recorded, _recording = [], target
    try:
        yield _recorded
    finally:
        _recorded = _recording = None


def unsupported(**inputs: Any) -> str | None:
    """Why the Triton kernels cannot take the tensors among these, or None."""
    if reason is not None:
        return reason
    for tensor in inputs.values():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            continue
        if tensor.device.type == "cpu":
            if not INTERPRET:
                return "runs on GPU tensors, and on CPU tensors only with TRITON_INTERPRET=1"
            if tensor.dtype is not torch.float32:  # it truncates where a GPU rounds
                return f"Triton's interpreter is exact in float32 only; this tensor is {tensor.dtype}"
        elif tensor.device.type != "cuda":
            return f"runs on NVIDIA and AMD GPUs; this tensor is on {tensor.device}"
        elif tensor.dtype not in DTYPES:
            return f"no Triton kernel for {tensor.dtype}"
        elif torch.version.hip is None and torch.cuda.is_available():
            capability = torch.cuda.get_device_capability(tensor.device)
            if capability < (8, 0):
                return f"needs compute capability 8.0; {tensor.device} has {'.'.join(map(str, capability))}"
    return None


@functools.cache
def _gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    known = TARGETS.get(name, TARGETS["gfx942" if torch.version.hip else "sm_80"])
    return Target(known.architecture, properties.multi_processor_count, known.shared_bytes)


def target(device: torch.device) -> Target:
    """The target that runs (or is recorded) for tensors on ``device``. Unknown GPUs get the nearest smaller one's."""
    if _recording is not None:
        return _recording
    if device.type == "cpu":
        return _INTERPRETER
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for what a launch writes and a later launch of the same call reads."""
    return torch.empty(shape, dtype=dtype, device=device)


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, **arguments: Any) -> None:
    """Runs ``kernel`` on the device of its tensors; arguments are by name, and the tile's blocks join them."""
    arguments = arguments | dict(tile.blocks)
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, tile))
        return
    if 0 in grid:
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments, num_warps=tile.warps, num_stages=tile.stages)


def backend(package: str, forward: str = "forward", backward: str = "backward") -> Backend:
    """The functions of these names in the package's triton_backend.py, which is imported when one is called."""

    def call(name: str, **arguments: Any) -> None:
        getattr(importlib.import_module(f"{package}.triton_backend"), name)(**arguments)

    return Backend("triton", unsupported, functools.partial(call, forward), functools.partial(call, backward), OPT_IN)


Table = Mapping[tuple[Any, ...], Mapping[str, Tile]]


def pick(table: Table, key: tuple[Any, ...], device: torch.device, trial: Callable[[Tile], None] | None = None) -> Tile:
    """The tile of ``table`` for a shape class: ``table[key][architecture]``, or ``table[key]["any"]``.

    ``trial(tile)`` launches the kernel with a given tile. Where it is given and WALT_KERNELS_AUTOTUNE=1, all tiles of
    the table are timed once for this key and GPU, and the fastest is kept on disk (see ``_autotune``).
    """
    choices = table[key]
    chosen = choices.get(target(device).architecture, choices["any"])
    if trial is None or _recorded is not None or os.environ.get("WALT_KERNELS_AUTOTUNE") != "1":
        return chosen
    from ._autotune import fastest

    return fastest(table, key, chosen, device, trial)
