"""Races: every kernel with every tile that a GPU can use, 50 times beside a stream that keeps its memory system busy.

Neither the interpreter nor a compiler shows a race, and on a GPU only a launch whose programs overlap shows it. The
calls are those that are compiled ahead of time, which together reach every kernel and every entry of the tables.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from on_gpu import DEVICE, marks, through, without_plans
from torch import Tensor

import walt_kernels as wk
from walt_kernels import _aot, _dispatch, _triton, testing
from walt_kernels._triton import TARGETS, Table, Tile

if _triton.reason is not None:
    pytest.skip(str(_triton.reason), allow_module_level=True)
if _triton.INTERPRET:
    pytest.skip("programs of the interpreter run one after the other", allow_module_level=True)

RUNS = 50
LEAST = 1 << 21  # elements of a call whose programs fill a GPU more than once
MOST = 1 << 30  # elements that leave room for a reference in float64
NOISE = 1 << 25  # float32 numbers that the other stream reads and writes: twice a second-level cache


class Case(NamedTuple):
    """A call on a backend; ``common``: with the tiles of any architecture, also where this one has its own."""

    call: _aot.Call
    backend: str = "triton"
    common: bool = False

    def __str__(self) -> str:
        return f"{self.call.op}, {self.call.name}, {self.backend}{' with common tiles' * self.common}"


@contextlib.contextmanager
def tiles(common: bool) -> Iterator[set[tuple[Any, ...]]]:
    """Collects the entries of the tables that are used."""
    used = set()
    real = _triton.pick

    def pick(table: Table, key: tuple[Any, ...], device: torch.device, trial: Any = None) -> Tile:
        tile = table[key]["any"] if common else real(table, key, device, trial)
        used.add((*key, tile))
        return tile

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton, "pick", pick)
        if common:
            without_plans(patch)
        yield used


def size(call: _aot.Call) -> int:
    return sum(value.numel() for value in call.arguments.values() if isinstance(value, Tensor))


def entries(case: Case, architecture: str) -> set[tuple[Any, ...]]:
    """What a call uses of the tables."""
    with tiles(case.common) as used, _triton.record(TARGETS[architecture]):
        case.call.run()
    return {(case.call.op.split("_")[0], *entry) for entry in used}


def programs(case: Case, architecture: str) -> set[tuple[Any, ...]]:
    """What a call launches, apart from numbers: kernels, tiles, and what is switched on in a kernel."""
    with tiles(case.common), _triton.record(TARGETS[architecture]) as launches:
        case.call.run()
    found = set()
    for launch in launches:
        values = [launch.arguments.get(p.name, p.default) for p in launch.kernel.params]
        found.add((launch.kernel.fn.__name__, launch.tile, tuple(map(switches, values))))
    return found


def switches(value: Any) -> Any:
    """An argument if it switches something on; of a tuple, its items."""
    if isinstance(value, tuple):
        return tuple(map(switches, value))
    value = getattr(value, "value", value)  # of a constant in a tuple
    return value if value is None or isinstance(value, bool | str) else "a number or a tensor"


@functools.cache
def calls() -> list[_aot.Call]:
    """Those that fill a GPU, the smallest first; then the others."""
    modules = [importlib.import_module(f"walt_kernels.{op}.triton_aot") for op in _aot.folders_with_calls()]
    found = [call for module in modules for call in module.aot_calls()]
    return sorted(found, key=lambda call: (size(call) < LEAST, size(call)))


def cases(architecture: str) -> list[Case]:
    """As few calls as reach everything that an architecture can launch, and those of the CUDA kernels."""
    found: list[Case] = []
    seen: set[tuple[Any, ...]] = set()
    possible = [call for call in calls() if not call.absent and size(call) < MOST]
    for common in (False, True):
        for case in (Case(call, common=common) for call in possible):
            new = (programs(case, architecture) | entries(case, architecture)) - seen
            if new:
                found.append(case)
                seen |= new
    cuda = [c for c in possible if any(backend.name == "cuda" for backend in _dispatch.op(c.op).backends)]
    return found + [Case(call, "cuda") for call in cuda]


def here() -> str:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return _triton.target(torch.device("cuda")).architecture
    return "sm_90"


def materialised(value: Any) -> Any:
    """A tensor of the same shape and strides on the GPU: normal numbers, and every second flag set."""
    if not isinstance(value, Tensor):
        return value
    length = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
    if value.dtype is torch.bool:
        flat = torch.arange(length, device=DEVICE) % 2 == 1
    else:
        flat = torch.randn(length, device=DEVICE).to(value.dtype)
    return flat.as_strided(value.shape, value.stride()).requires_grad_(value.is_floating_point())


@pytest.fixture
def memory() -> Iterator[None]:
    """Leaves to the processes that test beside this one what it does not need."""
    yield
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("case", [pytest.param(case, id=str(case), marks=marks()) for case in cases(here())])
def test_runs_are_right_and_bit_identical(case: Case) -> None:
    torch.manual_seed(0)
    inputs = {name: materialised(value) for name, value in case.call.arguments.items()}
    reason = _dispatch.backend(case.call.op, case.backend).unsupported(**_dispatch.prepare(case.call.op, **inputs))
    if reason is not None and case.backend == "cuda":
        pytest.skip(reason)
    assert reason is None
    op, reference = (through(backend, getattr(wk, case.call.op)) for backend in (case.backend, "reference"))
    widest = max(value.dtype.itemsize for value in inputs.values() if isinstance(value, Tensor))
    rows = size(case.call) if widest == 4 else 1  # no sum in float32 is longer
    with tiles(case.common):
        assert with_memory(lambda: differing(op, inputs)) == []
        with_memory(lambda: testing.check_op(op, reference, inputs, rows=rows))


def with_memory(call: Callable[[], Any]) -> Any:
    """Waits where a process that tests beside this one has the GPU's memory for a moment."""
    for seconds in (1, 2, 4, 8):
        torch.cuda.empty_cache()
        try:
            return call()
        except torch.OutOfMemoryError:
            time.sleep(seconds)
    return call()


