"""The adaln ops against the float64 reference, NumPy, and their exact properties."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import walt_kernels as wk
from walt_kernels import _native, testing
from walt_kernels.adaln_lora import reference

pytestmark = pytest.mark.skipif(_native.C is None, reason=f"native kernels: {_native.reason}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MODULATED = {  # name: its tensors over tokens, its modulation rows
    "adaln_modulate": (("x",), ("shift", "scale")),
    "adaln_residual": (("x", "branch"), ("gate",)),
    "adaln_residual_modulate": (("x", "branch"), ("gate", "shift", "scale")),
}
# B, N, D, F: sizes of 1, primes, around one vector and around four, several tasks, the model's widths
SHAPES = (
    (2, 6, 7, 3),
    (3, 1, 5, 1),
    (2, 10, 15, 5),
    (1, 4, 16, 2),
    (2, 4, 17, 4),
    (1, 6, 63, 2),
    (1, 3, 64, 1),
    (1, 70, 65, 7),
    (1, 160, 256, 5),
    (2, 45, 1152, 5),
)


def rows(
    form: str, B: int, F: int, D: int, dtype: torch.dtype, names: tuple[str, ...], scale: float = 1.0
) -> dict[str, Tensor]:
    """Modulation rows in one of the forms that users have them in."""
    shape = (B, D) if form in ("sample", "sample_chunk") else (B, F, D)
    if form.endswith("chunk"):
        packed = testing.random(*shape[:-1], len(names) * D, dtype=dtype, scale=scale, grad=False, seed=11)
        return {n: c.requires_grad_() for n, c in zip(names, packed.chunk(len(names), -1), strict=True)}
    tensors = {n: testing.random(*shape, dtype=dtype, scale=scale, seed=11 + i) for i, n in enumerate(names)}
    if form == "permuted":
        return {n: testing.embed(t, "permuted") for n, t in tensors.items()}
    return tensors


def inputs_of(
    name: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    form: str = "frame",
    rows_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    scale: float = 1.0,
) -> dict[str, Tensor]:
    B, N, D, F = shape
    tokens, modulation = MODULATED[name]
    inputs = {
        n: testing.embed(testing.random(B, N, D, dtype=dtype, scale=scale, seed=i), layout)
        for i, n in enumerate(tokens)
    }
    return inputs | rows(form, B, F, D, rows_dtype or dtype, modulation)


def check(name: str, inputs: dict[str, Any], reduction: int) -> None:
    """Forward at the tolerance of single values, gradients at that of sums over ``reduction`` values."""
    op, definition = getattr(wk, name), getattr(reference, name)
    testing.check_op(op, definition, inputs, backward=False)
    testing.check_op(op, definition, inputs, rows=max(reduction, 1))


def lora_inputs(
    layers: int, B: int, D: int, K: int, r: int, dtype: torch.dtype, scale: float = 1.0
) -> dict[str, Tensor]:
    return {
        "cond": testing.random(B, D, dtype=dtype, scale=scale),
        "base": testing.random(B, K, dtype=dtype, seed=1),
        "down": testing.random(layers, r, D, dtype=dtype, scale=D**-0.5, seed=2),
        "up": testing.random(layers, K, r, dtype=dtype, scale=r**-0.5, seed=3),
    }


def run(op: Callable[..., Any], inputs: dict[str, Any]) -> list[Tensor]:
    """Outputs and all gradients for fixed incoming gradients."""
    leaves = {n: testing.leaf(v) for n, v in inputs.items()}
    outputs = op(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [
        testing.random(*o.shape, dtype=o.dtype, grad=False, seed=50 + i).to(o.device) for i, o in enumerate(outputs)
    ]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, list(leaves.values()), grads)]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- against the float64 reference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULATED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(name: str, dtype: torch.dtype) -> None:
    for shape, form in itertools.product(SHAPES, ("sample", "frame")):
        check(name, inputs_of(name, shape, dtype, form=form), shape[1])


@pytest.mark.parametrize("name", MODULATED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_width_of_one(name: str, dtype: torch.dtype) -> None:
    """The norm's gradient is zero. On AArch64 PyTorch rounds it, in float64 too, and is no truth for it there."""
    for form in ("sample", "frame"):
        check(name, inputs_of(name, (1, 1, 1, 1), dtype, form=form), 1)


