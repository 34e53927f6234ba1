"""The choice of a backend: explain, use_backend, WALT_KERNELS_BACKEND, warnings; the thread pool shared with torch."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import found_ops
import pytest
import torch
from found_ops import OPS, WITH_KERNELS, backend_of, needs_native, with_gradients
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import walt_kernels as wk
from walt_kernels import _dispatch, _native
from walt_kernels.testing import sample_call


def call(op: str) -> Any:
    torch.manual_seed(0)
    return found_ops.call(op, **sample_call(op))


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def on_cuda(op: str) -> dict[str, Any]:
    """The sample call with CUDA tensors that have no memory; for use inside FakeTensorMode."""
    return {
        name: torch.empty_like(value, device="cuda") if isinstance(value, Tensor) else value
        for name, value in sample_call(op).items()
    }


@pytest.fixture
def backend_of_forward(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the names of the backends whose forward ran."""
    ran: list[str] = []
    for op in OPS:
        registered = _dispatch._ops[op]
        wrapped = []
        for backend in registered.backends:

            def forward(*args: Any, _inner: Any = backend.forward, _name: str = backend.name, **kwargs: Any) -> Any:
                ran.append(_name)
                return _inner(*args, **kwargs)

            wrapped.append(dataclasses.replace(backend, forward=forward))
        monkeypatch.setitem(_dispatch._ops, op, registered._replace(backends=tuple(wrapped)))
    return ran


@pytest.mark.parametrize("op", OPS)
def test_explain_lists_backends_in_order_of_preference(op: str) -> None:
    reasons = wk.explain(op, **sample_call(op))
    assert list(reasons) == sorted(reasons, key=_dispatch.BACKENDS.index)
    assert reasons["reference"] is None
    if _native.C is not None:
        assert next(name for name, reason in reasons.items() if reason is None) == backend_of(op)


@pytest.mark.parametrize("op", OPS)
def test_explain_on_cuda_tensors_without_a_gpu(op: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        reasons = wk.explain(op, **on_cuda(op))
    assert reasons["reference"] is None
    if _native.C is not None and op in WITH_KERNELS:
        assert "cuda:0" in str(reasons["cpu"])


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_what_explain_says_is_what_runs(op: str, backend_of_forward: list[str]) -> None:
    call(op)
    assert backend_of_forward == [backend_of(op)]
    assert _dispatch.forced() is None


@needs_native
@pytest.mark.parametrize("op", WITH_KERNELS)
def test_use_backend_forces_and_restores(op: str, backend_of_forward: list[str]) -> None:
    natural = first(call(op))
    backend_of_forward.clear()
    with wk.use_backend("reference"):
        forced = first(call(op))
        with wk.use_backend("cpu"):
            call(op)
        call(op)
    assert backend_of_forward == ["reference", "cpu", "reference"]
    torch.testing.assert_close(forced, natural, rtol=1e-4, atol=1e-4)
    with pytest.raises(KeyError), wk.use_backend("reference"):
        raise KeyError("an error inside the block")
    assert _dispatch.forced() is None


@needs_native
@pytest.mark.parametrize("op", WITH_KERNELS)
def test_backward_runs_where_forward_ran(op: str) -> None:
    """Leaving use_backend before backward does not move the backward pass."""
    inputs = with_gradients(sample_call(op))
    with wk.use_backend("cpu"):
        out = first(found_ops.call(op, **inputs))
    with wk.use_backend("reference"):
        out.sum().backward()
    assert next(iter(inputs.values())).grad is not None


@pytest.mark.parametrize("op", OPS)
def test_forced_backend_that_cannot_run_raises_its_reason(op: str) -> None:
    if _native.C is not None and op in WITH_KERNELS:
        with FakeTensorMode(allow_non_fake_inputs=True):
            inputs = on_cuda(op)
            reason = wk.explain(op, **inputs)["cpu"]
            expected = re.escape(f"{op}: backend 'cpu' was forced and cannot run: {reason}")
            with pytest.raises(RuntimeError, match=expected), wk.use_backend("cpu"):
                found_ops.call(op, **inputs)
    missing = next(name for name in _dispatch.BACKENDS if name not in {b.name for b in _dispatch._ops[op].backends})
    with pytest.raises(ValueError, match=f"{op} has no backend '{missing}'; it has "), wk.use_backend(missing):
        call(op)


def test_without_the_native_module_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "C", None)
    monkeypatch.setattr(_native, "reason", "the native module is not built")
    for op in WITH_KERNELS:
        assert wk.explain(op, **sample_call(op))["cpu"] == "the native module is not built"
        assert torch.isfinite(first(call(op))).all()
        with pytest.raises(RuntimeError, match="cannot run: the native module is not built"), wk.use_backend("cpu"):
            call(op)


