"""Launch plans: what the Triton backend does in a call is worked out once for the call's shapes, then repeated.

A plan depends on the shapes, strides, dtypes and alignment of a call's tensors, on its options and on the device, never
on data. It is made by running the backend's Python on stand-ins: tensors of the meta device, one for each of the
call's, on which launches are noted and nothing is computed. So every tensor of a launch is known to be a view of one of
the call's tensors, or of a temporary, however the call's own tensors may overlap in memory. A backend that does
anything else (an op of PyTorch's, a look at data) has no plan, and its Python runs in every call.

A repeated call computes addresses, takes one piece of memory for all temporaries and hands them to the CUDA driver by
way of the native module (``_launches``), or of Triton's launcher.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import _launches, _triton
from ._library import NO_TENSORS
from ._places import PLACED, Descriptor, Group, Place

LIMIT = 1024  # plans of one pass of an op; beyond it all are forgotten, so that shapes in turns lose no more than once
ALIGNMENT = 256  # bytes, of temporaries: what PyTorch's allocator gives
POINTER = 16  # bytes: of pointers that are multiples of this, Triton makes another kernel

# Under the interpreter a launch takes seconds, and tests change tiles from call to call.
enabled = not _triton.INTERPRET and os.environ.get("WALT_KERNELS_PLANS") != "0"

_get_allow_tf32 = torch._C._get_cublas_allow_tf32  # as torch.backends.cuda.matmul.allow_tf32, in a tenth of the time


class Unplannable(Exception):
    """The backend does what cannot be repeated without its Python."""


class Runtime:
    """What runs kernels: Triton, here."""

    def __init__(self) -> None:
        if not _triton.INTERPRET:
            from triton.runtime import driver

            self.current_device: Callable[[], int] = driver.active.get_current_device
            self.stream: Callable[[int], int] = driver.active.get_current_stream

    def start(self, launch: _triton.Launch, arguments: dict[str, Any]) -> Any:
        """Runs a kernel on tensors. Returns the compiled one, None where it is interpreted."""
        return launch.kernel[launch.grid](**arguments, num_warps=launch.tile.warps, num_stages=launch.tile.stages)

    def native(self, launches: Iterable[tuple[_triton.Launch, Any]]) -> Any:
        """What launches compiled kernels without Python; None where nothing does."""
        return _launches.native(launches)


@functools.cache
def _triton_runtime() -> Runtime:
    return Runtime()


class Nothing(Runtime):
    """In the place of a GPU that is imagined: takes all that a launcher takes, and runs nothing."""

    function, packed_metadata = 0, ()

    def __init__(self) -> None:
        self.current_device = lambda: 0
        self.stream = lambda index: 0

    def start(self, launch: _triton.Launch, arguments: dict[str, Any]) -> Any:
        return self

    def native(self, launches: Iterable[tuple[_triton.Launch, Any]]) -> Any:
        return self

    def run(self, *arguments: Any) -> bool:
        return True


@contextlib.contextmanager
def imagine(target: _triton.Target) -> Iterator[None]:
    """Inside the block CPU tensors stand for those of a GPU, and what its kernels would write is left as it is."""
    forget()
    _triton.imagined = target
    try:
        yield
    finally:
        _triton.imagined = None
        forget()


@contextlib.contextmanager
def none() -> Iterator[None]:
    """Inside the block the backends' Python runs in every call."""
    global enabled
    before, enabled = enabled, False
    try:
        yield
    finally:
        enabled = before


def forget() -> None:
    """Forgets all plans."""
    for planned in _all:
        planned.plans.clear()


class Step(NamedTuple):
    """A launch of a compiled kernel: arguments of Triton's launcher, and which of them are to be filled in."""

    run: Callable[..., None]
    arguments: list[Any]
    pointers: tuple[tuple[int, int, int], ...]  # position, base, offset
    others: tuple[tuple[int, Descriptor | Group], ...]
    compiled: Any
    grid: tuple[int, int, int]


STREAM, METADATA, ENTER, LEAVE, FIRST = 3, 6, 7, 8, 9  # positions in the arguments of a launcher


