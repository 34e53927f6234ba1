"""The CUDA kernels of the adaln ops: their own sources, compiled for the CPU by csrc/common/emulate.h; and on a GPU.

The emulation runs every thread and every barrier, in an order that changes from launch to launch, and traps on
misaligned vectors and on undefined arithmetic. It does not show what a GPU's compiler and memory do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_adaln_lora as cpu
import torch
from torch import Tensor

import walt_kernels as wk
from walt_kernels import _dispatch, _native, testing
from walt_kernels.adaln_lora import cuda, reference

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROCESSORS = 3  # of the emulated GPU: few, so that runs are long and rows are shared

# B, N, D, F. Rows of one warp and of several; with vectors and without; longer than registers hold in either pass;
# runs that end inside rows, at their ends, and that hold many rows.
SHAPES = (
    (1, 1, 1, 1),
    (2, 6, 7, 3),
    (2, 60, 16, 5),
    (3, 35, 40, 7),
    (2, 96, 24, 96),
    (1, 200, 72, 2),
    (1, 9, 300, 3),
    (2, 5, 1152, 1),
    (1, 6, 2051, 2),
    (1, 5, 2560, 5),
    (1, 2, 10248, 1),
)


def compile_emulation(folder: Path) -> Path:
    """The kernels and their Python names as a module for the CPU."""
    pybind11 = pytest.importorskip("pybind11")
    sanitize = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    if os.environ.get("WALT_KERNELS_SANITIZE") == "1":
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
    flags = ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *sanitize]
    flags += [f"-I{path}" for path in (ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))]
    flags += ["-DWALT_EMULATE_CUDA", "-DWALT_ISA=isa_emulated"]
    compiler = os.environ.get("CXX", "c++").split()
    sources = [ROOT / "csrc" / "cuda_module.cpp", *sorted((ROOT / "csrc" / "adaln_lora").glob("cuda_*.c*"))]
    objects = [folder / f"{source.stem}.o" for source in sources]
    running = [
        subprocess.Popen([*compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(target)], stderr=subprocess.PIPE)
        for source, target in zip(sources, objects, strict=True)
    ]
    for process in running:
        _, errors = process.communicate()
        assert (process.returncode, errors) == (0, b""), errors.decode()
    module = folder / "_emulated.so"
    subprocess.run([*compiler, "-shared", *sanitize, *map(str, objects), "-o", str(module)], check=True)
    return module


def views(**tensors: Tensor) -> dict[str, Any]:
    return {name: _native.view(tensor) for name, tensor in tensors.items()}


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if _native.C is None:
        pytest.skip(f"native kernels: {_native.reason}")  # the views come from there
    spec = importlib.util.spec_from_file_location("_emulated", compile_emulation(tmp_path_factory.mktemp("emulated")))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def emulated(module: Any) -> Iterator[None]:
    """The backend "cuda" of the adaln ops takes CPU tensors and runs them on the emulation."""

    @contextlib.contextmanager
    def running_on(device: torch.device) -> Iterator[tuple[int, int]]:
        yield 0, PROCESSORS

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "C", module)
        patch.setattr(cuda, "_running_on", running_on)
        for name, op in list(_dispatch._ops.items()):
            free = [
                dataclasses.replace(b, unsupported=lambda **_: None) if b.name == "cuda" else b for b in op.backends
            ]
            patch.setitem(_dispatch._ops, name, op._replace(backends=tuple(free)))
        with wk.use_backend("cuda"):
            yield


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "emulated":
        with emulated(request.getfixturevalue("emulation")):
            yield "cpu"
        return
    if not torch.cuda.is_available() or torch.version.hip is not None:
        pytest.skip("no NVIDIA GPU")
    reason = _native.cuda_unsupported(x=torch.empty(0, device="cuda"))
    if reason is not None:
        pytest.skip(reason)
    with wk.use_backend("cuda"):
        yield "cuda"


def on(device: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors on the device, with their strides and with what lies around them."""
    if device == "cpu":
        return inputs
    moved = {}
    for name, tensor in inputs.items():
        storage = torch.empty(0, dtype=tensor.dtype, device=device).set_(tensor.untyped_storage().to(device=device))
        view = storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        moved[name] = view.requires_grad_(tensor.requires_grad)
    return moved


