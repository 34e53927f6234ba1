"""Launch plans: what they are made of, when they are made, and what a repeated call hands to Triton's launcher."""

from __future__ import annotations

import importlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from walt_kernels import _aot, _plans, _triton
from walt_kernels._plans import ALIGNMENT, FIRST, Planned, Unplannable, plan
from walt_kernels._triton import TARGETS, Launch, Tile, launch

if _triton.reason is not None:
    pytest.skip(str(_triton.reason), allow_module_level=True)
if _triton.INTERPRET:
    pytest.skip("kernels are interpreted, not compiled, under TRITON_INTERPRET=1", allow_module_level=True)

from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

TILE = Tile({"BLOCK": 16})


class Parameter(NamedTuple):
    name: str
    default: Any = None


class Kernel:
    """A kernel of these parameters, which is launched by nobody."""

    def __init__(self, *names: str) -> None:
        self.params = [Parameter(name) for name in (*names, "BLOCK")]


class Pair(NamedTuple):
    tensor: Tensor
    stride: int


ADD, SCALE, BOXED = Kernel("x", "y", "out", "size"), Kernel("x", "out", "factor"), Kernel("box", "pair", "out")


class Launched(_plans.Nothing):
    """Keeps what a launcher would get."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.started: list[dict[str, Any]] = []
        self.stream = lambda index: 77

    def start(self, launch: Launch, arguments: dict[str, Any]) -> Any:
        self.started.append(arguments)
        return self

    def native(self, launches: Any) -> None:
        return None

    def run(self, *arguments: Any) -> bool:
        self.calls.append(arguments)
        return True

    def launch_metadata(self, grid: Any, stream: int, *arguments: Any) -> Any:
        return grid, stream, arguments


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launched]:
    """CPU tensors stand for a GPU's; plans launch on what is returned."""
    launched = Launched()
    monkeypatch.setattr(_plans, "Nothing", lambda: launched)
    with _plans.imagine(TARGETS["sm_90"]):
        yield launched


def planned(function: Any) -> Planned:
    made = Planned("no module", "none")
    made.__dict__["function"] = function
    return made


def sums(x: Tensor, y: Tensor, out: Tensor, factor: float = 2.0) -> None:
    """out = factor * (x + y[1:]), by way of two temporaries, with a launch of no programs."""
    first = _triton.empty((x.shape[0], 3), torch.float32, x.device)
    launch(ADD, (4,), TILE, x=x, y=y[1:], out=first[1:], size=x.shape[0])
    launch(ADD, (0, 4), TILE, x=x, y=y, out=x, size=0)
    second = _triton.empty((5,), torch.bfloat16, x.device)
    launch(SCALE, (4, 2), TILE, x=first, out=second, factor=factor)
    launch(SCALE, (1,), TILE, x=second, out=out, factor=None)


def test_a_repeated_call_hands_over_addresses_of_its_own_tensors(gpu: Launched) -> None:
    call = planned(sums)
    for _ in range(2):
        x, y, out = torch.randn(8), torch.randn(9), torch.randn(8)
        call(x=x, y=y, out=out)
        assert len(call.plans) == 1
    assert [a["size"] for a in gpu.started if "size" in a] == [8]
    add, scale, last = gpu.calls
    assert add[:9] == (4, 1, 1, 77, 0, (), None, None, None)
    assert add[FIRST:][:2] == (x.data_ptr(), y.data_ptr() + 4)
    assert add[FIRST + 3 :] == (8, 16)
    memory = scale[FIRST]
    assert add[FIRST + 2] == memory + 12
    assert scale[:3] == (4, 2, 1)
    assert scale[FIRST + 1] == memory + ALIGNMENT
    assert scale[FIRST + 2] == 2.0
    assert last[FIRST : FIRST + 3] == (memory + ALIGNMENT, out.data_ptr(), None)


def test_the_first_call_runs_on_tensors(gpu: Launched) -> None:
    x, y, out = torch.randn(8), torch.randn(9), torch.randn(8)
    planned(sums)(x=x, y=y, out=out)
    add, scale, last = gpu.started
    assert add["x"].data_ptr() == x.data_ptr()
    assert torch.equal(add["y"], y[1:])
    assert add["out"].shape == (7, 3)
    assert add["out"].data_ptr() == scale["x"].data_ptr() + 12
    assert scale["out"].dtype is last["x"].dtype is torch.bfloat16
    assert scale["out"].data_ptr() == last["x"].data_ptr()


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.empty(7)},
        {"x": torch.empty(16)[::2]},
        {"x": torch.empty(8, dtype=torch.float16)},
        {"x": torch.empty(9)[1:]},
        {"y": None},
        {"factor": 3.0},
        {"factor": None},
    ],
    ids=["shape", "stride", "dtype", "alignment", "absent", "option", "no option"],
)
def test_what_a_plan_depends_on(gpu: Launched, other: dict[str, Any]) -> None:
    made: list[int] = []
    call = planned(lambda **arguments: made.append(1))
    same = {"x": torch.empty(8), "y": torch.empty(9), "factor": 2.0}
    call(**same)
    call(**same | {"x": torch.zeros(8)})
    assert len(made) == 1
    call(**same | other)
    assert len(made) == len(call.plans) == 2


