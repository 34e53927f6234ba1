"""Ops on nothing: no samples, tokens, layers or context. Gradients are those of the reference, whatever the strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from found_ops import OPS, backend_of, needs_native, outputs_of, with_gradients
from torch import Tensor

import walt_kernels as wk
from walt_kernels.testing import sample_call

pytestmark = needs_native


def adaln(batch: int, tokens: int, frames: int) -> dict[str, tuple[int, ...]]:
    row = (batch, frames, 16) if frames else (batch, 16)
    x = (batch, tokens, 16)
    return {"x": x, "branch": x, "gate": row, "shift": row, "scale": row}


def lora(batch: int, width: int, outputs: int, layers: int, rank: int) -> dict[str, tuple[int, ...]]:
    up_and_down = {"down": (layers, rank, width), "up": (layers, outputs, rank)}
    return {"cond": (batch, width), "base": (batch, outputs), **up_and_down}


def attention(batch: int, context: int | None = None) -> dict[str, tuple[int, ...]]:
    qkv = dict.fromkeys("qkv", (batch, 3, 4, 4, 2, 8))
    more = {} if context is None else dict.fromkeys(("context_k", "context_v"), (batch, context, 2, 8))
    return {**qkv, "bias_table": (2, 3, 3, 3), "q_norm": (8,), "k_norm": (8,), **more}


CONV = {"x": (0, 4, 3, 5, 5), "weight": (6, 4, 3, 3, 3), "bias": (6,)}
WINDOW = {"window": (2, 2, 2)}
NAMES = {
    "adaln_modulate": ("x", "shift", "scale"),
    "adaln_residual": ("x", "branch", "gate"),
    "adaln_residual_modulate": ("x", "branch", "gate", "shift", "scale"),
}
CASES: list[tuple[str, dict[str, tuple[int, ...]], dict[str, Any]]] = [
    *(
        (op, {name: adaln(*sizes)[name] for name in names}, {})
        for op, names in NAMES.items()
        for sizes in ((0, 8, 0), (0, 8, 2), (2, 0, 0), (2, 0, 2))
    ),
    *(
        ("adaln_lora", lora(*sizes), {})
        for sizes in ((0, 4, 8, 3, 2), (2, 0, 8, 3, 2), (2, 4, 0, 3, 2), (2, 4, 8, 0, 2), (2, 4, 8, 3, 0))
    ),
    ("causal_conv3d", CONV, {}),
    ("causal_conv3d", CONV, {"space_padding": "reflect", "time_padding": "first_frame", "stride": 2}),
    ("causal_conv3d", {**CONV, "history": (0, 4, 2, 5, 5)}, {}),
    ("causal_conv3d", {"x": (2, 4, 3, 5, 5), "weight": (6, 4, 1, 3, 3), "history": (2, 4, 0, 5, 5)}, {}),
    ("window_attention", attention(0), WINDOW),
    ("window_attention", attention(0), {**WINDOW, "image": torch.zeros(0, dtype=torch.bool)}),
    ("window_attention", attention(0, 5), {**WINDOW, "context_mask": torch.zeros(0, 5, dtype=torch.bool)}),
    ("window_attention", attention(2, 0), WINDOW),
]


@pytest.mark.parametrize("expanded", [False, True], ids=["dense", "expanded"])
@pytest.mark.parametrize(("op", "shapes", "options"), CASES, ids=[f"{c[0]} {[*c[1].values()]}" for c in CASES])
def test_empty(op: str, shapes: dict[str, tuple[int, ...]], options: dict[str, Any], expanded: bool) -> None:
    """Under ``expanded`` all strides of arguments and incoming gradients are 0, as those of sum()'s gradient are."""

    def run(backend: str) -> list[Tensor]:
        torch.manual_seed(0)
        leaves = {
            name: (torch.randn(()).expand(shape) if expanded else torch.randn(shape)).double().requires_grad_()
            for name, shape in shapes.items()
        }
        with wk.use_backend(backend):
            outputs = outputs_of(op, **leaves, **options)
        incoming = [o.new_ones(()).expand(o.shape) if expanded else torch.ones_like(o) for o in outputs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), incoming)
        assert [g.shape for g in gradients] == [*shapes.values()]
        return [*outputs, *gradients]

    torch.testing.assert_close(run("cpu"), run("reference"), check_stride=False)


@pytest.mark.parametrize("op", OPS)
def test_no_samples(op: str) -> None:
    inputs = sample_call(op, dtype=torch.float64, batch=0)

    def run(backend: str) -> list[Tensor]:
        leaves = with_gradients(inputs)
        with wk.use_backend(backend):
            outputs = outputs_of(op, **leaves)
        tensors = [value for value in leaves.values() if isinstance(value, Tensor)]
        return [*outputs, *torch.autograd.grad(outputs, tensors, [torch.ones_like(output) for output in outputs])]

    results = run(backend_of(op))
    assert results[0].numel() == 0
    torch.testing.assert_close(results, run("reference"), check_stride=False)
