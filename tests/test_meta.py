"""Ops and modules without memory: meta tensors and FakeTensorMode, forward and backward, also under autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from found_ops import OPS, outputs_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import walt_kernels as wk
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.presets import PRESETS
from walt_kernels.nn import AdaLNLoRA, CausalConv3d, WindowAttention
from walt_kernels.testing import sample_call

AUTOCAST: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no autocast": nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


def layouts(op: str, convert: Callable[[Tensor], Tensor]) -> list[Layout | None]:
    """Shapes, strides and dtypes of the outputs and gradients of a call on converted tensors."""

    inputs = {
        name: convert(value).requires_grad_() if isinstance(value, Tensor) else value
        for name, value in sample_call(op).items()
    }
    outputs = outputs_of(op, **inputs)
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    found = [*outputs, *(value.grad for value in inputs.values() if isinstance(value, Tensor))]
    return [None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype) for tensor in found]


@pytest.mark.parametrize("context", AUTOCAST.values(), ids=AUTOCAST)
@pytest.mark.parametrize("op", OPS)
def test_fake_tensors(op: str, context: Callable[[], AbstractContextManager[Any]]) -> None:
    with context():
        real = layouts(op, lambda tensor: tensor)
        with FakeTensorMode() as mode:
            assert layouts(op, mode.from_tensor) == real


@pytest.mark.parametrize("context", AUTOCAST.values(), ids=AUTOCAST)
@pytest.mark.parametrize("op", OPS)
def test_meta_tensors(op: str, context: Callable[[], AbstractContextManager[Any]]) -> None:
    """Autocast leaves meta tensors as they are, in PyTorch's ops and in ours."""
    real = layouts(op, lambda tensor: tensor)
    with context():
        assert layouts(op, lambda tensor: tensor.to("meta")) == real


MODULES: dict[str, tuple[Callable[[], nn.Module], list[Any]]] = {
    "conv": (lambda: CausalConv3d(4, 6, 3, stride=2, space_padding="reflect"), [(2, 4, 5, 8, 8)]),
    "attention": (lambda: WindowAttention(16, 2, (2, 4, 4)), [(2, 5, 8, 8, 16)]),
    "context": (lambda: WindowAttention(16, 2, (2, 4, 4), context_width=8), [(2, 5, 8, 8, 16), None, (2, 6, 8)]),
    "lora": (lambda: AdaLNLoRA(16, 3, 2), [(2, 16)]),
    "transformer": (lambda: Transformer(PRESETS["minimal"][1]), [(2, 4, 2, 2, 2), (2,)]),
    "tokenizer": (lambda: Tokenizer(PRESETS["minimal"][0]), [(2, 3, 5, 16, 16)]),
}


@pytest.mark.parametrize("context", AUTOCAST.values(), ids=AUTOCAST)
@pytest.mark.parametrize("name", MODULES)
def test_modules_on_meta(name: str, context: Callable[[], AbstractContextManager[Any]]) -> None:
    make, shapes = MODULES[name]
    inputs = [None if shape is None else torch.randn(shape) for shape in shapes]
    expected = make()(*inputs)
    with torch.device("meta"):
        module = make()
    with context():
        output = module(*(x if x is None else x.to("meta") for x in inputs))
    assert (output.shape, output.device.type) == (expected.shape, "meta")
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_next_history_on_meta() -> None:
    x = torch.empty(2, 4, 1, 8, 8, device="meta")
    assert wk.next_history(x, wk.next_history(x, None, 3), 3).shape == (2, 4, 2, 8, 8)