def test_memory_that_was_made_for_a_call_follows_from_it(gpu: Launched) -> None:
    """Of ``out`` only whether it is there, and as far behind a multiple of 16 bytes, tells two calls apart."""
    call, x = planned(lambda **arguments: None), torch.empty(8)
    for made in (torch.empty(8), torch.empty(8, 2), torch.empty(8).double()):
        call.write(("x",), (x,), ("out",), (made,))
    assert len(call.plans) == 1
    for count, made in enumerate((None, torch.empty(9)[1:]), 2):
        call.write(("x",), (x,), ("out",), (made,))
        assert len(call.plans) == count
    call.write(("x",), (torch.empty(7),), ("out",), (torch.empty(7),))
    assert len(call.plans) == 4


def test_written_memory_stands_behind_the_tensors_of_a_call(gpu: Launched) -> None:
    call = planned(sums)
    for _ in range(2):
        x, y, out = torch.randn(8), torch.randn(9), torch.randn(8)
        call.write(("x", "y", "factor"), (x, y, 3.0), ("out",), (out,))
    assert len(call.plans) == 1
    assert gpu.calls[0][FIRST:][:2] == (x.data_ptr(), y.data_ptr() + 4)
    assert gpu.calls[1][FIRST + 2] == 3.0
    assert gpu.calls[2][FIRST + 1] == out.data_ptr()


def test_strides_of_contiguous_tensors_are_part_of_the_key(gpu: Launched) -> None:
    """Of dimensions of one element they differ, and a kernel may be chosen by them."""
    call = planned(lambda **arguments: None)
    for strides in ((8, 1), (1, 1)):
        call(x=torch.empty(8).as_strided((1, 8), strides))
    assert len(call.plans) == 2


def test_settings_and_names_are_part_of_the_key(gpu: Launched) -> None:
    call = planned(lambda **arguments: None)
    call(x=torch.empty(8))
    call(branch=torch.empty(8))
    assert len(call.plans) == 2
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = not before
    try:
        call(x=torch.empty(8))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert len(call.plans) == 3


def test_tensors_that_overlap_are_told_apart(gpu: Launched) -> None:
    """x and y of one storage, y before x: later calls have them elsewhere."""
    memory, call = torch.empty(32), planned(sums)
    call(x=memory[20:28], y=memory[:9], out=memory[:8])
    x, y, out = torch.empty(8), torch.empty(9), torch.empty(8)
    call(x=x, y=y, out=out)
    assert len(call.plans) == 1
    assert gpu.calls[0][FIRST : FIRST + 2] == (x.data_ptr(), y.data_ptr() + 4)
    assert gpu.calls[2][FIRST + 1] == out.data_ptr()


def test_boxes_and_tuples_are_made_anew(gpu: Launched) -> None:
    def function(x: Tensor, out: Tensor) -> None:
        box = TensorDescriptor.from_tensor(x[2:], [16, 16])
        launch(BOXED, (1,), TILE, box=box, pair=Pair(x[1], 3), out=out)

    call = planned(function)
    call(x=torch.empty(32, 16), out=torch.empty(1))
    x, out = torch.empty(32, 16), torch.empty(1)
    call(x=x, out=out)
    box, pair, address = gpu.calls[0][FIRST : FIRST + 3]
    assert (box.base.data_ptr(), tuple(box.shape), tuple(box.strides)) == (x[2:].data_ptr(), (30, 16), (16, 1))
    assert (box.padding, box.round_f32_to_tf32) == ("zero", False)
    assert pair == Pair(x[1].data_ptr(), 3)
    assert type(pair) is Pair
    assert address == out.data_ptr()
    described = gpu.started[0]["box"]
    assert isinstance(described, TensorDescriptor)
    assert described.base.shape == (30, 16)


@pytest.mark.parametrize(
    "forbidden",
    [lambda x: x.zero_(), lambda x: x.clone(), lambda x: x.to(torch.float64), lambda x: x.t().contiguous()],
    ids=["writes", "copies", "converts", "orders"],
)
def test_a_backend_that_does_more_runs_in_every_call(gpu: Launched, forbidden: Any) -> None:
    ran = []

    def function(x: Tensor, out: Tensor) -> None:
        ran.append(x.device.type)
        launch(SCALE, (1,), TILE, x=forbidden(x), out=out, factor=1.0)

    arguments = {"x": torch.ones(4, 4), "out": torch.empty(4, 4)}
    with pytest.raises(Unplannable, match="neither a launch nor a view"):
        plan(function, arguments, gpu)
    call = planned(function)
    call(**arguments)
    call(**arguments)
    assert ran == ["meta", "meta", "cpu", "cpu"]
    assert gpu.started == []