def differing(op: Any, inputs: dict[str, Any]) -> list[str]:
    """Outputs and gradients of which a run beside a busy stream has other bits than one alone."""
    wanted = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad]
    cotangents: list[Tensor] = []

    def run() -> list[Tensor]:
        outputs = op(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        cotangents.extend(torch.randn_like(output) for output in outputs[len(cotangents) :])
        return [*outputs, *torch.autograd.grad(outputs, [inputs[name] for name in wanted], cotangents)]

    first = run()
    source, sink = torch.zeros(2, NOISE, device=DEVICE)
    torch.cuda.synchronize()
    beside = torch.cuda.Stream()
    different = torch.zeros(len(first), dtype=torch.bool, device=DEVICE)
    for _ in range(RUNS):
        with torch.cuda.stream(beside):
            for _ in range(8):
                torch.add(source, 1, out=sink)
        different |= torch.stack([(a != b).any() for a, b in zip(first, run(), strict=True)])
    torch.cuda.synchronize()
    names = [f"output {i}" for i in range(len(first) - len(wanted))] + [f"grad_{name}" for name in wanted]
    return [name for name, other in zip(names, different.tolist(), strict=True) if other]


@pytest.mark.parametrize("architecture", [name for name in TARGETS if name.startswith("sm_")])
def test_cases_reach_all_that_an_architecture_uses_of_the_tables(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # nothing runs, so nothing is poisoned
    everything = [Case(call, common=common) for common in (False, True) for call in calls()]
    expected, reached = (
        set().union(*(entries(case, architecture) for case in some)) for some in (everything, cases(architecture))
    )
    assert expected
    assert reached == expected