def test_opt_in_backend_runs_only_when_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    op = "adaln_residual"
    registered = _dispatch._ops[op]
    others = [backend for backend in registered.backends if backend.name != "triton"]
    trial = _dispatch.Backend("triton", lambda **inputs: None, others[0].forward, opt_in="not yet run on a GPU")
    monkeypatch.setitem(_dispatch._ops, op, registered._replace(backends=(trial, *others)))
    inputs = _dispatch.prepare(op, **sample_call(op))
    assert wk.explain(op, **sample_call(op))["triton"] == "not yet run on a GPU"
    assert _dispatch.select(op, inputs) != "triton"
    with wk.use_backend("triton"):
        assert _dispatch.select(op, inputs) == "triton"


def test_unknown_names() -> None:
    names = ", ".join(_dispatch.BACKENDS)
    with pytest.raises(ValueError, match=f"name is 'gpu', expected one of {names}"):
        wk.use_backend("gpu").__enter__()
    with pytest.raises(ValueError, match=r"op is 'conv', expected one of .*adaln_lora"):
        wk.explain("conv")


@pytest.mark.parametrize("op", OPS)
def test_reference_for_a_cuda_tensor_warns_once(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_warned", set())
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = _dispatch.prepare(op, **on_cuda(op))
        why = ".*cpu: " if op in WITH_KERNELS else "it has no kernels"
        with pytest.warns(UserWarning, match=f"{op} runs on the PyTorch reference for a CUDA tensor \\({why}"):
            assert _dispatch.select(op, inputs) == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _dispatch.select(op, inputs)
    with warnings.catch_warnings():  # nor ever for a CPU tensor
        warnings.simplefilter("error")
        monkeypatch.setattr(_dispatch, "_warned", set())
        call(op)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(wk.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


ASK = """
import torch, walt_kernels as wk
from walt_kernels import _dispatch
x = torch.zeros(1, 2, 4)
print(_dispatch.select("adaln_residual", _dispatch.prepare("adaln_residual", x, x, x[:, 0])))
"""


@needs_native
def test_environment_variable_forces() -> None:
    done = run_python(ASK, WALT_KERNELS_BACKEND="reference")
    assert (done.returncode, done.stdout.strip()) == (0, "reference"), done.stderr


def test_environment_variable_with_an_unknown_name() -> None:
    done = run_python("import walt_kernels", WALT_KERNELS_BACKEND="gpu")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == (
        "ValueError: WALT_KERNELS_BACKEND is 'gpu', expected one of cuda, flash, triton, cudnn, onednn, cpu, reference"
    )


THREADS = """
import torch
from walt_kernels import _native
x = torch.randn(2, 640, 64)
import walt_kernels as wk
wk.adaln_residual(x, x, x[:, 0])
x @ x.mT
print(_native.C.openmp_library())
for line in open("/proc/self/maps"):
    if "gomp" in line or "libomp" in line or "iomp" in line:
        print(line.split()[-1])
"""


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_thread_pool_and_it_is_torchs() -> None:
    if not _native.C.build_info()["openmp"]:
        pytest.skip("built without OpenMP")
    done = run_python(THREADS)
    assert done.returncode == 0, done.stderr
    used, *loaded = (os.path.realpath(line) for line in done.stdout.split())
    folder = os.path.realpath(Path(torch.__file__).parent)
    # torch's own copy lies in torch/lib, or in torch.libs where its wheel was repaired
    assert used.startswith((folder + os.sep + "lib" + os.sep, folder + ".libs" + os.sep)), used
    assert set(loaded) == {used}


@needs_native
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("forward", "backward"), [("reference", "cpu"), ("cpu", "reference"), ("reference", None)])
def test_a_checkpoint_runs_again_on_the_backend_of_its_first_run(
    forward: str, backward: str | None, use_reentrant: bool, backend_of_forward: list[str]
) -> None:
    """Whatever is forced when backward is called, and in whatever thread it runs, as it does for a GPU."""
    module = wk.nn.WindowAttention(16, 2, (1, 2, 2))
    x = torch.randn(1, 2, 4, 4, 16, requires_grad=True)
    with wk.use_backend(forward):
        out = checkpoint(module, x, use_reentrant=use_reentrant)
    first_run = list(backend_of_forward)

    def run_backward() -> None:
        with wk.use_backend(backward) if backward else contextlib.nullcontext():
            out.sum().backward()

    thread = threading.Thread(target=run_backward)
    thread.start()
    thread.join()
    assert backend_of_forward == first_run * 2
    assert x.grad is not None


@needs_native
def test_a_checkpoint_keeps_the_default_too(backend_of_forward: list[str]) -> None:
    module = wk.nn.CausalConv3d(4, 4, 3)
    out = checkpoint(module, torch.randn(1, 4, 2, 4, 4, requires_grad=True), use_reentrant=False)
    with wk.use_backend("reference"):
        out.sum().backward()
    assert backend_of_forward == ["cpu", "cpu"]


@needs_native
def test_a_block_inside_of_a_checkpoint_has_the_last_word(backend_of_forward: list[str]) -> None:
    module = wk.nn.CausalConv3d(4, 4, 3)

    def layer(x: Tensor) -> Tensor:
        with wk.use_backend("cpu"):
            return module(x)

    with wk.use_backend("reference"):
        out = checkpoint(layer, torch.randn(1, 4, 2, 4, 4, requires_grad=True), use_reentrant=False)
    out.sum().backward()
    assert backend_of_forward == ["cpu", "cpu"]


@needs_native
def test_use_backend_is_the_threads(backend_of_forward: list[str]) -> None:
    forced, done = threading.Event(), threading.Event()

    def elsewhere() -> None:
        with wk.use_backend("reference"):
            forced.set()
            done.wait()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    forced.wait()
    call("causal_conv3d")
    done.set()
    thread.join()
    assert backend_of_forward == ["cpu"]


def compiled_graphs(function: Any) -> tuple[Any, list[list[str]]]:
    """The compiled function, and for each of its runs the backends of our ops in the graph that ran."""
    runs: list[list[str]] = []

    def keep(graph: Any, example: Any) -> Any:
        ops = [node for node in graph.graph.nodes if "walt_kernels" in str(node.target)]
        backends = [node.args[-1] for node in ops]

        def run(*args: Any) -> Any:
            runs.append(backends)
            return graph(*args)

        return run

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=keep), runs


