"""Repeated calls of the Triton kernels: bit for bit what the backends' Python computes, wherever the tensors lie."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from on_gpu import DEVICE, marks
from torch import Tensor

import walt_kernels as wk
from walt_kernels import _dispatch, _plans, _triton
from walt_kernels.testing import random, sample_call

pytestmark = marks()
TOKENS, ROWS = (2, 6, 20), (2, 20)
CALLS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "adaln_lora": ({"cond": (2, 16), "base": (2, 40), "down": (3, 2, 16), "up": (3, 40, 2)}, {}),
    "adaln_modulate": ({"x": TOKENS, "shift": ROWS, "scale": ROWS}, {}),
    "adaln_residual": ({"x": TOKENS, "branch": TOKENS, "gate": ROWS}, {}),
    "adaln_residual_modulate": ({"x": TOKENS, "branch": TOKENS, "gate": ROWS, "shift": ROWS, "scale": ROWS}, {}),
    "causal_conv3d": ({"x": (1, 3, 2, 4, 5), "weight": (4, 3, 3, 3, 3), "bias": (4,)}, {}),
    "video_norm": ({"x": (1, 8, 2, 3, 3), "weight": (8,), "bias": (8,)}, {"groups": 2, "activation": "silu"}),
    "window_attention": (
        {**dict.fromkeys("qkv", (1, 2, 2, 2, 1, 16)), "bias_table": (1, 3, 3, 3), "q_norm": (16,), "k_norm": (16,)},
        {"window": (2, 2, 2)},
    ),
}
OPS = _dispatch.ops()
needs_gpu = pytest.mark.skipif(_triton.INTERPRET, reason="needs a GPU")


@pytest.fixture(autouse=True)
def planned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The interpreter, too, repeats plans here."""
    monkeypatch.setattr(_plans, "enabled", True)
    _plans.forget()
    yield
    _plans.forget()


def call_of(op: str, seed: int, ahead: int = 0) -> dict[str, Any]:
    """A small call; its tensors begin so many elements behind a multiple of 16 bytes."""
    shapes, options = CALLS[op]
    inputs = dict(options)
    for name, shape in shapes.items():
        values = random(*shape, seed=seed).detach()
        memory = torch.empty(ahead + values.numel(), device=DEVICE)[ahead:]
        inputs[name] = memory.view(shape).copy_(values).requires_grad_()
    return inputs


def results(op: str, inputs: dict[str, Any]) -> list[Tensor]:
    leaves = [value for value in inputs.values() if isinstance(value, Tensor)]
    with wk.use_backend("triton"):
        made = _dispatch.op(op).function(**inputs)
        outputs = made if isinstance(made, tuple) else (made,)
        cotangents = [torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape) for out in outputs]
        return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, cotangents)]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def plans(op: str) -> list[Any]:
    chosen = _dispatch.backend(op, "triton")
    return [*chosen.forward.plans.values(), *chosen.backward.plans.values()]


@pytest.mark.parametrize("op", OPS)
def test_other_values_in_other_memory(op: str) -> None:
    first, second = call_of(op, 1), call_of(op, 2)
    with _plans.none():
        expected = [results(op, inputs) for inputs in (first, second)]
    assert plans(op) == []
    assert equal(results(op, first), expected[0])
    made = plans(op)
    assert len(made) >= 2
    assert None not in made
    assert equal(results(op, second), expected[1])
    assert equal(results(op, first), expected[0])
    assert plans(op) == made


@pytest.mark.parametrize("op", OPS)
def test_tensors_that_are_not_aligned(op: str) -> None:
    aligned, odd = call_of(op, 1), call_of(op, 1, ahead=1)
    with _plans.none():
        expected = results(op, odd)
    results(op, aligned)
    count = len(plans(op))
    assert equal(results(op, odd), expected)
    assert equal(results(op, odd), expected)
    assert len(plans(op)) > count


def test_views_of_one_tensor_and_tensors_of_their_own() -> None:
    shape = (1, 2, 2, 2, 2, 16)
    q, k, v = (random(*shape, seed=i).detach().to(DEVICE) for i in range(3))
    with _plans.none():
        expected = results("window_attention", leaves(q, k, v))
    for _ in range(2):
        packed = torch.empty(*shape[:4], 3, *shape[4:], device=DEVICE)
        views = list(packed.unbind(4))
        for view, values in zip(views, (q, k, v), strict=True):
            view.copy_(values)
        apart = [torch.empty(packed.numel(), device=DEVICE).as_strided(shape, view.stride()) for view in views]
        for view, values in zip(apart, (q, k, v), strict=True):
            view.copy_(values)
        for tensors in (views, apart):  # of the same strides
            assert equal(results("window_attention", leaves(*tensors)), expected)
    same = leaves(q, q, q)
    with _plans.none():
        expected = results("window_attention", same)
    assert equal(results("window_attention", same), expected)


def leaves(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    return {**{n: x.detach().requires_grad_() for n, x in (("q", q), ("k", k), ("v", v))}, "window": (2, 2, 2)}


@needs_gpu
def test_threads() -> None:
    op = "adaln_residual_modulate"
    calls = [call_of(op, seed) for seed in range(4)]
    with _plans.none():
        expected = [results(op, inputs) for inputs in calls]
    right: list[bool] = []

    def work(number: int) -> None:
        for _ in range(2):
            right.append(equal(results(op, calls[number]), expected[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 8


@needs_gpu
@pytest.mark.parametrize("op", OPS)
def test_a_repeated_call_in_a_cuda_graph_and_on_a_stream(op: str) -> None:
    inputs = call_of(op, 1)
    expected = results(op, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert equal(results(op, inputs), expected)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(op, inputs)
    graph.replay()
    assert equal(captured, expected)


@needs_gpu
def test_sixteen_bits() -> None:
    for op in OPS:
        inputs = sample_call(op, DEVICE, torch.bfloat16)
        inputs = {n: x.requires_grad_() if isinstance(x, Tensor) else x for n, x in inputs.items()}
        with _plans.none():
            expected = results(op, inputs)
        for _ in range(3):
            assert equal(results(op, inputs), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_need_not_be_the_current_one() -> None:
    here, there = call_of("adaln_modulate", 1), call_of("adaln_modulate", 1)
    there = {n: x.detach().to("cuda:1").requires_grad_() if isinstance(x, Tensor) else x for n, x in there.items()}
    with wk.use_backend("triton"):
        for _ in range(2):
            first, second = wk.adaln_modulate(**here), wk.adaln_modulate(**there)
            assert second.device.index == 1
            assert torch.equal(first.cpu(), second.cpu())
