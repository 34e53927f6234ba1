"""What runs on a GPU by default: the choice by measured times, passes on different backends, and the tables."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from found_ops import needs_native
from torch import Tensor

from walt_kernels import _defaults, _dispatch, causal_conv3d, explain, use_backend
from walt_kernels._defaults import Measured

ROOT = Path(__file__).parents[1]
OP = "causal_conv3d"
KIND = "to 192 channels, NCDHW"
ROW = "gpu-h200.json: C 128, 17x128x128"
PASSES = ("data gradient", "weight gradient")


def measured(forward: dict[str, float], data: dict[str, float], weight: dict[str, float]) -> Measured:
    return Measured(ROW, forward, dict(zip(PASSES, (data, weight), strict=True)))


MIXED = measured(
    {"cpu": 1.0, "cudnn": 2.0, "reference": 4.0},
    {"cpu": 3.0, "cudnn": 1.0, "reference": 3.0},
    {"cpu": 1.0, "cudnn": 2.0, "reference": 3.0},
)

Ran = list[tuple[str, list[str]]]


@pytest.fixture
def ran() -> Ran:
    """What ran: the backend, and the gradients that it wrote (none in forward)."""
    return []


@pytest.fixture
def gpu(ran: Ran, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Measured]], None]:
    """Sets the table by which CPU tensors, taken for those of an sm_90, are computed; "cudnn" is "cpu" once more."""
    at = _dispatch.op(OP)
    cpu = next(b for b in at.backends if b.name == "cpu")

    def seen(backend: _dispatch.Backend) -> _dispatch.Backend:
        like = cpu if backend.name == "cudnn" else backend

        def forward(**named: Any) -> Any:
            ran.append((backend.name, []))
            return like.forward(**named)

        def backward(**named: Any) -> None:
            gradients = [n for n in named if n.startswith("grad_") and n != "grad_y" and named[n] is not None]
            ran.append((backend.name, gradients))
            assert like.backward is not None
            like.backward(**named)

        own = backward if like.backward is not None else None
        return dataclasses.replace(backend, unsupported=like.unsupported, forward=forward, backward=own)

    def use(table: dict[str, Measured]) -> None:
        assert at.defaults is not None
        defaults = at.defaults._replace(measured={"sm_90": table})
        monkeypatch.setitem(_dispatch._ops, OP, at._replace(backends=tuple(map(seen, at.backends)), defaults=defaults))

    monkeypatch.setattr(_defaults, "architecture", lambda device: "sm_90")
    return use


def inputs(dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    torch.manual_seed(0)
    tensors = {"x": torch.randn(1, 16, 3, 8, 8), "weight": torch.randn(24, 16, 3, 3, 3), "bias": torch.randn(24)}
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}


def step(call: dict[str, Any], op: Callable[..., Tensor] = causal_conv3d) -> list[Tensor]:
    y = op(**call)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), list(call.values()))]


@needs_native
def test_each_pass_runs_on_its_fastest_backend(gpu: Any, ran: Ran) -> None:
    gpu({KIND: MIXED})
    results = step(inputs())
    assert ran == [("cpu", []), ("cudnn", ["grad_x"]), ("cpu", ["grad_weight", "grad_bias"])]
    with use_backend("cpu"):
        assert all(map(torch.equal, results, step(inputs())))


@needs_native
def test_a_pass_that_nobody_wants_does_not_run(gpu: Any, ran: Ran) -> None:
    gpu({KIND: MIXED})
    call = inputs()
    call["x"] = call["x"].detach()
    causal_conv3d(**call).sum().backward()
    assert ran == [("cpu", []), ("cpu", ["grad_weight", "grad_bias"])]


@needs_native
def test_a_backend_may_be_right_in_one_pass_alone(gpu: Any, ran: Ran) -> None:
    gpu({KIND: MIXED._replace(forward={"cpu": 1.0, "reference": 4.0})})
    step(inputs())
    assert [name for name, _ in ran] == ["cpu", "cudnn", "cpu"]


@needs_native
@pytest.mark.parametrize("name", ["cpu", "cudnn", "reference"])
def test_a_forced_backend_runs_all_passes(name: str, gpu: Any, ran: Ran) -> None:
    gpu({KIND: MIXED})
    with use_backend(name):
        step(inputs())
    assert {backend for backend, _ in ran} == {name}


@needs_native
def test_it_compiles(gpu: Any, ran: Ran) -> None:
    gpu({KIND: MIXED})
    eager = step(inputs())
    ran.clear()
    compiled = step(inputs(), torch.compile(causal_conv3d, fullgraph=True, backend="aot_eager"))
    assert [name for name, _ in ran] == ["cpu", "cudnn", "cpu"]
    assert all(map(torch.equal, eager, compiled))


@needs_native
def test_the_reference_runs_where_the_whole_step_is_faster_on_it(gpu: Any, ran: Ran) -> None:
    """Forward by itself is faster on the kernels, and stays there where no gradient is wanted."""
    gpu(
        {KIND: measured({"cpu": 1.0, "reference": 2.0}, {"cpu": 1.0, "reference": 2.0}, {"cpu": 9.0, "reference": 2.0})}
    )
    call = inputs()
    step(call)
    assert ran == [("reference", [])]
    assert explain(OP, **call)["cpu"] == (
        f"forward 1 ms, reference 2; data gradient 1 ms, reference 2; weight gradient 9 ms, reference 2 ({KIND}: {ROW})"
    )
    ran.clear()
    with torch.no_grad():
        causal_conv3d(**call)
        assert explain(OP, **call)["cpu"] is None
    assert ran == [("cpu", [])]


@needs_native
def test_a_pass_that_was_not_measured_runs_nowhere_by_default(gpu: Any, ran: Ran) -> None:
    gpu({KIND: measured({"cpu": 1.0, "reference": 2.0}, {"cpu": 1.0, "reference": 2.0}, {"reference": 2.0})})
    step(inputs())
    assert ran == [("reference", [])]


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_in_no_table_is_as_without_tables(
    dtype: torch.dtype, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = explain(OP, **inputs(dtype))
    gpu({KIND: MIXED} if dtype is torch.float32 else {})
    told = explain(OP, **inputs(dtype))
    assert told["cpu"] is None
    assert told["onednn"] == plain["onednn"]
    gpu({KIND: MIXED})
    monkeypatch.setattr(_defaults, "architecture", lambda device: "sm_100")
    assert explain(OP, **inputs(dtype))["onednn"] == plain["onednn"]


@needs_native
def test_explain_tells_class_row_and_times(gpu: Any) -> None:
    gpu({KIND: MIXED})
    reasons = explain(OP, **inputs())
    assert list(reasons) == ["triton", "cudnn", "onednn", "cpu", "reference"]
    assert next(name for name, reason in reasons.items() if reason is None) == "cpu"
    assert reasons["cudnn"] == (
        f"forward 2 ms, cpu 1; data gradient runs on it: 1 ms; weight gradient 2 ms, cpu 1 ({KIND}: {ROW})"
    )
    assert "not measured" in str(reasons["onednn"])


def tables() -> Iterator[tuple[str, str, Measured]]:
    for op in _dispatch.ops():
        defaults = _dispatch.op(op).defaults
        for table in defaults.measured.values() if defaults is not None else ():
            for kind, one in table.items():
                yield op, kind, one


def test_tables_name_backends_passes_and_rows_that_there_are() -> None:
    found = list(tables())
    assert any(op == OP for op, _, _ in found)
    for op, kind, one in found:
        at = _dispatch.op(op)
        assert at.defaults is not None
        names = {backend.name for backend in at.backends}
        assert set(one.backward) <= set(at.defaults.passes), kind
        for times in (one.forward, *one.backward.values()):
            assert all(ms > 0 for ms in times.values()), kind
            assert set(times) <= names, kind
        file, case = one.row.split(": ", 1)
        folder = at.function.__module__.split(".")[-2]
        assert case in {c.name for c in importlib.import_module(f"benchmarks.{folder}").GPU_CASES}
        results = ROOT / "benchmarks" / "results" / file
        if results.exists():
            assert case in {row["case"] for row in json.loads(results.read_text())["rows"]}, kind


def test_the_passes_of_an_op_are_its_gradients() -> None:
    defaults = _dispatch.op(OP).defaults
    assert defaults is not None
    assert sorted(name for read in defaults.passes.values() for name in read) == ["bias", "history", "weight", "x"]


@pytest.mark.parametrize(
    ("channels", "out_channels", "options", "kind"),
    [
        (128, 128, {}, "to 192 channels, NDHWC"),
        (256, 128, {}, "to 384 channels, NDHWC"),
        (512, 512, {}, "more channels, NDHWC"),
        (3, 128, {}, "from few channels, NDHWC"),
        (128, 3, {}, "to few channels, NDHWC"),
        (128, 128, {"stride": 2}, "strided, NDHWC"),
        (128, 256, {"kernel": 1}, "1x1x1, NDHWC"),
        (20, 128, {}, None),
        (128, 128, {"dilation": 2}, None),
        (128, 128, {"space_padding": "reflect"}, None),
        (128, 128, {"dtype": torch.float32}, None),
    ],
)
def test_classes_of_convolutions(channels: int, out_channels: int, options: dict[str, Any], kind: str | None) -> None:
    options = dict(options)
    dtype, kernel = options.pop("dtype", torch.bfloat16), options.pop("kernel", 3)
    x = torch.zeros(1, channels, 2, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.zeros(out_channels, channels, kernel, kernel, kernel, dtype=dtype)
    defaults = _dispatch.op(OP).defaults
    assert defaults is not None
    assert defaults.classify(**_dispatch.prepare(OP, x, weight, **options)) == kind
    contiguous = defaults.classify(**_dispatch.prepare(OP, x.contiguous(), weight, **options))
    assert contiguous == (None if kind is None else kind.replace("NDHWC", "NCDHW"))
