"""torch.utils.flop_counter on the ops: what it counts for the reference, where that does the same work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from found_ops import OPS, backend_of, needs_native, outputs_of, with_gradients
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import walt_kernels as wk
from benchmarks.cases import CASES, Case
from walt.model.transformer import Transformer
from walt.presets import PRESETS
from walt_kernels.adaln_lora.op import lora_flops
from walt_kernels.causal_conv3d import op as conv
from walt_kernels.testing import sample_call
from walt_kernels.window_attention import op as attention

pytestmark = needs_native


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def counted(call: Callable[[], Any], backend: str) -> tuple[int, int]:
    """FLOPs of the forward and of the backward pass."""
    with wk.use_backend(backend), FlopCounterMode(display=False) as forward:
        output = call()
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


X, WEIGHT, BIAS = (2, 4, 5, 8, 9), (6, 4, 3, 3, 3), (6,)
CONVOLUTIONS: dict[str, Callable[[], Tensor]] = {
    "plain": lambda: wk.causal_conv3d(leaf(*X), leaf(*WEIGHT), leaf(*BIAS)),
    "stride, history": lambda: wk.causal_conv3d(leaf(*X), leaf(*WEIGHT), stride=2, history=leaf(2, 4, 2, 8, 9)),
    "dilation, padding": lambda: wk.causal_conv3d(leaf(*X), leaf(*WEIGHT), dilation=2, padding=1),
    "no gradient of weight": lambda: wk.causal_conv3d(leaf(*X), leaf(*WEIGHT).detach(), leaf(*BIAS)),
    "no gradient of x": lambda: wk.causal_conv3d(leaf(*X).detach(), leaf(*WEIGHT)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str) -> None:
    ours = counted(CONVOLUTIONS[name], "cpu")
    assert ours == counted(CONVOLUTIONS[name], "reference")
    assert min(ours) > 0


def test_convolution_in_groups() -> None:
    """PyTorch counts the gradient of a weight in groups as if there were none."""

    def call() -> Tensor:
        return wk.causal_conv3d(leaf(*X), leaf(6, 2, 3, 3, 3), groups=2)

    forward, backward = counted(call, "cpu")
    assert forward == counted(call, "reference")[0] == conv.flops((2, 6, 5, 8, 9), WEIGHT) / 2
    assert backward == 2 * forward


@pytest.mark.parametrize("context", [0, 3])
def test_attention(context: int) -> None:
    """Windows that divide no axis. Backward, ours has a fifth product, as PyTorch's fused ones do: the scores again."""
    more: dict[str, Any] = {}

    def call() -> Tensor:
        if context:
            more.update(context_k=leaf(2, context, 2, 8), context_v=leaf(2, context, 2, 8))
        return wk.window_attention(*(leaf(2, 5, 7, 9, 2, 8) for _ in range(3)), window=(2, 4, 4), **more)

    forward, backward = counted(call, "cpu")
    assert (forward, backward * 4 / 5) == counted(call, "reference")
    assert forward == attention.flops((2, 5, 7, 9, 2, 8), (2, 4, 4), context)


def test_lora() -> None:
    def call() -> Tensor:
        return wk.adaln_lora(leaf(3, 8), leaf(3, 12), leaf(4, 2, 8), leaf(4, 12, 2))

    assert counted(call, "cpu") == counted(call, "reference")
    assert counted(call, "cpu")[0] == lora_flops((3, 8), (3, 12), (4, 2, 8))


@pytest.mark.parametrize("op", OPS)
def test_every_op_counts_what_its_reference_does(op: str) -> None:
    """Products alone: an op without any counts none."""
    inputs = sample_call(op)
    assert (
        counted(lambda: outputs_of(op, **with_gradients(inputs))[0], backend_of(op))[0]
        == (counted(lambda: outputs_of(op, **with_gradients(inputs))[0], "reference")[0])
    )


@pytest.mark.parametrize("case", [c.small() for c in CASES if c.op != "training_step"], ids=lambda c: c.op)
def test_benchmarks_count_the_same(case: Case) -> None:
    inputs = case.inputs(torch.float32)

    def call() -> Tensor:
        output = getattr(wk, case.op)(**inputs)
        return output[0] if isinstance(output, tuple) else output

    forward, backward = counted(call, "cpu")
    if case.op in ("adaln_residual_modulate", "video_norm"):
        assert (forward, backward) == (0, 0)  # no products, which are all that PyTorch counts
    elif "image" not in inputs:
        assert forward == case.work("forward", torch.float32)[0]
        assert backward == case.work("backward", torch.float32)[0]


def test_a_model() -> None:
    """A transformer on its default backends counts what its configuration says."""
    config = PRESETS["minimal"][1]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        Transformer(config)(torch.randn(1, config.latent_channels, *config.latent_size), torch.tensor([3]))
    assert counter.get_total_flops() == sum(config.flops().values())


def test_counter_imported_later() -> None:
    """The usual order of imports; ours imports neither the counter nor Triton, which the counter does."""
    code = """
import importlib.util, sys, torch, walt_kernels as wk
assert "torch.utils.flop_counter" not in sys.modules and "triton" not in sys.modules
assert importlib.util.find_spec("torch.utils.flop_counter") is not None  # whoever looks whether it is there
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter, wk.use_backend("cpu"):
    wk.causal_conv3d(torch.ones(1, 1, 1, 4, 4), torch.ones(1, 1, 1, 1, 1))
assert counter.get_total_flops() == 32
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
