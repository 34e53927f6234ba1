"""The Triton kernels of the adaln ops against the float64 reference, and exact properties (``pytest.mark.gpu``)."""

from __future__ import annotations

import pytest
import torch
from on_gpu import DEVICE, DTYPES, check, marks, on_device, through
from test_adaln_lora import MODULATED, inputs_of, lora_inputs, run

import walt_kernels as wk
from walt_kernels import testing

pytestmark = marks()

# B, N, D, F: sizes of 1, several tokens a program and one, columns beyond D, more parts than programs, rows wider than
# a block
SHAPES = ((1, 1, 1, 1), (2, 6, 7, 3), (3, 1, 16, 1), (2, 45, 65, 5), (1, 9, 1152, 3), (2, 3, 4099, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MODULATED)
def test_matches_reference(name: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check(getattr(wk, name), inputs_of(name, shape, dtype), rows=max(shape[1], shape[2]))


@pytest.mark.parametrize("form", ["sample", "sample_chunk", "frame_chunk", "permuted"])
def test_modulation_views(form: str) -> None:
    shape = (2, 12, 33, 4)
    check(wk.adaln_residual_modulate, inputs_of("adaln_residual_modulate", shape, DTYPES[0], form=form), rows=33)


@pytest.mark.skipif(len(DTYPES) == 1, reason="16-bit tokens need a GPU")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_float32_modulation_of_16_bit_tokens(dtype: torch.dtype) -> None:
    inputs = inputs_of("adaln_residual_modulate", (2, 20, 96, 2), dtype, rows_dtype=torch.float32)
    check(wk.adaln_residual_modulate, inputs, rows=96)


@pytest.mark.parametrize("layout", ["channels_last", "permuted", "sliced"])
def test_layouts(layout: str) -> None:
    name = "adaln_residual_modulate"
    check(wk.adaln_residual_modulate, inputs_of(name, (2, 12, 33, 4), DTYPES[0], layout=layout), rows=33)


def test_rows_per_frame_may_differ_between_tensors() -> None:
    inputs = inputs_of("adaln_residual_modulate", (2, 12, 20, 1), DTYPES[0], form="sample")
    inputs["shift"] = testing.random(2, 3, 20, seed=5)
    inputs["scale"] = testing.random(2, 4, 20, seed=6)
    check(wk.adaln_residual_modulate, inputs, rows=20)


def test_large_mean() -> None:
    inputs = inputs_of("adaln_residual_modulate", (2, 6, 64, 2), DTYPES[0])
    inputs["x"] = (inputs["x"].detach() + 1000).requires_grad_()
    check(wk.adaln_residual_modulate, inputs, rows=64)


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_through_one_output(used: int) -> None:
    inputs = inputs_of("adaln_residual_modulate", (2, 12, 24, 2), DTYPES[0])

    def one(**given: torch.Tensor) -> torch.Tensor:
        return wk.adaln_residual_modulate(**given)[used] + 0 * (given["shift"].sum() + given["scale"].sum())

    check(one, inputs, rows=24)


def test_zero_gate_is_the_residual_bitwise() -> None:
    inputs = on_device(inputs_of("adaln_residual", (2, 7, 65, 1), DTYPES[-1]))
    inputs["gate"] = torch.zeros_like(inputs["gate"])
    assert torch.equal(through("triton", wk.adaln_residual)(**inputs), inputs["x"])


@pytest.mark.parametrize("name", MODULATED)
def test_runs_are_bit_identical(name: str) -> None:
    inputs = on_device(inputs_of(name, (2, 30, 65, 2), DTYPES[-1]))
    first = run(through("triton", getattr(wk, name)), inputs)
    for _ in range(1 if len(DTYPES) == 1 else 3):
        again = run(through("triton", getattr(wk, name)), inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_empty() -> None:
    for shape in ((0, 4, 8, 2), (2, 0, 8, 1)):
        inputs = on_device(inputs_of("adaln_residual_modulate", shape, DTYPES[0]))
        for result in run(through("triton", wk.adaln_residual_modulate), inputs):
            assert result.numel() == 0 or not result.any()


# layers, B, D, K, r: one of each, ranks around a block, more conditions than a block
LORA = ((1, 1, 1, 1, 1), (3, 2, 40, 70, 2), (2, 17, 33, 130, 16), (2, 3, 130, 65, 17), (2, 2, 16, 64, 66))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LORA, ids=str)
def test_lora_matches_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(wk.adaln_lora, lora_inputs(*shape, dtype), rows=max(shape))


@pytest.mark.parametrize("layout", ["permuted", "sliced"])
def test_lora_layouts(layout: str) -> None:
    inputs = {n: testing.embed(v, layout) for n, v in lora_inputs(2, 3, 20, 24, 3, DTYPES[0]).items()}
    check(wk.adaln_lora, inputs, rows=24)


def test_zero_lora_is_the_base_bitwise() -> None:
    inputs = on_device(lora_inputs(2, 3, 20, 24, 3, DTYPES[-1]))
    inputs["up"] = torch.zeros_like(inputs["up"])
    out = through("triton", wk.adaln_lora)(**inputs)
    assert torch.equal(out, inputs["base"].expand_as(out))


def test_lora_of_nothing() -> None:
    for shape in ((0, 2, 4, 6, 2), (2, 0, 4, 6, 2), (2, 3, 4, 6, 0)):
        results = run(through("triton", wk.adaln_lora), on_device(lora_inputs(*shape[:4], max(shape[4], 1), DTYPES[0])))
        assert all(torch.isfinite(result).all() for result in results)


def test_refuses_what_it_cannot_run() -> None:
    x = torch.zeros(1, 2, 4, device=DEVICE, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"'triton' was forced and cannot run: .*float64"), wk.use_backend("triton"):
        wk.adaln_residual(x, x, x[:, 0])