def test_a_launch_on_a_tensor_from_elsewhere_has_no_plan(gpu: Launched) -> None:
    table = torch.ones(4)
    with pytest.raises(Unplannable, match="no view"):
        plan(lambda x: launch(SCALE, (1,), TILE, x=x, out=table, factor=1.0), {"x": torch.ones(4)}, gpu)


def test_a_backend_that_fails_says_so(gpu: Launched) -> None:
    def function(x: Tensor) -> None:
        raise KeyError("no tile")

    with pytest.raises(KeyError, match="no tile"):
        planned(function)(x=torch.ones(4))
    assert _triton.recording() is None


def test_recorded_calls_have_no_plan(gpu: Launched) -> None:
    call = planned(sums)
    with _triton.record(TARGETS["sm_80"]) as launches:
        call(x=torch.empty(8), y=torch.empty(9), out=torch.empty(8))
    assert [launch.kernel for launch in launches] == [ADD, ADD, SCALE, SCALE]
    assert call.plans == {}
    with _plans.none():
        call(x=torch.empty(8), y=torch.empty(9), out=torch.empty(8))
    assert call.plans == {}


def test_launch_hooks_are_called_with_what_they_ask_for(gpu: Launched) -> None:
    call = planned(sums)
    arguments = {"x": torch.empty(8), "y": torch.empty(9), "out": torch.empty(8)}
    call(**arguments)
    hook = lambda metadata: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        call(**arguments)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    metadata, enter, leave = gpu.calls[0][6:9]
    assert enter is knobs.runtime.launch_enter_hook
    assert leave is knobs.runtime.launch_exit_hook
    assert metadata == ((4, 1, 1), 77, gpu.calls[0][FIRST:])


def test_the_number_of_plans_is_bounded_and_they_hold_no_memory(gpu: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plans, "LIMIT", 3)
    call, alive = planned(sums), []
    for size in range(1, 9):
        x = torch.empty(size)
        alive.append(weakref.ref(x))
        call(x=x, y=torch.empty(size + 1), out=torch.empty(size))
        del x
        gpu.started.clear()
        assert 1 <= len(call.plans) <= 3
    assert [reference() for reference in alive] == [None] * 8


def test_threads_plan_for_themselves(gpu: Launched) -> None:
    """While a thread plans, another one's launches run."""
    inside, go = threading.Event(), threading.Event()

    def slow(x: Tensor) -> None:
        launch(SCALE, (1,), TILE, x=x, out=x, factor=1.0)
        inside.set()
        assert go.wait(10)

    first, second = planned(slow), planned(sums)
    thread = threading.Thread(target=first, kwargs={"x": torch.empty(4)})
    thread.start()
    assert inside.wait(10)
    arguments = {"x": torch.empty(8), "y": torch.empty(9), "out": torch.empty(8)}
    second(**arguments)
    second(**arguments)
    assert len(gpu.calls) == 3
    go.set()
    thread.join()
    (found,) = first.plans.values()
    assert found is not None
    assert [launch.kernel for launch in found.launches] == [SCALE]


def test_temporaries_share_memory_where_no_launch_needs_both() -> None:
    sizes = {"a": 300, "b": 100, "c": 512, "d": 50}
    made = {name: torch.empty(size, dtype=torch.uint8) for name, size in sizes.items()}
    number = {name: made[name].untyped_storage()._cdata for name in made}
    used = [{number["a"]}, {number["a"], number["b"]}, {number["b"], number["c"]}]  # nobody needs d
    offsets, size = _plans._packed(used, list(made.values()))
    assert set(offsets) == {number[name] for name in "abc"}
    assert offsets[number["a"]] == offsets[number["c"]] == 0
    assert offsets[number["b"]] == 512
    assert size == 768


@pytest.mark.parametrize("folder", _aot.folders_with_calls())
def test_every_call_that_is_compiled_ahead_has_a_plan(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So no backend does more than it may: else its Python would run in every call."""
    launches = []

    def planned(self: Planned, key: Any, arguments: dict[str, Any]) -> _plans.Plan:
        made = plan(self.function, arguments, _plans.Nothing())
        launches.extend(made.launches)
        return made

    monkeypatch.setattr(Planned, "planned", planned)
    calls = importlib.import_module(f"walt_kernels.{folder}.triton_aot").aot_calls()
    for architecture in TARGETS:
        monkeypatch.setattr(_triton, "target", lambda device, found=TARGETS[architecture]: found)
        for call in calls:
            before = len(launches)
            call.run()
            assert len(launches) > before, call.name
