"""adaln_lora against the float64 reference, NumPy, and its exact properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_adaln_lora import DTYPES, lora_inputs, run

import walt_kernels as wk
from walt_kernels import _native, testing
from walt_kernels.adaln_lora import reference

pytestmark = pytest.mark.skipif(_native.C is None, reason=f"native kernels: {_native.reason}")


# layers, B, D, K, r: the narrow path (r < 16) and the wide one, with whole and partial vectors and tiles
LORA_SHAPES = (
    (1, 1, 1, 1, 1),
    (3, 2, 16, 40, 2),
    (2, 3, 8, 300, 3),
    (24, 1, 64, 384, 2),
    (2, 2, 40, 513, 4),
    (1, 4, 33, 70, 8),
    (2, 5, 33, 600, 15),
    (2, 5, 33, 600, 16),
    (3, 7, 17, 1030, 37),
    (2, 8, 128, 768, 64),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LORA_SHAPES, ids=str)
def test_lora_matches_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layers, _, D, K, r = shape
    for scale in (1.0, 4.0, 16.0):
        inputs = lora_inputs(*shape, dtype, scale)
        testing.check_op(wk.adaln_lora, reference.adaln_lora, inputs, backward=False, rows=D + r)
        testing.check_op(wk.adaln_lora, reference.adaln_lora, inputs, rows=K + layers * r)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_lora_layouts(layout: str) -> None:
    inputs = {n: testing.embed(t, layout) for n, t in lora_inputs(3, 2, 24, 72, 4, torch.float32).items()}
    testing.check_op(wk.adaln_lora, reference.adaln_lora, inputs, rows=72)
    assert wk.adaln_lora(**inputs).is_contiguous()


def test_lora_against_numpy() -> None:
    rng = np.random.default_rng(0)
    for r in (3, 20):
        layers, B, D, K = 3, 2, 11, 26
        shapes = ((B, D), (B, K), (layers, r, D), (layers, K, r), (layers, B, K))
        cond, base, down, up, grad = (rng.standard_normal(s) for s in shapes)
        leaves = [torch.from_numpy(v).requires_grad_() for v in (cond, base, down, up)]
        out = wk.adaln_lora(*leaves)
        np.testing.assert_allclose(
            out.detach(), base + np.einsum("lkr,lrd,bd->lbk", up, down, cond), rtol=1e-11, atol=1e-12
        )
        expected = (
            np.einsum("lbk,lkr,lrd->bd", grad, up, down),
            grad.sum(0),
            np.einsum("lbk,lkr,bd->lrd", grad, up, cond),
            np.einsum("lbk,lrd,bd->lkr", grad, down, cond),
        )
        for value, truth in zip(torch.autograd.grad(out, leaves, torch.from_numpy(grad)), expected, strict=True):
            np.testing.assert_allclose(value, truth, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [2, 32])
def test_zero_lora_is_the_base_bitwise(dtype: torch.dtype, r: int) -> None:
    inputs = lora_inputs(3, 2, 24, 50, r, dtype)
    inputs["up"] = torch.zeros_like(inputs["up"])
    assert torch.equal(wk.adaln_lora(**inputs), inputs["base"].expand(3, 2, 50))


@pytest.mark.parametrize("r", [2, 17])
def test_lora_gradcheck(r: int) -> None:
    assert torch.autograd.gradcheck(wk.adaln_lora, tuple(lora_inputs(2, 2, 3, 4, r, torch.float64).values()))


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_lora_opcheck(layout: str) -> None:
    inputs = {n: testing.embed(t, layout) for n, t in lora_inputs(2, 2, 3, 5, 2, torch.float32).items()}
    torch.library.opcheck(torch.ops.walt_kernels.adaln_lora.default, (*inputs.values(), "cpu"))


def test_lora_empty() -> None:
    out, *grads = run(wk.adaln_lora, lora_inputs(2, 0, 8, 10, 2, torch.float32))
    assert out.shape == (2, 0, 10)
    assert all(not grad.any() for grad in grads)  # no sample, no gradient
    out, *grads = run(wk.adaln_lora, lora_inputs(0, 2, 8, 10, 2, torch.float32))
    assert out.shape == (0, 2, 10)
    assert all(not grad.any() for grad in grads)
