"""The Triton kernels inside torch: compiled graphs, CUDA graphs, tensors of more than 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from on_gpu import DEVICE, marks
from torch import Tensor
from torch._dynamo.utils import counters

import walt_kernels as wk
from walt_kernels import _triton
from walt_kernels.testing import random

pytestmark = marks()
needs_gpu = pytest.mark.skipif(_triton.INTERPRET, reason="needs a GPU: there is nothing to capture in an interpreter")


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [random(*shape, seed=i).detach().to(DEVICE).requires_grad_() for i, shape in enumerate(shapes)]


def attend(q: Tensor, k: Tensor, v: Tensor, table: Tensor, q_norm: Tensor, k_norm: Tensor) -> Tensor:
    image = torch.tensor([True, False], device=q.device)
    return wk.window_attention(
        q, k, v, window=(2, 2, 3), bias_table=table, q_norm=q_norm, k_norm=k_norm, image=image[: q.shape[0]]
    )


CALLS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "causal_conv3d": (
        lambda x, w, b: wk.causal_conv3d(x, w, b, time_padding="first_frame"),
        ((2, 3, 2, 4, 5), (4, 3, 3, 3, 3), (4,)),
    ),
    "window_attention": (attend, (*[(2, 3, 4, 4, 2, 16)] * 3, (2, 3, 3, 5), (16,), (16,))),
    "video_norm": (
        lambda x, weight, scale: wk.video_norm(x, weight, groups=2, scale=scale, activation="silu"),
        ((2, 6, 2, 4, 5), (6,), (2, 6)),
    ),
    "adaln_lora": (wk.adaln_lora, ((2, 16), (2, 40), (3, 2, 16), (3, 40, 2))),
    "adaln_modulate": (wk.adaln_modulate, ((2, 6, 20), (2, 20), (2, 20))),
    "adaln_residual": (wk.adaln_residual, ((2, 6, 20), (2, 6, 20), (2, 20))),
    "adaln_residual_modulate": (wk.adaln_residual_modulate, ((2, 6, 20), (2, 6, 20), (2, 20), (2, 20), (2, 20))),
}


def step(call: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of a layer that has elementwise neighbours on both sides of the op."""
    outputs = call(*[leaf * 1.5 for leaf in leaves])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = [output + 1 for output in outputs]
    loss = torch.stack([output.square().sum() for output in outputs]).sum()
    return [*(output.detach() for output in outputs), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("name", CALLS)
def test_compiles_whole(name: str) -> None:
    """One graph forward, whose backward is compiled with it, and the numbers of the eager call."""
    call, shapes = CALLS[name]
    leaves = tensors(*shapes)
    torch._dynamo.reset()
    counters.clear()
    backend = "aot_eager" if _triton.INTERPRET else "inductor"
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    with wk.use_backend("triton"):
        expected, got = step(call, leaves), step(compiled, leaves)
    assert counters["stats"]["unique_graphs"] == 1
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@needs_gpu
@pytest.mark.parametrize("name", CALLS)
def test_a_cuda_graph_replays(name: str) -> None:
    """Forward and backward are captured once; a replay computes from what then stands in the inputs."""
    call, shapes = CALLS[name]
    leaves = tensors(*shapes)
    if name == "window_attention":  # a tensor made from Python numbers inside would be a copy from the host

        def call(*inputs: Tensor) -> Tensor:
            q, k, v, table, q_norm, k_norm = inputs
            return wk.window_attention(q, k, v, window=(2, 2, 3), bias_table=table, q_norm=q_norm, k_norm=k_norm)

    with wk.use_backend("triton"):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(call, leaves)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(call, leaves)
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(torch.randn_like(leaf))
        graph.replay()
        for a, b in zip(captured, step(call, leaves), strict=True):
            assert torch.equal(a, b)


@needs_gpu
@pytest.mark.large
def test_offsets_beyond_32_bits() -> None:
    """The last sample of a tensor of more than 2^31 elements equals the same sample alone."""
    with wk.use_backend("triton"), torch.no_grad():
        x = torch.empty(2, 17, 512, 512, 256, dtype=torch.bfloat16, device=DEVICE).normal_().permute(0, 4, 1, 2, 3)
        weight = (torch.randn(16, 256, 3, 3, 3, device=DEVICE) / 80).bfloat16()
        assert x.numel() > 2**31
        assert torch.equal(wk.causal_conv3d(x, weight)[1:], wk.causal_conv3d(x[1:], weight))
        del x
        q = torch.empty(2, 17, 512, 512, 4, 64, dtype=torch.bfloat16, device=DEVICE).normal_()
        assert q.numel() > 2**31
        whole = wk.window_attention(q, q, q, window=(1, 16, 16))
        assert torch.equal(whole[1, -1:], wk.window_attention(*[q[1:, -1:]] * 3, window=(1, 16, 16))[0])
        del q, whole
        rows = torch.empty(2, 1 << 20, 1152, dtype=torch.bfloat16, device=DEVICE).normal_()
        shift, scale = torch.randn(2, 2, 1152, device=DEVICE).bfloat16().unbind()
        assert rows.numel() > 2**31
        assert torch.equal(
            wk.adaln_modulate(rows, shift, scale)[1, -9:], wk.adaln_modulate(rows[1:, -9:], shift[1:], scale[1:])[0]
        )
