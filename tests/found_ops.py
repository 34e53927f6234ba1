"""All ops of the package, as they are found, and the calls that tests of every op make."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from walt_kernels import _dispatch, _native

OPS = _dispatch.ops()
needs_native = pytest.mark.skipif(_native.C is None, reason=f"native kernels: {_native.reason}")


def has_kernels(op: str) -> bool:
    """Whether some of its backends have a backward pass of their own; PyTorch differentiates the others."""
    return not all(backend.differentiable for backend in _dispatch.op(op).backends)


WITH_KERNELS = tuple(filter(has_kernels, OPS))


def backend_of(op: str) -> str:
    """What is tested on a CPU: the native kernels, or the reference of an op without kernels."""
    return "cpu" if has_kernels(op) else "reference"


def call(op: str, **inputs: Any) -> Any:
    """The public function, named in ``walt_kernels`` or not yet."""
    return _dispatch.op(op).function(**inputs)


def outputs_of(op: str, **inputs: Any) -> tuple[Tensor, ...]:
    outputs = call(op, **inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def with_gradients(inputs: dict[str, Any]) -> dict[str, Any]:
    """Floating tensors as leaves of a new graph."""
    return {
        name: value.detach().requires_grad_(value.is_floating_point()) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
