"""Calls that go past PyTorch's dispatcher, and everything that must not miss a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import walt_kernels as wk
from walt_kernels import _define, _library

FORWARD = torch.ops.walt_kernels.adaln_residual.default
BACKWARD = torch.ops.walt_kernels.adaln_residual_backward.default


@pytest.fixture(autouse=True)
def kernels() -> Any:
    """A backend with kernels of its own: the reference is PyTorch's to differentiate."""
    x, gate = torch.ones(1, 2, 4), torch.ones(1, 4)
    if wk.explain("adaln_residual", x, x, gate)["cpu"] is not None:
        pytest.skip("the native module is not built")


def leaves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, 8), (2, 6, 8), (2, 8))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def step(inputs: list[Tensor]) -> list[Tensor]:
    out = wk.adaln_residual(*inputs)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What ``unwatched`` said of each call's forward and backward pass."""
    said: list[bool] = []
    asked = _library.unwatched
    monkeypatch.setattr(_define, "unwatched", lambda arguments: said.append(asked(arguments)) or said[-1])
    return said


def test_the_numbers_are_the_dispatchers(calls: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = leaves()
    past = step(inputs)
    assert calls == [True, True]
    monkeypatch.setattr(_define, "unwatched", lambda arguments: False)
    for a, b in zip(past, step(inputs), strict=True):
        assert torch.equal(a, b)


def test_without_a_gradient(calls: list[bool]) -> None:
    inputs = leaves()
    with torch.no_grad():
        out = wk.adaln_residual(*inputs)
    with torch.inference_mode():
        again = wk.adaln_residual(*inputs)
    plain = wk.adaln_residual(*[x.detach() for x in inputs])
    assert calls == [True] * 3
    assert not out.requires_grad
    assert not plain.requires_grad
    assert again.is_inference()
    assert torch.equal(out, plain)


def test_a_parameter_is_a_plain_tensor(calls: list[bool]) -> None:
    x, branch, gate = leaves()
    step([x, branch, torch.nn.Parameter(gate.detach())])
    assert calls == [True, True]


def test_modes_see_the_op() -> None:
    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Function(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    with Dispatch():
        step(leaves())
    assert {FORWARD, BACKWARD} < set(seen)
    seen.clear()
    with Function():
        wk.adaln_residual(*leaves())
    assert FORWARD in seen


def test_a_mode_around_the_backward_pass_alone_sees_it() -> None:
    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    inputs = leaves()
    out = wk.adaln_residual(*inputs)
    with Dispatch():
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert BACKWARD in seen


def test_subclasses_see_the_op() -> None:
    class Wrapper(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    seen: list[Any] = []
    x, branch, gate = (leaf.detach() for leaf in leaves())
    wk.adaln_residual(x.as_subclass(Wrapper), branch, gate)
    assert FORWARD in seen


def test_profilers_see_the_op() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(leaves())
    names = {event.key for event in profile.key_averages()}
    assert {"walt_kernels::adaln_residual", "walt_kernels::adaln_residual_backward"} <= names


def test_lazily_negated_tensors_are_negated(calls: list[bool]) -> None:
    x, branch, gate = (leaf.detach() for leaf in leaves())
    complex_ = torch.complex(torch.zeros_like(branch), branch)
    negated = complex_.conj().imag
    assert negated.is_neg()
    assert torch.equal(wk.adaln_residual(x, negated, gate), wk.adaln_residual(x, -branch, gate))
    assert calls == [False, True]


def test_tensors_without_memory_have_shapes(calls: list[bool]) -> None:
    x, branch, gate = (leaf.detach().to("meta") for leaf in leaves())
    assert wk.adaln_residual(x, branch, gate).shape == x.shape
    assert not any(calls)


def test_a_second_derivative_says_that_there_is_none() -> None:
    inputs = leaves()
    out = wk.adaln_residual(*inputs)
    (first,) = torch.autograd.grad(out.square().sum(), inputs[1:2], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()


def test_hooks_of_saved_tensors_are_called() -> None:
    packed: list[Tensor] = []
    inputs = leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        out = wk.adaln_residual(*inputs)
    assert {id(x) for x in inputs[1:]} <= {id(x) for x in packed}
    assert out.grad_fn is not None
    assert out.grad_fn.name() == "adaln_residualBackward"
