"""Ahead-of-time compilation: what it must find wrong, that it sees every tile, that its types are those of a launch."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from walt_kernels import _triton

if _triton.reason is not None:
    pytest.skip(str(_triton.reason), allow_module_level=True)
if _triton.INTERPRET:
    pytest.skip("kernels are interpreted, not compiled, under TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from walt_kernels import _aot, _warm
from walt_kernels._triton import TARGETS, Launch, Tile

OPS = _aot.folders_with_calls()


@triton.jit
def product_kernel(a, b, c, rows, stride, eps, SIZE: tl.constexpr, TWICE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * stride + i[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32) + eps
    for first in range(0, rows, SIZE):
        total = tl.dot(tl.load(a + at + first), tl.load(b + at + first * stride), total)
    if TWICE:
        total *= 2
    tl.store(c + at, total)


def kernel(architecture: str, size: int = 64, dtype: torch.dtype = torch.bfloat16, **options: Any) -> _aot.Kernel:
    x, out = torch.empty(256, 256, dtype=dtype), torch.empty(256, 256)
    arguments = {"a": x, "b": x, "c": out, "rows": 256, "stride": 256, "eps": 1e-6, "SIZE": size, "TWICE": True}
    return _aot.specialise(Launch(product_kernel, arguments, Tile({}, **options)), "a call", architecture, {})


@pytest.mark.parametrize("architecture", TARGETS)
def test_products_are_on_tensor_cores(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = _aot.compile_kernel(kernel(architecture))
    assert used.problem is None
    assert used.registers > 16
    assert used.products
    monkeypatch.setitem(_aot.TENSOR_CORES, architecture, "no_such_instruction")
    assert _aot.compile_kernel(kernel(architecture)).problem == "its products are not on tensor cores"


def test_float32_products_that_lose_digits_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = kernel("sm_90", dtype=torch.float32)  # asks for nothing: Triton takes tf32
    assert _aot.compile_kernel(wide).problem is None
    monkeypatch.setattr(_aot, "_full_precision", lambda ttir: True)
    assert _aot.compile_kernel(wide).problem == "its float32 products were made tf32 ones"


def test_full_precision_is_read_from_the_operands_and_the_attribute() -> None:
    types = "tensor<64x64xf32> * tensor<64x64xf32> -> tensor<64x64xf32>"
    tf32 = f"%5 = tt.dot %3, %4, %2, inputPrecision = tf32 : {types}"
    assert not _aot._full_precision(tf32)
    assert _aot._full_precision(f"{tf32}\n%6 = tt.dot %3, %4, %5 : {types}")
    assert not _aot._full_precision(f"%6 = tt.dot %3, %4, %5 : {types.replace('xf32> *', 'xbf16> *')}")


def test_spills_fail_beyond_their_budget() -> None:
    wide = kernel("sm_80", size=128, warps=1)
    used = _aot.compile_kernel(wide)
    assert used.spilled > 0
    assert used.problem == f"spills {used.spilled} bytes, budget 0"
    budget = _aot.Kernel(**{**wide.__dict__, "spill_budget": used.spilled})
    assert _aot.compile_kernel(budget).problem is None


def test_shared_memory_beyond_the_targets_fails() -> None:
    used = _aot.compile_kernel(kernel("sm_80", size=128, warps=8, stages=5))
    assert used.shared > TARGETS["sm_80"].shared_bytes
    assert used.problem == f"needs {used.shared} bytes of shared memory of {99 << 10}"


@triton.jit
def boxes_kernel(a, b, c, steps, DIMENSIONS: tl.constexpr):
    total = tl.zeros((64, 64), tl.float32)
    for step in range(0, steps):
        left = a.load([0, 0, step * 64]).reshape(64, 64)
        right = b.load([0, 0, step * 64]).reshape(64, 64) if DIMENSIONS == 3 else b.load([0, step * 64])
        total = tl.dot(left, right.trans(), total)
    i = tl.arange(0, 64)
    tl.store(c + i[:, None] * 64 + i[None, :], total)


@triton.jit
def flags_kernel(a, b, flags, c, steps, FORM: tl.constexpr, STAGES: tl.constexpr):
    i = tl.arange(0, 64)
    at = i[:, None] * 64 + i[None, :]
    total = tl.zeros((64, 64), tl.float32)
    first = tl.load(flags + i)
    for step in tl.range(0, steps, num_stages=STAGES):
        flag = tl.load(flags + step * 64 + i) if FORM != "before" else first
        x = tl.load(a + step * 4096 + at, mask=flag[:, None] != 0, other=0.0)
        y = tl.load(b + step * 4096 + at)
        total = tl.dot(x, tl.where(flag[None, :] != 0, y, 0.0), total)
        if FORM == "counted":
            total += flag[:, None]
    tl.store(c + at, total)


def boxes(dimensions: int, stages: int) -> _aot.Kernel:
    from triton.tools.tensor_descriptor import TensorDescriptor

    x = torch.empty(8, 8, 256, dtype=torch.bfloat16)
    deep = TensorDescriptor.from_tensor(x, [8, 8, 64])
    flat = TensorDescriptor.from_tensor(x.view(64, 256), [64, 64])
    b = deep if dimensions == 3 else flat
    arguments = {"a": deep, "b": b, "c": torch.empty(64, 64), "steps": 4, "DIMENSIONS": dimensions}
    return _aot.specialise(Launch(boxes_kernel, arguments, Tile({}, stages=stages)), "a call", "sm_90", {})


@pytest.mark.parametrize(("dimensions", "stages", "racing"), [(3, 3, True), (3, 4, True), (3, 2, False), (2, 4, False)])
def test_two_reshaped_boxes_in_a_product_of_many_stages_fail(dimensions: int, stages: int, racing: bool) -> None:
    problem = f"both operands of a product are reshaped boxes of more than two dimensions, {stages} stages"
    assert _aot.compile_kernel(boxes(dimensions, stages)).problem == (problem if racing else None)


@pytest.mark.parametrize(
    ("form", "own", "stages", "wrong"),
    [
        ("inside", None, 2, True),
        ("inside", None, 1, False),
        ("inside", 1, 3, False),
        ("inside", 2, 1, True),
        ("before", None, 2, False),
        ("counted", None, 2, False),
    ],
)
def test_a_load_for_masks_alone_in_a_loop_that_prefetches_fails(
    form: str, own: int | None, stages: int, wrong: bool
) -> None:
    x, flags = torch.empty(4, 64, 64, dtype=torch.bfloat16), torch.empty(4, 64, dtype=torch.uint8)
    arguments = {"a": x, "b": x, "flags": flags, "c": torch.empty(64, 64), "steps": 4, "FORM": form, "STAGES": own}
    launch = Launch(flags_kernel, arguments, Tile({}, stages=stages))
    problem = _aot.compile_kernel(_aot.specialise(launch, "a call", "sm_90", {})).problem
    assert (problem is not None) == wrong
    assert problem is None or problem.startswith(f"a load in a loop of {own or stages} stages feeds masks only: %flag")


def test_what_does_not_compile_is_a_line_of_the_table() -> None:
    assert str(_aot.compile_kernel(kernel("sm_80", size=48)).problem).startswith("does not compile: ")


def test_types_are_those_of_a_launch() -> None:
    special = kernel("sm_90")
    assert dict(special.signature) == {
        **{"a": "*bf16", "b": "*bf16", "c": "*fp32", "rows": "i32", "stride": "i32", "eps": "fp32"},
        **{"SIZE": "constexpr", "TWICE": "constexpr"},
    }
    assert dict(special.constants) == {("SIZE",): 64, ("TWICE",): True}
    assert special.divisible == (("a",), ("b",), ("c",), ("rows",), ("stride",))
    arguments = {"a": None, "b": None, "c": None, "rows": 1, "stride": 2**31, "eps": 0.5, "SIZE": 64, "TWICE": False}
    special = _aot.specialise(Launch(product_kernel, arguments, Tile({})), "a call", "sm_90", {})
    assert dict(special.constants) == {
        ("a",): None,
        ("b",): None,
        ("c",): None,
        ("rows",): 1,
        ("SIZE",): 64,
        ("TWICE",): False,
    }
    assert dict(special.signature)["stride"] == "i64"


@pytest.mark.parametrize("op", OPS)
def test_tensors_strides_and_sizes_are_known_as_in_a_launch(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's launcher: items of tuples, kernels without alignment."""
    hopper = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(driver, "_active", hopper)
    for call in importlib.import_module(f"walt_kernels.{op}.triton_aot").aot_calls():
        with _triton.record(TARGETS["sm_90"]) as launches:
            call.run()
        for launch in launches:
            noted = _warm.Collected()
            launch.kernel.device_caches.clear()
            noted.append(launch)
            launch.kernel.device_caches.clear()
            special, names = _aot.specialise(launch, call.name, "sm_90", {}), launch.kernel.arg_names
            (kernel,) = noted.kernels
            divisible = {path for path, attributes in kernel.attributes.items() if attributes}
            assert {(names.index(name), *rest) for (name, *rest) in special.divisible} == divisible, call.name
            constants = {(names.index(name), *rest): value for (name, *rest), value in special.constants}
            assert constants == kernel.constants, call.name