class Plan:
    """The launches of a call. Holds no memory."""

    def __init__(self, launches: Sequence[_triton.Launch], size: int, device: torch.device, runtime: Runtime) -> None:
        self.launches, self.size, self.device, self.runtime = launches, size, device, runtime
        self.index = -1 if device.index is None else device.index
        self.steps: list[Step] | None = None
        self.native: Any = None  # the steps without Python, where they can be so

    def run(self, tensors: Sequence[Tensor], addresses: list[int]) -> None:
        """Does the call with these tensors, which lie at these addresses."""
        if self.device.type == "cuda" and self.runtime.current_device() != self.index:
            with torch.cuda.device(self.index):
                self._run(tensors, addresses)
        else:
            self._run(tensors, addresses)

    def _run(self, tensors: Sequence[Tensor], addresses: list[int]) -> None:
        if self.size:
            memory = self.memory()
            addresses.append(memory.data_ptr())
            tensors = (*tensors, memory)
        if self.steps is None:
            self._start(tensors)
            return
        stream = self.runtime.stream(self.index)
        hooks = _hooks()
        if hooks is None and self.native is not None and self.native.run(addresses, stream):
            return
        for run, template, pointers, others, compiled, grid in self.steps:
            arguments = template.copy()
            arguments[STREAM] = stream
            for position, base, offset in pointers:
                arguments[position] = addresses[base] + offset
            for position, placed in others:
                arguments[position] = placed.pointer(addresses)
            if hooks is not None:
                arguments[ENTER], arguments[LEAVE] = hooks
                arguments[METADATA] = compiled.launch_metadata(grid, stream, *arguments[FIRST:])
            run(*arguments)

    def memory(self) -> Tensor:
        """Of all temporaries."""
        return torch.empty(self.size // 4, dtype=torch.float32, device=self.device)  # float32: tests fill it with NaN

    def _start(self, tensors: Sequence[Tensor]) -> None:
        """The first time: Triton finds (or compiles) the kernels, by the tensors that they run on."""
        steps = []
        for launch in self.launches:
            arguments = {n: v.tensor(tensors) if isinstance(v, PLACED) else v for n, v in launch.arguments.items()}
            compiled = self.runtime.start(launch, arguments)
            if compiled is not None:
                steps.append(_step(launch, compiled))
        if len(steps) == len(self.launches):
            self.native = self.runtime.native(zip(self.launches, [step.compiled for step in steps], strict=True))
            self.steps = steps


def _step(launch: _triton.Launch, compiled: Any) -> Step:
    x, y, z = (*launch.grid, 1, 1)[:3]
    grid = x, y, z
    values = [launch.arguments.get(parameter.name, parameter.default) for parameter in launch.kernel.params]
    template = [*grid, None, compiled.function, compiled.packed_metadata, None, None, None, *values]
    placed = [(i, value) for i, value in enumerate(template) if isinstance(value, PLACED)]
    pointers = tuple((i, value.base, value.offset) for i, value in placed if isinstance(value, Place))
    others = tuple((i, value) for i, value in placed if not isinstance(value, Place))
    for i, _ in placed:
        template[i] = None
    return Step(compiled.run, template, pointers, others, compiled, grid)


@functools.cache
def _knobs() -> Any:
    from triton import knobs

    return knobs.runtime


def _hooks() -> tuple[Any, Any] | None:
    """What profilers want to be called around every launch, None where nobody does."""
    knobs = _knobs()
    enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
    return (enter, leave) if getattr(enter, "calls", enter) or getattr(leave, "calls", leave) else None


class _Memory(TorchDispatchMode):
    """Lets a backend make temporaries and views, and nothing else."""

    aten = torch.ops.aten
    made = (aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default)

    def __init__(self) -> None:
        super().__init__()
        self.temporaries: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.made and not func.is_view:
            raise Unplannable(f"{func} is neither a launch nor a view nor memory for a temporary")
        result = func(*args, **(kwargs or {}))
        if func in self.made:
            self.temporaries.append(result)
        return result


def plan(function: Callable[..., None], arguments: dict[str, Any], runtime: Runtime) -> Plan:
    """What ``function`` does with these arguments; raises ``Unplannable``."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    device = next(iter(tensors.values())).device
    bases = {name: _stand_in(tensor) for name, tensor in tensors.items()}
    memory = _Memory()
    with _triton.note(_triton.target(device), device) as noted, memory:
        function(**{**arguments, **bases})
    launches = [launch for launch in noted if 0 not in launch.grid]
    offsets, size = _packed([_storages(launch) for launch in launches], memory.temporaries)
    known = {_storage(base): (i, -base.storage_offset() * base.itemsize) for i, base in enumerate(bases.values())}
    known |= {storage: (len(bases), offset) for storage, offset in offsets.items()}

    def placed(value: Any) -> Any:
        if isinstance(value, Tensor):
            if _storage(value) not in known:
                raise Unplannable("a launch has a tensor that is no view of the call's, nor of a temporary")
            base, offset = known[_storage(value)]
            offset += int(value.storage_offset()) * value.itemsize
            return Place(base, offset, value.dtype, tuple(value.shape), value.stride())
        if _triton.is_descriptor(value):
            return Descriptor(placed(value.base), value)
        if isinstance(value, tuple) and next(_triton.tensors_in(value), None) is not None:
            return Group(getattr(type(value), "_make", type(value)), tuple(map(placed, value)))
        return value

    return Plan(
        [launch._replace(arguments={n: placed(v) for n, v in launch.arguments.items()}) for launch in launches],
        size,
        device,
        runtime,
    )


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor like it, as far behind a multiple of 16 bytes, in a storage of its own without memory."""
    ahead = tensor.data_ptr() % POINTER // tensor.itemsize
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size)
    storage = torch.empty(ahead + reach + 1, dtype=tensor.dtype, device="meta")
    return storage.as_strided(tensor.shape, tensor.stride(), ahead)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _storages(launch: _triton.Launch) -> set[int]:
    return {_storage(tensor) for value in launch.arguments.values() for tensor in _triton.tensors_in(value)}


