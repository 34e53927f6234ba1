"""What runs on a GPU by default: the choice by an op's table, and the tables."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from found_ops import needs_native
from torch._subclasses.fake_tensor import FakeTensorMode

from walt_kernels import _defaults, _dispatch, causal_conv3d, explain, use_backend
from walt_kernels._defaults import Fastest

ROOT = Path(__file__).parents[1]
OP = "causal_conv3d"
ROW = "cuda-sm90.json: C 128, 17x128x128"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Fastest]], None]:
    """Sets the table by which all tensors, taken for those of an sm_90, are computed."""
    at = _dispatch.op(OP)

    def use(rows: dict[str, Fastest]) -> None:
        assert at.defaults is not None
        monkeypatch.setitem(_dispatch._ops, OP, at._replace(defaults=at.defaults._replace(fastest={"sm_90": rows})))

    monkeypatch.setattr(_dispatch, "architecture", lambda device: "sm_90")
    return use


def inputs(dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    x = torch.zeros(1, 16, 3, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    return {"x": x, "weight": torch.zeros(24, 16, 3, 3, 3, dtype=dtype)}


def chosen(call: dict[str, Any]) -> str:
    return _dispatch.select(OP, _dispatch.prepare(OP, **call))


@needs_native
@pytest.mark.parametrize("name", ["onednn", "cpu", "reference"])
def test_the_table_has_the_first_word_and_explain_cites_it(name: str, table: Any) -> None:
    table({"3x3x3": Fastest(name, ROW)})
    assert chosen(inputs()) == name
    reasons = explain(OP, **inputs())
    assert [backend for backend, reason in reasons.items() if reason is None] == [name]
    told = f"{name} is the fastest for calls of the class '3x3x3' ({ROW})"
    assert {reasons[other] for other in ("onednn", "cpu", "reference") if other != name} == {told}
    with use_backend("cpu"):
        assert chosen(inputs()) == "cpu"


@needs_native
def test_what_the_table_says_nothing_of_is_as_without_it(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = explain(OP, **inputs(torch.float32))
    table({"3x3x3": Fastest("reference", ROW)})
    assert explain(OP, **inputs(torch.float32)) == plain
    assert chosen(inputs(torch.float32)) == "cpu"
    table({"3x3x3": Fastest("triton", ROW)})  # which does not run here
    assert chosen(inputs()) != "triton"
    monkeypatch.setattr(_dispatch, "architecture", lambda device: "sm_100")
    table({"3x3x3": Fastest("reference", ROW)})
    assert chosen(inputs()) != "reference"


def test_no_warning_where_the_reference_is_the_fastest(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_warned", set())
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        call = {name: torch.empty_like(tensor, device="cuda") for name, tensor in inputs().items()}
        table({"3x3x3": Fastest("reference", ROW)})
        assert chosen(call) == "reference"
        table({})
        with pytest.raises(UserWarning, match="runs on the PyTorch reference for a CUDA tensor"):
            chosen(call)


@needs_native
def test_it_compiles(table: Any) -> None:
    table({"3x3x3": Fastest("reference", ROW)})
    compiled = torch.compile(causal_conv3d, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs()), causal_conv3d(**inputs()))


def test_architectures() -> None:
    assert _defaults.architecture(torch.device("cpu")) == "none"
    expected = "none"
    if torch.cuda.is_available() and torch.version.hip is None:
        expected = "sm_{}{}".format(*torch.cuda.get_device_capability(0))
    assert _defaults.architecture(torch.device("cuda", 0)) == expected


def rows() -> Iterator[tuple[str, str, Fastest]]:
    for op in _dispatch.ops():
        defaults = _dispatch.op(op).defaults
        for table in defaults.fastest.values() if defaults is not None else ():
            for kind, row in table.items():
                yield op, kind, row


def test_tables_name_backends_and_rows_that_there_are() -> None:
    found = list(rows())
    assert {OP, "adaln_modulate", "video_norm", "window_attention"} <= {op for op, _, _ in found}
    for op, kind, row in found:
        at = _dispatch.op(op)
        assert row.backend in {backend.name for backend in at.backends}, kind
        if re.search(r": \d+(\.\d+)? ms( against \d+(\.\d+)? of \w+)?, on an \w+$", row.row):
            continue  # figures of an experiment, docs/gpu.md
        file, case = row.row.split(": ", 1)
        folder = at.function.__module__.split(".")[-2]
        assert case in {c.name for c in importlib.import_module(f"benchmarks.{folder}").GPU_CASES}
        results = ROOT / "benchmarks" / "results" / file
        if results.exists():
            assert case in {row["case"] for row in json.loads(results.read_text())["rows"]}, kind


def classify(op: str, *args: Any, **options: Any) -> str | None:
    defaults = _dispatch.op(op).defaults
    assert defaults is not None
    return defaults.classify(**_dispatch.prepare(op, *args, **options))


@pytest.mark.parametrize(
    ("channels", "out_channels", "options", "kind", "contiguous"),
    [
        (128, 128, {}, "3x3x3", "3x3x3, contiguous"),
        (512, 256, {}, "3x3x3", "3x3x3, contiguous"),
        (128, 128, {"history": True}, "3x3x3", None),
        (3, 128, {}, "from few channels", None),
        (128, 3, {}, "to few channels", None),
        (128, 128, {"stride": 2}, "strided", None),
        (128, 128, {"stride": 2, "dtype": torch.float32}, "strided, float32", None),
        (128, 256, {"kernel": 1}, None, None),
        (20, 128, {}, None, None),
        (128, 128, {"dilation": 2}, None, None),
        (128, 128, {"space_padding": "reflect"}, None, None),
        (128, 128, {"dtype": torch.float32}, None, None),
        (3, 128, {"dtype": torch.float32}, None, None),
        (128, 128, {"dtype": torch.float64}, None, None),
    ],
)
def test_classes_of_convolutions(
    channels: int, out_channels: int, options: dict[str, Any], kind: str | None, contiguous: str | None
) -> None:
    options = dict(options)
    dtype, kernel = options.pop("dtype", torch.bfloat16), options.pop("kernel", 3)
    x = torch.zeros(1, channels, 2, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.zeros(out_channels, channels, kernel, kernel, kernel, dtype=dtype)
    if options.pop("history", False):
        options["history"] = x
    assert classify(OP, x, weight, **options) == kind
    assert classify(OP, x.contiguous(), weight, **options) == contiguous
    assert classify(OP, x.contiguous()[:, :, :1], weight, **options) is None


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"window": (2, 4, 8)}, "plain"),
        ({"window": (2, 4, 8), "bias_table": (2, 3, 7, 15)}, "with bias, norm or context"),
        ({"window": (2, 4, 8), "image": True}, "with images"),
        ({"window": (1, 4, 8)}, None),
        ({"window": (2, 4, 8), "dtype": torch.float32}, None),
    ],
)
def test_classes_of_attention(options: dict[str, Any], kind: str | None) -> None:
    options = dict(options)
    dtype = options.pop("dtype", torch.bfloat16)
    q = torch.zeros(1, 2, 4, 8, 2, 16, dtype=dtype)
    if "bias_table" in options:
        options["bias_table"] = torch.zeros(options["bias_table"], dtype=dtype)
    if options.get("image"):
        options["image"] = torch.ones(1, dtype=torch.bool)
    assert classify("window_attention", q, q, q, **options) == kind
