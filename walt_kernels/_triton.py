"""What the Triton kernels of all ops share: whether they can run, the choice of tiles, and the launch.

A launch can be recorded in place of running (``record``): ahead-of-time compilation then sees exactly the kernels,
argument types and tiles that a call would run, for any target and without a GPU.

Calls on a GPU are recorded once, too, and repeated without their Python (see ``_plans``). For that, a backend makes
temporaries (``empty``) and views, launches kernels, and does nothing else; what it chooses depends on shapes, strides,
dtypes, alignment and the target alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._defaults import architecture
from ._dispatch import Backend
from ._library import NO_TENSORS


def _find() -> str | None:
    """Why there is no Triton. It is imported by the first call that needs it: it takes a while."""
    try:
        return None if importlib.util.find_spec("triton") else "Triton is not installed"
    except ImportError as error:
        return f"Triton is not installed ({error})"


reason = _find()

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
OPT_IN = "not measured for such calls on such a GPU, so only where it is forced"
TOO_OLD = frozenset(("sm_50", "sm_52", "sm_53", "sm_60", "sm_61", "sm_62", "sm_70", "sm_72", "sm_75"))
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

# While host time is measured without a GPU, tensors of the CPU stand for those of this one (``_plans.imagine``).
imagined: Target | None = None


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
    grid: tuple[int, ...] = (1,)


class Recording(NamedTuple):
    """Launches that are collected in place of running, as for ``target``."""

    target: Target
    launches: list[Launch]
    device: torch.device | None = None  # that of the call which is planned; None where a GPU is only imagined


class _Thread(threading.local):
    plan: Recording | None = None


_thread = _Thread()
_everywhere: Recording | None = None


def recording() -> Recording | None:
    """What takes this thread's launches in place of a device."""
    return _everywhere or _thread.plan


@contextlib.contextmanager
def record(target: Target, launches: list[Launch] | None = None) -> Iterator[list[Launch]]:
    """Launches inside the block, of any thread, run nothing and are collected, as for ``target``."""
    global _everywhere
    _everywhere = Recording(target, [] if launches is None else launches)
    try:
        yield _everywhere.launches
    finally:
        _everywhere = None


@contextlib.contextmanager
def note(target: Target, device: torch.device) -> Iterator[list[Launch]]:
    """As ``record``, for a call on ``device`` that is planned: launches of this thread alone."""
    _thread.plan = Recording(target, [], device)
    try:
        yield _thread.plan.launches
    finally:
        _thread.plan = None


def unsupported(**inputs: Any) -> str | None:
    """Why the Triton kernels cannot take the tensors among these, or None."""
    if reason is not None:
        return reason
    on_gpu = None
    for tensor in inputs.values():
        if type(tensor) in NO_TENSORS or not isinstance(tensor, Tensor):
            continue
        if (tensor.is_cuda or (imagined is not None and tensor.is_cpu)) and tensor.dtype in DTYPES:
            on_gpu = tensor  # the cheapest questions first: every call asks
        elif tensor.is_floating_point() and (reason_against := _unfit(tensor)) is not None:
            return reason_against
    if on_gpu is not None and (name := architecture(on_gpu.device)) in TOO_OLD:
        return f"needs compute capability 8.0; {on_gpu.device} is an {name}"
    return None


def _unfit(tensor: Tensor) -> str | None:
    if tensor.is_cuda:
        return f"no Triton kernel for {tensor.dtype}"
    if tensor.device.type != "cpu":
        return f"runs on NVIDIA and AMD GPUs; this tensor is on {tensor.device}"
    if imagined is None and not INTERPRET:
        return "runs on GPU tensors, and on CPU tensors only with TRITON_INTERPRET=1"
    if imagined is None and tensor.dtype is not torch.float32:  # it truncates where a GPU rounds
        return f"Triton's interpreter is exact in float32 only; this tensor is {tensor.dtype}"
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
    record = recording()
    if record is not None:
        return record.target
    if device.type == "cpu":
        return imagined or _INTERPRETER
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for what a launch writes and a later launch of the same call reads."""
    return torch.empty(shape, dtype=dtype, device=device)


def is_descriptor(value: Any) -> bool:
    """Whether an argument of a launch is a tensor descriptor (a box for TMA)."""
    return type(value).__name__ == "TensorDescriptor"


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of an argument of a launch: itself, a descriptor's, those of a tuple's items."""
    if isinstance(value, Tensor):
        yield value
    elif is_descriptor(value):
        yield value.base
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_in(item)


def constants(sizes: Any) -> Any:
    """A named tuple with items that are compiled into a kernel."""
    from triton.language import constexpr

    return type(sizes)(*map(constexpr, sizes))


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, **arguments: Any) -> None:
    """Runs ``kernel`` on the device of its tensors; arguments are by name, and the tile's blocks join them."""
    arguments = arguments | dict(tile.blocks)
    record = recording()
    if record is not None:
        record.launches.append(Launch(kernel, arguments, tile, grid))
        return
    if 0 in grid or imagined is not None:
        return
    device = next(tensors_in(tuple(arguments.values()))).device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments, num_warps=tile.warps, num_stages=tile.stages)


def backend(package: str, forward: str = "forward", backward: str = "backward") -> Backend:
    """The functions of these names in the package's triton_backend.py, which is imported when one is called."""

    from ._plans import Planned

    module = f"{package}.triton_backend"
    return Backend("triton", unsupported, Planned(module, forward), Planned(module, backward), OPT_IN)


def autotunes() -> bool:
    """Whether tiles are timed."""
    return os.environ.get("WALT_KERNELS_AUTOTUNE") == "1"


Table = Mapping[tuple[Any, ...], Mapping[str, Tile]]


def pick(table: Table, key: tuple[Any, ...], device: torch.device, trial: Callable[[Tile], None] | None = None) -> Tile:
    """The tile of ``table`` for a shape class: ``table[key][architecture]``, or ``table[key]["any"]``.

    ``trial(tile)`` launches the kernel with a given tile. Where it is given and WALT_KERNELS_AUTOTUNE=1, all tiles of
    the table are timed once for this key and GPU, and the fastest is kept on disk (see ``_autotune``).
    """
    choices = table[key]
    chosen = choices.get(target(device).architecture, choices["any"])
    if trial is None or not autotunes():
        return chosen
    from . import _autotune

    record = recording()
    if record is None:
        return _autotune.fastest(table, key, chosen, device, trial)
    return chosen if record.device is None else _autotune.kept(key, record.device, trial) or chosen