@pytest.mark.parametrize("name", cpu.MODULATED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(name: str, dtype: torch.dtype, device: str) -> None:
    for shape in SHAPES:
        for form in ("sample", "frame"):
            if shape[2] < 2000 or form == "frame":
                cpu.check(name, on(device, cpu.inputs_of(name, shape, dtype, form=form)), shape[1])


@pytest.mark.parametrize("name", cpu.MODULATED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_modulation_of_16_bit_tokens(name: str, dtype: torch.dtype, device: str) -> None:
    for D in (37, 40):
        for form in ("sample", "frame_chunk", "permuted"):
            inputs = cpu.inputs_of(name, (2, 30, D, 5), dtype, form=form, rows_dtype=torch.float32)
            cpu.check(name, on(device, inputs), 30)


@pytest.mark.parametrize("name", cpu.MODULATED)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(name: str, layout: str, device: str) -> None:
    """Slices begin and step at addresses that no vector may be read from; NaN lies around them."""
    for dtype in (torch.float32, torch.bfloat16):
        for form in ("frame", "frame_chunk"):
            inputs = on(device, cpu.inputs_of(name, (2, 12, 24, 3), dtype, layout=layout, form=form))
            cpu.check(name, inputs, 12)


def test_vectors_of_strided_rows(device: str) -> None:
    """Rows that are aligned but not dense: vectors are read from them, and nothing beyond their ends."""
    for dtype in DTYPES:
        inputs = cpu.inputs_of("adaln_residual_modulate", (2, 12, 24, 3), dtype)
        for name in ("x", "branch"):
            wide = torch.full((2, 12, 40), torch.nan, dtype=dtype)
            wide[..., 8:32] = inputs[name].detach()
            inputs[name] = wide[..., 8:32].requires_grad_()
        cpu.check("adaln_residual_modulate", on(device, inputs), 12)


def test_rows_per_frame_may_differ_between_tensors(device: str) -> None:
    for F in ((1, 4, 12), (12, 1, 3), (6, 12, 1)):
        inputs = cpu.inputs_of("adaln_residual_modulate", (3, 12, 16, 3), torch.float32)
        for i, name in enumerate(("gate", "shift", "scale")):
            inputs[name] = testing.random(3, F[i], 16, seed=20 + i)
        inputs["x"] = testing.random(1, 12, 16).detach().expand(3, 12, 16).requires_grad_()
        cpu.check("adaln_residual_modulate", on(device, inputs), 12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_mean(dtype: torch.dtype, device: str) -> None:
    for D in (96, 97):
        inputs = cpu.inputs_of("adaln_residual_modulate", (2, 20, D, 5), dtype)
        inputs["x"] = (inputs["x"].detach() + 100).requires_grad_()
        cpu.check("adaln_residual_modulate", on(device, inputs), 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_gate_is_the_residual_bitwise(dtype: torch.dtype, device: str) -> None:
    inputs = cpu.inputs_of("adaln_residual_modulate", (2, 8, 40, 4), dtype)
    inputs = on(device, inputs | {"gate": torch.zeros_like(inputs["gate"])})
    x_new, h = wk.adaln_residual_modulate(**inputs)
    assert torch.equal(x_new, inputs["x"])
    assert torch.equal(h, wk.adaln_modulate(inputs["x"], inputs["shift"], inputs["scale"]))
    assert torch.equal(wk.adaln_residual(inputs["x"], inputs["branch"], inputs["gate"]), inputs["x"])


@pytest.mark.parametrize("used", ["x_new", "h"])
def test_gradient_through_one_output(used: str, device: str) -> None:
    index = ("x_new", "h").index(used)
    inputs = on(device, cpu.inputs_of("adaln_residual_modulate", (2, 12, 24, 3), torch.float32))
    if used == "x_new":
        inputs |= {name: inputs[name].detach() for name in ("shift", "scale")}
    testing.check_op(
        lambda **kw: wk.adaln_residual_modulate(**kw)[index],
        lambda **kw: reference.adaln_residual_modulate(**kw)[index],
        inputs,
        rows=12,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_matches_reference(dtype: torch.dtype, device: str) -> None:
    shapes = (
        (1, 1, 1, 1, 1),
        (24, 1, 64, 384, 2),
        (2, 3, 8, 300, 3),
        (1, 4, 33, 70, 15),
        (2, 11, 40, 50, 40),  # samples and ranks of two groups
        (1, 70, 9, 20, 2),  # samples, and below layers, of two tiles
        (70, 1, 8, 16, 2),
        (2, 2, 24, 2100, 8),  # chunks of K
    )
    for shape in shapes:
        layers, _, D, K, r = shape
        inputs = on(device, cpu.lora_inputs(*shape, dtype))
        testing.check_op(wk.adaln_lora, reference.adaln_lora, inputs, backward=False, rows=D + r)
        testing.check_op(wk.adaln_lora, reference.adaln_lora, inputs, rows=K + layers * r)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [2, 32])
def test_zero_lora_is_the_base_bitwise(dtype: torch.dtype, r: int, device: str) -> None:
    inputs = cpu.lora_inputs(3, 2, 24, 50, r, dtype)
    inputs = on(device, inputs | {"up": torch.zeros_like(inputs["up"])})
    assert torch.equal(wk.adaln_lora(**inputs), inputs["base"].expand(3, 2, 50))


@pytest.mark.parametrize("name", [*cpu.MODULATED, "adaln_lora"])
def test_bit_identical_over_runs(name: str, device: str) -> None:
    if name == "adaln_lora":
        cases = [cpu.lora_inputs(2, 2, 40, 1100, r, torch.float32) for r in (2, 17)]
    else:
        cases = [cpu.inputs_of(name, (2, 70, D, 5), torch.bfloat16) for D in (96, 520)]
    for inputs in (on(device, case) for case in cases):
        first = run(name, inputs)
        for _ in range(10):
            assert all(torch.equal(a, b) for a, b in zip(first, run(name, inputs), strict=True))


def run(name: str, inputs: dict[str, Tensor]) -> list[Tensor]:
    leaves = {n: testing.leaf(v) for n, v in inputs.items()}
    outputs = getattr(wk, name)(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.linspace(-1, 1, o.numel(), device=o.device).reshape(o.shape).to(o.dtype) for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, list(leaves.values()), grads)]


def test_opcheck(device: str) -> None:
    inputs = on(device, cpu.inputs_of("adaln_residual_modulate", (2, 6, 8, 3), torch.float32, form="frame_chunk"))
    torch.library.opcheck(torch.ops.walt_kernels.adaln_residual_modulate.default, (*inputs.values(), 1e-6, "cuda"))
    inputs = on(device, cpu.lora_inputs(2, 2, 3, 5, 2, torch.float32))
    torch.library.opcheck(torch.ops.walt_kernels.adaln_lora.default, (*inputs.values(), "cuda"))


@pytest.mark.parametrize("name", cpu.MODULATED)
def test_nothing_to_do(name: str, device: str) -> None:
    """No samples: no results. No tokens: the modulation's gradients are zero."""
    for B, N in ((0, 4), (2, 0)):
        results = run(name, on(device, cpu.inputs_of(name, (B, N, 16, 2), torch.float32)))
        assert all((result == 0).all() for result in results)


def test_workspace_does_not_grow_with_the_number_of_tokens(emulation: Any) -> None:
    def size(B: int, N: int, D: int, F: int) -> int:
        x, rows, statistics = torch.empty(B, N, D), torch.empty(B, F, D), torch.empty(B, N)
        tensors = {
            "grad_h": x,
            "x": x,
            "branch": x,
            "gate": rows,
            "scale": rows,
            "mean": statistics,
            "rstd": statistics,
        }
        grads = {"grad_x": x, "grad_branch": x, "grad_gate": rows, "grad_shift": rows, "grad_scale": rows}
        return emulation.cuda_adaln_backward_workspace(132, **views(**tensors, **grads))

    assert size(1, 40000, 32, 1) == size(2, 40000, 32, 5000) > 0
    assert size(1, 40000, 32, 1) <= 132 * 12 * 6 * 32 * 4  # 12 blocks on each, two rows for each of three sums


def test_calls_that_do_not_fit_are_refused(emulation: Any) -> None:
    x, row = torch.zeros(1, 4, 8), torch.zeros(1, 1, 8)
    call = emulation.CudaCall(stream=0, processors=3, workspace=0, workspace_bytes=0)
    tensors = views(grad_x_new=x, branch=x, gate=row, grad_branch=x, grad_gate=row)
    with pytest.raises(TypeError, match="cuda_adaln_backward: unknown argument grad"):
        emulation.cuda_adaln_backward(call, **tensors, grad=None)
    with pytest.raises(TypeError, match="cuda_adaln_forward: x is missing"):
        emulation.cuda_adaln_forward(call, eps=1e-6, x=None)
    with pytest.raises(ValueError, match="the workspace is too small"):
        emulation.cuda_adaln_backward(call, **tensors)
    double = views(x=x.double(), branch=x.double(), gate=row.double(), x_new=x.double())
    with pytest.raises(ValueError, match="no CUDA kernel for dtype float64"):
        emulation.cuda_adaln_forward(call, **double, eps=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*cpu.MODULATED, "adaln_lora"])
def test_calls_do_not_wait_for_the_gpu(name: str) -> None:
    if not torch.cuda.is_available() or _native.cuda_unsupported(x=torch.empty(0, device="cuda")) is not None:
        pytest.skip("no NVIDIA GPU that the CUDA kernels were built for")
    inputs = (
        cpu.lora_inputs(2, 2, 64, 384, 2, torch.float32)
        if name == "adaln_lora"
        else cpu.inputs_of(name, (2, 40, 64, 5), torch.bfloat16)
    )
    inputs = on("cuda", inputs)
    with wk.use_backend("cuda"):
        run(name, inputs)
        stream = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        leaves = [testing.leaf(v) for v in inputs.values()]
        with torch.cuda.graph(graph, stream=stream):  # capture fails on anything that waits
            outputs = getattr(wk, name)(*leaves)
            first = outputs[0] if isinstance(outputs, tuple) else outputs
            grads = torch.autograd.grad(first.sum(), leaves[:1])
        graph.replay()
        torch.cuda.synchronize()
    assert all(torch.isfinite(result).all() for result in (first, *grads))
