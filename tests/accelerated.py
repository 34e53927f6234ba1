"""What holds of every class that `accelerate` replaces, and what a class of another library is taken for."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from walt_kernels import testing
from walt_kernels.integrations import accelerate, replace, restore
from walt_kernels.integrations.adapter import class_path, fingerprint


def as_public(monkeypatch: pytest.MonkeyPatch, path: str, cls: type[nn.Module], **functions: Any) -> type[nn.Module]:
    """``cls``, written after the public definition of the class at ``path``, in its place; with functions it calls."""
    module, name = path.rsplit(".", 1)
    adapter, file = replace._ADAPTERS[path], types.ModuleType(module)
    vars(file).update(functions)
    monkeypatch.setitem(sys.modules, module, file)
    public = type(name, (cls,), {"__module__": module, "__qualname__": name, "forward": cls.forward})
    methods = [getattr(public, method, None) or functions[method] for method in adapter.methods]
    known = fingerprint(*methods)
    assert known is not None
    monkeypatch.setitem(replace._ADAPTERS, path, dataclasses.replace(adapter, known=frozenset({known})))
    assert class_path(public) == path
    return public


def ops(call: Callable[[], Any]) -> set[str]:
    """Names of ours that a call runs."""
    with torch.profiler.profile() as profile:
        call()
    names = (event.key.split("::") for event in profile.key_averages())
    return {name for library, *rest in names if library == "walt_kernels" for name in rest}


def randomize(module: nn.Module) -> nn.Module:
    """Parameters that hide nothing: many are zero or one when they are made."""
    for index, parameter in enumerate(module.parameters()):
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
        parameter.data.copy_(testing.random(*parameter.shape, scale=scale, grad=False, seed=index))
    return module.eval()


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """Floating tensors, and what names their dtype, in another one."""

    def one(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return dtype
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().to(dtype).requires_grad_() if floating else value

    return pytree.tree_map(one, inputs)


def check(module: nn.Module, inputs: dict[str, Any], op: str, dtype: torch.dtype) -> None:
    """``module`` replaced is ``op``, as near to itself in float64 as it is unreplaced, and restored is itself."""
    plain = copy.deepcopy(module).to(dtype)
    truth, ours = copy.deepcopy(plain).double(), copy.deepcopy(plain)
    report = accelerate(ours)
    assert [row.what for row in report.replaced if row.name == ""] == [op], str(report)
    rounded = cast(inputs, dtype)
    assert op in ops(lambda: ours(**cast(rounded, dtype)))
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):  # what it widens to float32 is float64, too
        expected = results(truth, cast(rounded, torch.float64))
    yardstick, actual = results(plain, cast(rounded, dtype)), results(ours, cast(rounded, dtype))
    assert actual.keys() == expected.keys() == yardstick.keys()
    for name, value in actual.items():
        k = testing.K_FORWARD if name.startswith("output") else testing.K_BACKWARD
        rows = 1 if name.startswith("output") else 256
        testing.compare(name, value, expected[name], yardstick[name], k=k, rows=rows)
    again = results(ours, cast(rounded, dtype))
    assert all(torch.equal(again[name], value) for name, value in actual.items())
    restore(ours)
    assert type(ours) is type(module)
    restored = results(ours, cast(rounded, dtype))
    assert all(torch.equal(restored[name], value) for name, value in yardstick.items())


def results(module: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs, and the gradients of all inputs and parameters through all of them."""
    outputs = [value for value in pytree.tree_leaves(module(**inputs)) if isinstance(value, Tensor)]
    weights = [testing.random(*out.shape, grad=False, seed=90 + i).to(out) for i, out in enumerate(outputs)]
    loss = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    leaves = [value for value in pytree.tree_leaves(inputs) if isinstance(value, Tensor) and value.requires_grad]
    named = {f"input {index}": leaf for index, leaf in enumerate(leaves)} | dict(module.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    found = {name: grad for name, grad in zip(named, gradients, strict=True) if grad is not None}
    return {f"output {index}": out.detach() for index, out in enumerate(outputs)} | found