@pytest.mark.parametrize("op", OPS)
def test_calls_reach_every_entry_of_the_tile_tables(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = importlib.import_module(f"walt_kernels.{op}.triton_tiles")
    tables = {name: table for name, table in vars(tiles).items() if name.isupper() and isinstance(table, Mapping)}
    entries = {
        (name, key, architecture) for name, table in tables.items() for key in table for architecture in table[key]
    }
    reached = set()
    pick = _triton.pick

    def watched(table: Any, key: Any, device: Any, trial: Any = None) -> Tile:
        name = next(name for name, known in tables.items() if known is table)
        architecture = _triton.target(device).architecture
        reached.add((name, key, architecture if architecture in table[key] else "any"))
        return pick(table, key, device, trial)

    monkeypatch.setattr(_triton, "pick", watched)
    assert list(_aot.kernels(op, TARGETS))
    assert entries
    assert entries - reached == set()


def test_launches_of_a_call_that_differ_in_alignment_alone_are_compiled_once() -> None:
    found = [dataclasses.replace(kernel, divisible=()) for kernel in _aot.kernels("causal_conv3d", ["sm_80"])]
    assert len(found) == len(set(found))


@pytest.mark.parametrize("size", [(4, 6), (8, 8), (50, 42), (64, 64)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
@pytest.mark.parametrize("channels", [24, 32])
def test_an_image_and_a_video_are_normed_by_the_same_code(
    channels: int, layout: torch.memory_format, size: tuple[int, int]
) -> None:
    def alignment(frames: int) -> list[set[tuple[Any, ...]]]:
        x = torch.empty((1, channels, frames, *size), dtype=torch.bfloat16, device="meta").to(memory_format=layout)
        with _triton.record(TARGETS["sm_90"]) as launches:
            _aot.Call("a call", "video_norm", {"x": x, "groups": 4, "activation": "silu"}).run()
        kernels = [_aot.specialise(launch, "a call", "sm_90", {}) for launch in launches]
        return [{path for path in k.divisible if path[0].startswith(("x", "y", "grad"))} for k in kernels]

    assert alignment(1) == alignment(2) == alignment(16)
