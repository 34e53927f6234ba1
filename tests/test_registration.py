"""Every op of the package, whatever it computes: schema, fake, autograd, autograd of the backward pass, opcheck."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from found_ops import OPS, WITH_KERNELS, needs_native, outputs_of, with_gradients
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import walt_kernels as wk
from walt_kernels import _define, _dispatch
from walt_kernels.testing import sample_call


class Recorder(TorchDispatchMode):
    """Keeps what reaches the dispatcher under this package's namespace."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "walt_kernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def record(op: str, dtype: torch.dtype = torch.float32) -> list[tuple[Any, tuple[Any, ...]]]:
    """The forward and the backward call of one public call, as the dispatcher sees them."""
    inputs = with_gradients(sample_call(op, dtype=dtype))
    with wk.use_backend("cpu"), Recorder() as recorder:
        outputs = outputs_of(op, **inputs)
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
    return recorder.calls


def test_all_public_ops_are_registered() -> None:
    """Whoever adds an op names it in walt_kernels/__init__.py, for readers and type checkers."""
    public = {name for name in wk.__all__ if hasattr(torch.ops.walt_kernels, name)}
    assert public == set(OPS)
    for op in OPS:
        assert getattr(wk, op) is _dispatch.op(op).function


def test_every_folder_is_found_and_declares_the_op_of_its_name() -> None:
    folders = _define.folders()
    assert folders
    assert set(folders) <= set(OPS)
    assert {_dispatch.op(op).function.__module__ for op in OPS} == {f"walt_kernels.{name}.op" for name in folders}


@pytest.mark.parametrize("op", OPS)
def test_schema_implementation_and_autograd(op: str) -> None:
    for name in (op, f"{op}_backward") if op in WITH_KERNELS else (op,):
        qualified = f"walt_kernels::{name}"
        overload = getattr(torch.ops.walt_kernels, name).default
        assert torch.Tag.pt2_compliant_tag in overload.tags
        assert not overload._schema.is_mutable
        assert overload._schema.arguments[-1].name == "backend"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CompositeExplicitAutograd")
        for key in ("CPU", "CUDA", "Meta", "AutogradCPU", "AutogradCUDA"):
            has = torch._C._dispatch_has_computed_kernel_for_dispatch_key(qualified, key)
            assert has, f"{qualified} has no kernel for {key}"


@needs_native
@pytest.mark.parametrize("op", WITH_KERNELS)
def test_one_call_forward_and_one_backward(op: str) -> None:
    assert [func._opname for func, _ in record(op)] == [op, f"{op}_backward"]


@needs_native
@pytest.mark.parametrize("op", WITH_KERNELS)
def test_fake_agrees_with_the_kernel(op: str) -> None:
    """Shapes, strides, dtypes and devices of the outputs, forward and backward, on tensors without memory."""
    for func, args in record(op, torch.bfloat16):
        real = func(*args)
        with FakeTensorMode() as mode:
            fake = func(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
        real, fake = ((r,) if isinstance(r, Tensor) else r for r in (real, fake))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


@needs_native
@pytest.mark.parametrize("op", WITH_KERNELS)
def test_opcheck(op: str) -> None:
    (forward, inputs), (backward, grads) = record(op)
    leaves = [a.detach().clone().requires_grad_(a.is_floating_point()) if isinstance(a, Tensor) else a for a in inputs]
    torch.library.opcheck(forward, leaves)
    # the backward op is not differentiable again, and says so: no autograd to check
    torch.library.opcheck(backward, grads, test_utils=("test_schema", "test_faketensor"))


@needs_native
@pytest.mark.parametrize("op", WITH_KERNELS)
def test_backward_of_backward_says_no(op: str) -> None:
    _, (backward, args) = record(op)
    leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    outputs = backward(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    total = sum(o.sum() for o in outputs if o.requires_grad)
    with pytest.raises(RuntimeError, match=f"{op} has no second derivative"):
        total.backward()


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_through_the_dispatcher(op: str) -> None:
    """What torch records and compiles, on the kernels and on the reference, which PyTorch differentiates in there."""
    call = sample_call(op, dtype=torch.float64)
    inputs = _dispatch.prepare(op, **call)
    overload = getattr(torch.ops.walt_kernels, op).default
    leaves, expected = with_gradients(inputs), with_gradients(call)
    outputs = overload(*leaves.values(), "reference")
    if op not in WITH_KERNELS:  # what kernels save for a backward pass is NaN here, which opcheck never finds the same
        torch.library.opcheck(overload, (*leaves.values(), "reference"))
    with wk.use_backend("reference"):
        wanted = outputs_of(op, **expected)
    outputs = (outputs if isinstance(outputs, tuple) else (outputs,))[: len(wanted)]
    for results in (outputs, wanted):
        torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    torch.testing.assert_close(outputs, wanted)
    for name, value in call.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(leaves[name].grad, expected[name].grad)