@pytest.mark.parametrize("name", MODULATED)
@pytest.mark.parametrize("form", ["sample_chunk", "frame_chunk", "permuted"])
def test_modulation_views(name: str, form: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(name, inputs_of(name, (2, 30, 37, 5), dtype, form=form), 30)


@pytest.mark.parametrize("name", MODULATED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_modulation_of_16_bit_tokens(name: str, dtype: torch.dtype) -> None:
    for form in ("sample", "frame_chunk"):
        inputs = inputs_of(name, (2, 30, 37, 5), dtype, form=form, rows_dtype=torch.float32)
        check(name, inputs, 30)
        leaves = {n: testing.leaf(v) for n, v in inputs.items()}
        outputs = getattr(wk, name)(**leaves)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        assert first.dtype == dtype
        first.sum().backward()
        assert all(v.grad is None or v.grad.dtype == v.dtype for v in leaves.values())


@pytest.mark.parametrize("name", MODULATED)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(name: str, layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = inputs_of(name, (2, 12, 21, 3), dtype, layout=layout)
        check(name, inputs, 12)
        outputs = getattr(wk, name)(**inputs)
        assert all(o.is_contiguous() for o in (outputs if isinstance(outputs, tuple) else (outputs,)))


@pytest.mark.parametrize("name", MODULATED)
@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_scales(name: str, scale: float) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(name, inputs_of(name, (2, 20, 72, 5), dtype, scale=scale), 20)


def test_rows_per_frame_may_differ_between_tensors() -> None:
    inputs = inputs_of("adaln_residual_modulate", (2, 12, 19, 3), torch.float32)
    inputs["gate"] = testing.random(2, 19, seed=21)
    inputs["shift"] = testing.random(2, 4, 19, seed=22)
    check("adaln_residual_modulate", inputs, 12)


def test_expanded_tensors() -> None:
    inputs = inputs_of("adaln_residual_modulate", (2, 12, 19, 3), torch.float32)
    inputs["x"] = testing.random(1, 12, 19).detach().expand(2, 12, 19).requires_grad_()
    inputs["scale"] = testing.random(1, 1, 19).detach().expand(2, 3, 19).requires_grad_()
    check("adaln_residual_modulate", inputs, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_mean(dtype: torch.dtype) -> None:
    """The mean is far above the spread: statistics and backward must see the unrounded x_new."""
    inputs = inputs_of("adaln_residual_modulate", (2, 20, 96, 5), dtype)
    inputs["x"] = (inputs["x"].detach() + 100).requires_grad_()
    check("adaln_residual_modulate", inputs, 20)


def test_constant_row() -> None:
    """No variance: eps alone keeps the norm finite, and h is the shift."""
    x, shift, scale = torch.full((1, 3, 33), 2.5), torch.randn(1, 33), torch.randn(1, 33)
    assert torch.equal(wk.adaln_modulate(x, shift, scale), shift[:, None].expand(1, 3, 33))


def test_eps() -> None:
    inputs = inputs_of("adaln_residual_modulate", (1, 4, 24, 2), torch.float32, scale=0.01)
    testing.check_op(
        lambda **kw: wk.adaln_residual_modulate(**kw, eps=0.1),
        lambda **kw: reference.adaln_residual_modulate(**kw, eps=0.1),
        inputs,
        rows=4,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_isa_level(dtype: torch.dtype) -> None:
    info = _native.C.build_info()
    try:
        for isa in info["isa_runnable"]:
            _native.C.set_isa(isa)
            for name in MODULATED:
                for shape in ((2, 6, 7, 3), (1, 40, 65, 5)):
                    check(name, inputs_of(name, shape, dtype), shape[1])
            for shape in ((2, 3, 19, 45, 2), (2, 3, 19, 45, 20)):
                testing.check_op(wk.adaln_lora, reference.adaln_lora, lora_inputs(*shape, dtype), rows=60)
    finally:
        _native.C.set_isa(info["isa"])


# ---- a second oracle ------------------------------------------------------------------------------------------------


def test_against_numpy() -> None:
    """Forward and backward written out by hand in NumPy, token by token."""
    rng = np.random.default_rng(0)
    B, N, D, F, eps = 2, 6, 9, 3, 1e-6
    x, branch, grad_x_new, grad_h = rng.standard_normal((4, B, N, D))
    gate, shift, scale = rng.standard_normal((3, B, F, D))
    x_new, h = np.empty((2, B, N, D))
    grads = {
        n: np.zeros_like(v)
        for n, v in zip(("x", "branch", "gate", "shift", "scale"), (x, branch, gate, shift, scale), strict=True)
    }
    for b, n in np.ndindex(B, N):
        f = n // (N // F)
        row = x_new[b, n] = x[b, n] + gate[b, f] * branch[b, n]
        std = np.sqrt(row.var() + eps)
        xhat = (row - row.mean()) / std
        h[b, n] = xhat * (1 + scale[b, f]) + shift[b, f]
        grads["shift"][b, f] += grad_h[b, n]
        grads["scale"][b, f] += grad_h[b, n] * xhat
        # d xhat_j / d row_i = (delta_ij - 1/D - xhat_i xhat_j / D) / std
        jacobian = (np.eye(D) - 1 / D - np.outer(xhat, xhat) / D) / std
        grad = grad_x_new[b, n] + jacobian @ (grad_h[b, n] * (1 + scale[b, f]))
        grads["x"][b, n] = grad
        grads["branch"][b, n] = gate[b, f] * grad
        grads["gate"][b, f] += branch[b, n] * grad
    leaves = [torch.from_numpy(v).requires_grad_() for v in (x, branch, gate, shift, scale)]
    outputs = wk.adaln_residual_modulate(*leaves, eps=eps)
    np.testing.assert_allclose(outputs[0].detach(), x_new, rtol=1e-13)
    np.testing.assert_allclose(outputs[1].detach(), h, rtol=1e-9, atol=1e-12)
    actual = torch.autograd.grad(outputs, leaves, [torch.from_numpy(grad_x_new), torch.from_numpy(grad_h)])
    for (name, expected), value in zip(grads.items(), actual, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-11, err_msg=name)
    np.testing.assert_allclose(wk.adaln_residual(*leaves[:3]).detach(), x_new, rtol=1e-13)
    modulated = wk.adaln_modulate(torch.from_numpy(x_new), *leaves[3:], eps=eps)
    np.testing.assert_allclose(modulated.detach(), h, rtol=1e-9, atol=1e-12)


# ---- exact properties -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_gate_is_the_residual_bitwise(dtype: torch.dtype) -> None:
    inputs = inputs_of("adaln_residual_modulate", (2, 8, 37, 4), dtype)
    inputs["gate"] = torch.zeros_like(inputs["gate"])
    x_new, h = wk.adaln_residual_modulate(**inputs)
    assert torch.equal(x_new, inputs["x"])
    assert torch.equal(h, wk.adaln_modulate(inputs["x"], inputs["shift"], inputs["scale"]))
    assert torch.equal(wk.adaln_residual(inputs["x"], inputs["branch"], inputs["gate"]), inputs["x"])


def test_one_row_per_token_equals_shared_rows() -> None:
    inputs = inputs_of("adaln_residual_modulate", (2, 6, 20, 3), torch.float32)
    each = {n: v.repeat_interleave(2, 1) if n in ("gate", "shift", "scale") else v for n, v in inputs.items()}
    for a, b in zip(wk.adaln_residual_modulate(**inputs), wk.adaln_residual_modulate(**each), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [*MODULATED, "adaln_lora"])
def test_bit_identical_over_runs_and_threads(name: str, threads: Callable[[int], None]) -> None:
    if name == "adaln_lora":
        cases = [lora_inputs(4, 3, 96, 2048, r, torch.float32) for r in (2, 32)]
    else:
        cases = [inputs_of(name, (2, 640, 96, 5), dtype) for dtype in (torch.float32, torch.bfloat16)]
    for inputs in cases:
        threads(1)
        first = run(getattr(wk, name), inputs)
        for i in range(10):
            threads(2 - i % 2)
            assert all(torch.equal(a, b) for a, b in zip(first, run(getattr(wk, name), inputs), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULATED)
def test_outputs_beyond_the_caches_equal_small_ones(name: str, dtype: torch.dtype) -> None:
    """From 32 MB on outputs are stored past the caches; a sample alone moves less, and has the same bits."""
    inputs = inputs_of(name, (3, 960 * 4 // dtype.itemsize, 1536, 1), dtype, form="sample")

    def results(given: dict[str, Tensor]) -> list[Tensor]:
        outputs = getattr(wk, name)(**given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        tokens = [given[n] for n in MODULATED[name][0]]
        return [*outputs, *torch.autograd.grad([o.sum() for o in outputs], tokens)]

    both = results(inputs)
    for i in range(3):
        alone = results({n: v.detach()[i : i + 1].requires_grad_() for n, v in inputs.items()})
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, both, strict=True))


def test_modulation_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a packed tensor, sliced tokens: taken by stride, forward and backward."""
    inputs = inputs_of("adaln_residual_modulate", (2, 12, 21, 3), torch.float32, form="frame_chunk", layout="sliced")
    permuted = inputs_of("adaln_residual_modulate", (2, 12, 21, 3), torch.float32, form="permuted")
    grads = [torch.randn(2, 12, 21), torch.randn(2, 12, 21)]

    def forbidden(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("a copy")

    for method in ("contiguous", "clone", "to", "reshape"):
        monkeypatch.setattr(Tensor, method, forbidden)
    torch.autograd.grad(wk.adaln_residual_modulate(**inputs), list(inputs.values()), grads)
    with pytest.raises(AssertionError, match="a copy"):  # the trap works: rows scattered in memory have to be gathered
        wk.adaln_residual_modulate(**permuted)


def test_gradient_reaches_the_packed_tensor() -> None:
    x, branch = testing.random(2, 12, 16, seed=1), testing.random(2, 12, 16, seed=2)
    packed = testing.random(2, 96, seed=3)

    def block(op: Callable[..., Any]) -> Tensor:
        gate, shift, scale = packed.chunk(6, -1)[2:5]
        x_new, h = op(x, branch, gate, shift, scale)
        return torch.autograd.grad((x_new * h).sum(), packed)[0]

    torch.testing.assert_close(block(wk.adaln_residual_modulate), block(reference.adaln_residual_modulate))


@pytest.mark.parametrize("used", ["x_new", "h"])
def test_gradient_through_one_output(used: str) -> None:
    index = ("x_new", "h").index(used)
    check_inputs = inputs_of("adaln_residual_modulate", (2, 12, 21, 3), torch.float32)
    if used == "x_new":  # the norm takes no part: its rows get no gradient
        for name in ("shift", "scale"):
            check_inputs[name] = check_inputs[name].detach()
    testing.check_op(
        lambda **kw: wk.adaln_residual_modulate(**kw)[index],
        lambda **kw: reference.adaln_residual_modulate(**kw)[index],
        check_inputs,
        rows=12,
    )


# ---- autograd, registration, compilation ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULATED)
def test_gradcheck(name: str) -> None:
    for form in ("sample", "frame"):
        inputs = inputs_of(name, (2, 4, 3, 2), torch.float64, form=form)
        assert wk.explain(name, **inputs)["cpu"] is None
        assert torch.autograd.gradcheck(getattr(wk, name), tuple(inputs.values()))


@pytest.mark.parametrize("name", MODULATED)
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_opcheck(name: str, layout: str) -> None:
    eps = () if name == "adaln_residual" else (1e-6,)
    for dtype, form in ((torch.float32, "frame"), (torch.bfloat16, "sample_chunk")):
        inputs = inputs_of(name, (2, 6, 5, 3), dtype, form=form, layout=layout)
        torch.library.opcheck(getattr(torch.ops.walt_kernels, name).default, (*inputs.values(), *eps, "cpu"))


def test_compile_without_recompiling() -> None:
    """One graph, forward and backward, for all batch sizes; the same numbers as without compilation."""

    def block(x: Tensor, branch: Tensor, cond: Tensor, base: Tensor, down: Tensor, up: Tensor) -> Tensor:
        gate, shift, scale = wk.adaln_lora(cond, base, down, up)[1].chunk(3, -1)
        x, h = wk.adaln_residual_modulate(x, branch, gate, shift, scale)
        return wk.adaln_residual(x, wk.adaln_modulate(h, shift, scale), gate)

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    weights = {"down": testing.random(4, 7, 8, seed=2), "up": testing.random(4, 48, 7, seed=3)}
    for B in (2, 3, 5):  # 2 is no other size's value: equal sizes would share a symbol
        inputs = {
            "x": testing.random(B, 6, 16),
            "branch": testing.random(B, 6, 16, seed=1),
            "cond": testing.random(B, 8, seed=4),
            "base": testing.random(B, 48, seed=5),
        } | weights
        for actual, expected in zip(run(compiled, inputs), run(block, inputs), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", [*MODULATED, "adaln_lora"])
def test_second_derivative_raises(name: str) -> None:
    is_lora = name == "adaln_lora"
    inputs = lora_inputs(2, 2, 3, 5, 2, torch.float32) if is_lora else inputs_of(name, (2, 6, 5, 3), torch.float32)
    outputs = getattr(wk, name)(**inputs)
    loss = (outputs[1] if isinstance(outputs, tuple) else outputs).square().sum()
    wanted = inputs["cond" if is_lora else "gate" if "gate" in inputs else "x"]
    (grad,) = torch.autograd.grad(loss, wanted, create_graph=True)
    with pytest.raises(
        RuntimeError, match=f"{name} has no second derivative; run it with use_backend\\('reference'\\)"
    ):
        torch.autograd.grad(grad.square().sum(), wanted)
    with wk.use_backend("reference"):
        outputs = getattr(wk, name)(**inputs)
        loss = (outputs[1] if isinstance(outputs, tuple) else outputs).square().sum()
        (grad,) = torch.autograd.grad(loss, wanted, create_graph=True)
        assert torch.isfinite(torch.autograd.grad(grad.square().sum(), wanted)[0]).all()


@pytest.mark.parametrize("shape", [(0, 4, 5, 2), (2, 0, 5, 1), (0, 0, 1, 1)])
def test_empty(shape: tuple[int, int, int, int]) -> None:
    B, N, D, _ = shape
    for name in MODULATED:
        inputs = inputs_of(name, shape, torch.float32)
        *outputs, _ = results = run(getattr(wk, name), inputs)
        assert outputs[0].shape == (B, N, D)
        for value, grad in zip(inputs.values(), results[-len(inputs) :], strict=True):
            assert grad.shape == value.shape
            assert not grad.any()  # sums over no tokens are zero, not memory left unwritten


def test_autocast_keeps_the_dtype_of_x() -> None:
    inputs = inputs_of("adaln_residual_modulate", (2, 12, 21, 3), torch.float32)
    expected = wk.adaln_residual_modulate(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for value, truth in zip(wk.adaln_residual_modulate(**inputs), expected, strict=True):
            assert torch.equal(value, truth)
        # what an autocast layer hands over is narrower than x
        narrow = {n: v.bfloat16() if n != "x" else v for n, v in inputs.items()}
        x_new, h = wk.adaln_residual_modulate(**narrow)
        assert x_new.dtype == h.dtype == torch.float32
        half = inputs_of("adaln_modulate", (2, 12, 21, 3), torch.bfloat16, rows_dtype=torch.float32)
        assert wk.adaln_modulate(**half).dtype == torch.bfloat16
        lora = lora_inputs(2, 3, 8, 12, 2, torch.float32)
        lora |= {n: lora[n].detach().bfloat16() for n in ("cond", "base")}
        out = wk.adaln_lora(**lora)
        with wk.use_backend("reference"):
            again = wk.adaln_lora(**lora)
    assert out.dtype == again.dtype == torch.float32
    widened = {n: v.float() for n, v in lora.items()}
    assert torch.equal(out, wk.adaln_lora(**widened))
    torch.testing.assert_close(out, again)