def _packed(used: Sequence[set[int]], temporaries: Sequence[Tensor]) -> tuple[dict[int, int], int]:
    """Offsets of the temporaries' storages in one piece of memory, and its size in bytes.

    ``used`` are the storages of each launch. Those that no launch needs at the same time may lie in the same place.
    """
    lives = {}
    for temporary in temporaries:
        storage = _storage(temporary)
        when = [i for i, storages in enumerate(used) if storage in storages]
        if when:
            lives[storage] = (-(-temporary.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT, when[0], when[-1])
    offsets: dict[int, int] = {}
    for storage, (size, first, last) in sorted(lives.items(), key=lambda item: -item[1][0]):
        offset = 0
        beside = [s for s in offsets if lives[s][1] <= last and first <= lives[s][2]]
        for other in sorted(beside, key=offsets.__getitem__):
            if offset + size <= offsets[other]:
                break
            offset = max(offset, offsets[other] + lives[other][0])
        offsets[storage] = offset
    return offsets, max((max(offsets[s] + lives[s][0], ALIGNMENT) for s in offsets), default=0)


def _allow_tf32() -> bool | None:
    """The one setting that kernels are chosen by. None where PyTorch's two ways to set it disagree."""
    try:
        return _get_allow_tf32()
    except RuntimeError:
        return None


_all: list[Planned] = []


class Planned:
    """A function of an op's triton_backend.py, which is imported by the first call; called by name."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name
        self.plans: dict[tuple[Any, ...], Plan | None] = {}
        _all.append(self)

    @functools.cached_property
    def function(self) -> Callable[..., None]:
        found: Callable[..., None] = getattr(importlib.import_module(self.module), self.name)
        return found

    def __call__(self, **arguments: Any) -> None:
        self.write(tuple(arguments), tuple(arguments.values()))

    def write(
        self, names: tuple[str, ...], values: Sequence[Any], writes: Sequence[str] = (), made: Sequence[Any] = ()
    ) -> None:
        """The call with these values of ``names`` and the memory ``made`` for ``writes``.

        That memory was made for these very values, so its shapes, strides and dtypes need no place in the key.
        """
        if not enabled or _triton.recording() is not None:
            self.function(**_named(names, values, writes, made))
            return
        tensors: list[Tensor] = []
        key: list[Any] = [names, _allow_tf32()]
        for value in values:
            if type(value) in NO_TENSORS:
                key.append(tuple(value) if type(value) is list else value)
            elif isinstance(value, Tensor):
                tensors.append(value)
                key += (value.shape, value.stride(), value.dtype)
            else:
                key.append(value)
        key.append(tensors[0].get_device())
        for value in made:
            key.append(value is None)
            if value is not None:
                tensors.append(value)
        addresses = [tensor.data_ptr() for tensor in tensors]
        if functools.reduce(operator.or_, addresses) % POINTER:
            key += [address % POINTER for address in addresses]
        try:
            found = self.plans[tuple(key)]
        except KeyError:
            found = self.planned(tuple(key), _named(names, values, writes, made))
        if found is None:
            self.function(**_named(names, values, writes, made))
        else:
            found.run(tensors, addresses)

    def planned(self, key: tuple[Any, ...], arguments: dict[str, Any]) -> Plan | None:
        if _triton.autotunes():  # the plan then has the tiles that this call finds the fastest
            self.function(**arguments)
        found = None
        with contextlib.suppress(Unplannable):
            found = plan(self.function, arguments, Nothing() if _triton.imagined else _triton_runtime())
        if len(self.plans) >= LIMIT:
            self.plans.clear()
        self.plans[key] = found
        return found


def _named(names: Sequence[str], values: Sequence[Any], writes: Sequence[str], made: Sequence[Any]) -> dict[str, Any]:
    return dict(zip((*names, *writes), (*values, *made), strict=True))