@needs_native
def test_use_backend_holds_for_what_was_compiled_before() -> None:
    x, weight = torch.randn(1, 4, 3, 6, 6), torch.randn(6, 4, 3, 3, 3)
    compiled, runs = compiled_graphs(wk.causal_conv3d)

    def forced() -> None:
        with wk.use_backend("reference"):
            compiled(x, weight)

    thread = threading.Thread(target=forced)
    compiled(x, weight)  # in a thread that has seen no block yet
    forced()
    compiled(x, weight)
    thread.start()
    thread.join()
    compiled(x, weight)
    assert runs == [["cpu"], [], ["cpu"], [], ["cpu"]]  # the reference is PyTorch's own ops


@needs_native
def test_a_block_compiles() -> None:
    x, weight = torch.randn(1, 4, 3, 6, 6), torch.randn(6, 4, 3, 3, 3)

    def both(x: Tensor) -> Tensor:
        with wk.use_backend("reference"):
            y = wk.causal_conv3d(x, weight)
        return y + wk.causal_conv3d(x, weight)

    compiled, runs = compiled_graphs(both)
    torch.testing.assert_close(compiled(x), both(x))
    assert runs == [["cpu"]]
    assert _dispatch.forced() is None


def test_blocks_of_coroutines_leave_nothing_behind() -> None:
    """They are left in another order than they were entered in."""

    async def forced(name: str, enter: asyncio.Event, leave: asyncio.Event, entered: asyncio.Event) -> None:
        await enter.wait()
        with wk.use_backend(name):
            entered.set()
            await leave.wait()

    async def both() -> str | None:
        events = [asyncio.Event() for _ in range(6)]
        tasks = [asyncio.create_task(forced(n, *events[i : i + 3])) for n, i in (("reference", 0), ("cpu", 3))]
        for i in (0, 3):
            events[i].set()
            await events[i + 2].wait()
        events[1].set()  # the first one is left first
        await tasks[0]
        between = _dispatch.forced()
        events[4].set()
        await tasks[1]
        return between

    assert asyncio.run(both()) == "cpu"
    assert _dispatch.forced() is None


def test_a_block_that_is_left_in_another_thread() -> None:
    """As web frameworks leave what they entered."""
    threads = [ThreadPoolExecutor(1) for _ in range(2)]
    block = wk.use_backend("reference")
    threads[0].submit(block.__enter__).result()
    assert threads[0].submit(_dispatch.forced).result() == "reference"
    assert threads[1].submit(_dispatch.forced).result() is None
    threads[1].submit(block.__exit__, None, None, None).result()
    assert [thread.submit(_dispatch.forced).result() for thread in threads] == [None, None]
