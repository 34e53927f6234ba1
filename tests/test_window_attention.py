"""window_attention against its float64 reference, an independent NumPy oracle, and its exact properties."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F

from walt_kernels import _native, explain, use_backend, window_attention
from walt_kernels._dispatch import prepare
from walt_kernels.testing import check_op, embed, random
from walt_kernels.window_attention import reference

pytestmark = pytest.mark.skipif(_native.C is None, reason=f"native kernels: {_native.reason}")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ISA = _native.C.build_info()["isa_runnable"] if _native.C is not None else []


@pytest.fixture(params=ISA)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.C.build_info()["isa"]
    _native.C.set_isa(request.param)
    yield request.param
    _native.C.set_isa(before)


def make(
    B: int = 2,
    T: int = 5,
    H: int = 8,
    W: int = 8,
    heads: int = 2,
    dim: int = 64,
    *,
    window: tuple[int, int, int] = (5, 4, 4),
    dtype: torch.dtype = torch.float32,
    wide: bool = True,
    table: bool = True,
    norm: bool = True,
    context: int = 0,
    scale: float = 1.0,
    layout: str = "packed",
    grad: bool = True,
    **more: Any,
) -> dict[str, Any]:
    """Arguments of a call. ``wide``: table and norms in float32 beside a 16-bit q."""
    if layout == "packed":
        packed = random(B, T, H, W, 3, heads, dim, dtype=dtype, scale=scale, grad=False)
        q, k, v = (x.requires_grad_(grad) for x in packed.unbind(4))
    else:
        made = (random(B, T, H, W, heads, dim, dtype=dtype, scale=scale, grad=grad, seed=i) for i in range(3))
        q, k, v = (embed(x, layout) for x in made)
    kind = torch.promote_types(dtype, torch.float32) if wide else dtype
    inputs: dict[str, Any] = {"q": q, "k": k, "v": v, "window": window}
    if table:
        inputs["bias_table"] = random(heads, *(2 * s - 1 for s in window), dtype=kind, grad=grad, seed=1)
    if norm:
        inputs["q_norm"] = random(dim, dtype=kind, grad=grad, seed=2)
        inputs["k_norm"] = random(dim, dtype=kind, grad=grad, seed=3)
    if context:
        inputs["context_k"] = random(B, context, heads, dim, dtype=dtype, grad=grad, seed=4)
        inputs["context_v"] = random(B, context, heads, dim, dtype=dtype, grad=grad, seed=5)
    return inputs | more


def gradients(inputs: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """The output of a call and the gradients of everything that wants one."""
    out = window_attention(**inputs)
    names = [n for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad]
    grad = random(*out.shape, dtype=out.dtype, grad=False, seed=seed).to(out.device)
    return {"out": out.detach()} | dict(
        zip(names, torch.autograd.grad(out, [inputs[n] for n in names], grad), strict=True)
    )


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for name in a:
        assert torch.equal(a[name], b[name]), name


def mask(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5


CASES: dict[str, dict[str, Any]] = {
    "plain": {"table": False, "norm": False},
    "table": {"norm": False},
    "norm": {"table": False},
    "both": {},
    "spatial": {"T": 2, "H": 16, "W": 16, "window": (1, 16, 16)},
    "odd edges": {"T": 4, "H": 7, "W": 11, "window": (3, 5, 4)},
    "window wider than the video": {"T": 2, "H": 3, "W": 5, "window": (4, 4, 8)},
    "one token": {"T": 1, "H": 1, "W": 1, "window": (1, 1, 1)},
    "one over a block": {"B": 1, "T": 5, "H": 13, "W": 1, "window": (5, 13, 1)},
    "one under a block": {"B": 1, "T": 1, "H": 7, "W": 9, "window": (1, 7, 9)},
    "one over a block of 48": {"B": 1, "T": 1, "H": 7, "W": 7, "window": (1, 7, 7)},
    "one under a block of 48": {"B": 1, "T": 1, "H": 1, "W": 47, "window": (1, 1, 47)},
    "one over a chunk of keys": {"B": 1, "T": 1, "H": 9, "W": 19, "window": (1, 9, 19), "heads": 1},
    "dim 8": {"dim": 8},
    "dim 12": {"dim": 12},
    "dim 72": {"dim": 72},
    "dim 88": {"dim": 88},
    "dim 131": {"dim": 131, "window": (2, 4, 4)},
    "dim 256": {"dim": 256, "window": (1, 4, 4), "T": 2},
    "320 tokens": {"B": 1, "window": (5, 8, 8), "heads": 1, "dim": 72},
    "images": {"image": torch.tensor([True, False])},
    "image frames": {"image": mask(2, 5), "dim": 72},
    "context": {"context": 7},
    "masked context": {"context": 19, "context_mask": mask(2, 19), "window": (2, 3, 4)},
    "empty context": {"context": 3, "context_mask": torch.zeros(2, 3, dtype=torch.bool)},
    "own scale": {"scale": 0.5},
    "norms in q's dtype": {"wide": False},
}


def keys_of(inputs: dict[str, Any]) -> int:
    context = inputs["context_k"].shape[1] if "context_k" in inputs else 0
    return math.prod(inputs["window"]) + context


def check(inputs: dict[str, Any]) -> None:
    # Sums over keys run in the tested dtype for float32 and float64; 16-bit tokens are summed in float32.
    rows = keys_of(inputs) if inputs["q"].dtype in (torch.float32, torch.float64) else 1
    check_op(window_attention, reference.window_attention, inputs, rows=rows)


# ---- against the reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case: str, dtype: torch.dtype) -> None:
    check(make(**CASES[case], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [4.0, 16.0])
@pytest.mark.parametrize("norm", [True, False])
def test_large_inputs(scale: float, norm: bool, dtype: torch.dtype) -> None:
    check(make(dtype=dtype, scale=scale, norm=norm))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_that_the_bias_hides(dtype: torch.dtype, isa: str) -> None:
    """No query sees an earlier frame: the last ones see none of the first 64 keys."""
    inputs = make(dtype=dtype)
    with torch.no_grad():
        inputs["bias_table"][:, 5:] = -math.inf
    check(inputs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    inputs = make(T=3, window=(2, 4, 4), dim=40, layout=layout, dtype=dtype, context=5)
    for name in ("context_k", "context_v"):
        inputs[name] = embed(inputs[name], layout)
    check(inputs)


def test_expanded_batch_and_gradient() -> None:
    inputs = make(B=1, grad=False)
    for name in "qkv":
        inputs[name] = inputs[name].expand(3, -1, -1, -1, -1, -1).requires_grad_()
    check(inputs)
    out = window_attention(**inputs)
    (grad,) = torch.autograd.grad(out.sum(), inputs["v"])  # the incoming gradient has stride 0 everywhere
    (truth,) = torch.autograd.grad(reference.window_attention(**inputs).sum(), inputs["v"])
    torch.testing.assert_close(grad, truth)


def test_output_is_contiguous() -> None:
    out = window_attention(**make(layout="permuted"))
    assert out.shape == (2, 5, 8, 8, 2, 64)
    assert out.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_isa_level(isa: str, dtype: torch.dtype) -> None:
    assert _native.C.build_info()["isa"] == isa
    for options in (
        {"dim": 72, "H": 7, "W": 9},
        {"dim": 12, "context": 5, "context_mask": mask(2, 5)},
        {"image": mask(2, 5)},
    ):
        check(make(**options, dtype=dtype))


@pytest.mark.parametrize("level", sorted({"avx512", "amx"} & {*ISA}))
@pytest.mark.parametrize("case", CASES)
def test_every_case_on_pairs_and_on_tiles(case: str, level: str) -> None:
    before = _native.C.build_info()["isa"]
    _native.C.set_isa(level)
    try:
        check(make(**CASES[case], dtype=torch.bfloat16))
    finally:
        _native.C.set_isa(before)


# ---- against other definitions --------------------------------------------------------------------------------------


def numpy_window_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, window: tuple[int, int, int], **options: Any
) -> np.ndarray:
    """The docstring of window_attention, written as loops over queries."""
    B, T, H, W, heads, dim = q.shape
    table, image = options.get("bias_table"), options.get("image")
    context_k, context_v, seen = (options.get(n) for n in ("context_k", "context_v", "context_mask"))

    def norm(x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
        return x if weight is None else (x - x.mean()) / np.sqrt(x.var() + 1e-6) * weight

    out = np.empty_like(q)
    positions = [(t, h, w) for t in range(T) for h in range(H) for w in range(W)]
    for b in range(B):
        for i in positions:
            mates = [j for j in positions if all(a // s == c // s for a, c, s in zip(i, j, window, strict=True))]
            if image is not None:
                mates = [i] if image[b, i[0]] else [j for j in mates if not image[b, j[0]]]
            for n in range(heads):
                query = norm(q[(b, *i, n)], options.get("q_norm"))
                scores = [query @ norm(k[(b, *j, n)], options.get("k_norm")) / math.sqrt(dim) for j in mates]
                values = [v[(b, *j, n)] for j in mates]
                if table is not None:
                    for m, j in enumerate(mates):
                        scores[m] += table[n][tuple(a - c + s - 1 for a, c, s in zip(i, j, window, strict=True))]
                for c in range(0 if context_k is None else context_k.shape[1]):
                    if seen is None or seen[b, c]:
                        scores.append(query @ norm(context_k[b, c, n], options.get("k_norm")) / math.sqrt(dim))
                        values.append(context_v[b, c, n])
                out[(b, *i, n)] = scipy.special.softmax(np.array(scores)) @ np.array(values)
    return out


@pytest.mark.parametrize(
    "options",
    [{"image": mask(2, 3)}, {"context": 4, "context_mask": mask(2, 4)}, {"norm": False, "table": False}],
    ids=["image", "context", "plain"],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_matches_numpy(options: dict[str, Any], backend: str) -> None:
    inputs = make(2, 3, 3, 5, 2, 8, window=(2, 2, 3), dtype=torch.float64, grad=False, **options)
    arrays = {n: x.numpy() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    with use_backend(backend):
        out = window_attention(**inputs)
    np.testing.assert_allclose(out.numpy(), numpy_window_attention(**arrays), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_window_over_everything_is_full_attention(dtype: torch.dtype) -> None:
    inputs = make(window=(5, 8, 8), table=False, norm=False, dtype=dtype)
    q, k, v = (inputs[n].flatten(1, 3).transpose(1, 2) for n in "qkv")
    full = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(1, (5, 8, 8))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(window_attention(**inputs), full, rtol=16 * eps, atol=16 * eps)


# ---- exact properties -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_frame", [False, True], ids=["per sample", "per frame"])
def test_image_frames_pass_v_through(per_frame: bool, dtype: torch.dtype) -> None:
    image = mask(3, 5) if per_frame else torch.tensor([True, False, True])
    inputs = make(B=3, image=image, dtype=dtype)
    result = gradients(inputs)
    still = image if per_frame else image[:, None].expand(3, 5)
    grad = random(*result["out"].shape, dtype=dtype, grad=False)
    assert torch.equal(result["out"][still], inputs["v"][still])
    assert torch.equal(result["v"][still], grad[still])
    assert not result["q"][still].any()
    assert not result["k"][still].any()
    assert result["q"][~still].abs().amax((1, 2, 4)).gt(0).all()


def test_image_frames_leave_no_trace() -> None:
    """Their q, k and v change nothing for video tokens, and nothing flows from them into table and norms."""
    image = mask(2, 5)
    inputs = make(image=image)
    result = gradients(inputs)
    for name in "qkv":
        x = inputs[name].detach().clone()
        x[image] = math.nan
        inputs[name] = x.requires_grad_()
    changed = gradients(inputs)
    assert torch.equal(changed["out"][~image], result["out"][~image])
    for name in ("bias_table", "q_norm", "k_norm"):
        assert torch.equal(changed[name], result[name]), name

    only_images = gradients(make(image=torch.tensor([True, True])))
    for name in ("bias_table", "q_norm", "k_norm"):
        assert not only_images[name].any(), name


def test_windows_do_not_see_each_other() -> None:
    inputs = make(window=(2, 4, 4), grad=False)
    out = window_attention(**inputs)
    for name in "qkv":
        inputs[name] = inputs[name].clone()
        inputs[name][:, :2, :4, :4] = math.nan
    changed = window_attention(**inputs)
    assert changed[:, :2, :4, :4].isnan().all()
    changed[:, :2, :4, :4] = out[:, :2, :4, :4]
    assert torch.equal(changed, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sample_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    inputs = make(B=3, context=5, dtype=dtype)
    whole = gradients(inputs)
    per_sample = ("q", "k", "v", "context_k", "context_v")
    alone = {n: inputs[n].detach()[1:2].requires_grad_() if n in per_sample else x for n, x in inputs.items()}
    out = window_attention(**alone)
    grad = random(*whole["out"].shape, dtype=dtype, grad=False)[1:2]
    assert torch.equal(out[0], whole["out"][1])
    for name, g in zip(per_sample, torch.autograd.grad(out, [alone[n] for n in per_sample], grad), strict=True):
        assert torch.equal(g[0], whole[name][1]), name


@pytest.mark.parametrize("options", [{"image": mask(2, 5)}, {"context": 5}], ids=["image", "context"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ten_runs_and_any_thread_count_are_bit_identical(options: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = make(dtype=dtype, **options)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = gradients(inputs)
        torch.set_num_threads(2)
        for _ in range(10):
            equal(gradients(inputs), first)
    finally:
        torch.set_num_threads(threads)


# ---- autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"image": torch.tensor([[True, False, False]])},
        {"context": 3, "context_mask": torch.tensor([[True, False, True]])},
    ],
    ids=["image", "context"],
)
def test_gradcheck(options: dict[str, Any]) -> None:
    inputs = make(1, 3, 3, 1, 2, 8, window=(2, 2, 2), dtype=torch.float64, **options)
    names = [n for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad]
    assert explain("window_attention", **inputs)["cpu"] is None

    def op(*tensors: torch.Tensor) -> torch.Tensor:
        return window_attention(**inputs | dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(op, [inputs[n] for n in names])


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias_table", "q_norm", "k_norm", "context_k", "context_v"])
def test_one_gradient_alone(wanted: str) -> None:
    inputs = make(context=5)
    everything = gradients(inputs)
    alone = {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    alone[wanted].requires_grad_()
    result = gradients(alone)
    assert set(result) == {"out", wanted}
    assert torch.equal(result[wanted], everything[wanted])


def test_what_needs_no_gradient_gets_no_memory() -> None:
    arguments = prepare("window_attention", **make())
    out, lse = torch.ops.walt_kernels.window_attention(**arguments, backend="cpu")
    assert lse.dtype == torch.float32
    assert not lse.requires_grad
    saved = {"grad_out": torch.ones_like(out), "out": out, "lse": lse, "wanted": [True] + [False] * 7}
    grads = torch.ops.walt_kernels.window_attention_backward(**arguments, **saved, backend="cpu")
    assert [g.numel() for g in grads] == [out.numel()] + [0] * 7


def test_second_derivative_says_so() -> None:
    inputs = make()
    (grad,) = torch.autograd.grad(window_attention(**inputs).sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"window_attention has no second derivative.*use_backend"):
        grad.sum().backward()
    with use_backend("reference"):
        (grad,) = torch.autograd.grad(window_attention(**inputs).sum(), inputs["q"], create_graph=True)
    grad.square().sum().backward()
    assert inputs["q"].grad.isfinite().all()


def test_no_incoming_gradient() -> None:
    class Unused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> None:
            return None

    inputs = make()
    Unused.apply(window_attention(**inputs)).sum().backward()
    assert inputs["q"].grad is None


def test_empty_batch() -> None:
    inputs = make(B=0, context=4)
    result = gradients(inputs)
    assert result["out"].shape == (0, 5, 8, 8, 2, 64)
    for name in ("bias_table", "q_norm", "k_norm"):
        assert not result[name].any(), name


# ---- torch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("options", [{"image": mask(2, 3)}, {"context": 3}], ids=["image", "context"])
def test_opcheck(layout: str, options: dict[str, Any]) -> None:
    inputs = make(2, 3, 4, 4, 2, 16, window=(3, 2, 3), layout=layout, **options)
    arguments = {**prepare("window_attention", **inputs), "backend": "cpu"}
    torch.library.opcheck(torch.ops.walt_kernels.window_attention.default, (), arguments)
    out, lse = torch.ops.walt_kernels.window_attention(**arguments)
    detached = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    wanted = [True] * 6 + ["context_k" in inputs] * 2
    saved = {"grad_out": torch.ones_like(out), "out": out.detach(), "lse": lse, "wanted": wanted}
    torch.library.opcheck(torch.ops.walt_kernels.window_attention_backward.default, (), {**detached, **saved})


def test_compiles_whole_without_recompiling_for_batch_sizes() -> None:
    from torch._dynamo.utils import counters

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, image: torch.Tensor, **more: Any) -> torch.Tensor:
        return window_attention(q, k, v, image=image, **more) * 2

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    names = ["q", "k", "v", "bias_table", "q_norm", "k_norm"]
    for B in (4, 6, 7):  # unlike any other size: equal sizes are taken to be one
        inputs = make(B, image=mask(B, 5))
        out, expected = compiled(**inputs), layer(**inputs)
        assert torch.equal(out, expected)
        wanted = [inputs[n] for n in names]
        for name, a, b in zip(names, *(torch.autograd.grad(x.sum(), wanted) for x in (out, expected)), strict=True):
            assert torch.equal(a, b), name
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_autocast_casts_tokens_and_keeps_parameters() -> None:
    inputs = make(context=3)
    with torch.autocast("cpu", torch.bfloat16):
        out = window_attention(**inputs)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert {n: inputs[n].grad.dtype for n in ("q", "context_v", "bias_table")} == dict.fromkeys(
        ("q", "context_v", "bias_table"), torch.float32
    )
    half = {n: x.bfloat16() if n in ("q", "k", "v", "context_k", "context_v") else x for n, x in inputs.items()}
    assert torch.equal(out, window_attention(**half))


# ---- bad arguments --------------------------------------------------------------------------------------------------

x = torch.zeros(2, 5, 8, 8, 2, 16)
c = torch.zeros(2, 3, 2, 16)
still = torch.zeros(2, dtype=torch.bool)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": [1.0]}, TypeError, "q is a list, expected a tensor"),
    ({"k": None}, TypeError, "k is a NoneType, expected a tensor"),
    ({"q": x[0]}, ValueError, r"q has shape \(5, 8, 8, 2, 16\), expected 6 dimensions \[B, T, H, W, heads, dim\]"),
    (
        {"q": x.int()},
        TypeError,
        "q has dtype torch.int32, expected one of torch.float32, torch.float64, torch.bfloat16, torch.float16",
    ),
    ({"k": x.double()}, TypeError, "k has dtype torch.float64, expected torch.float32 as q has"),
    ({"v": x.to("meta")}, ValueError, "v is on meta, expected cpu as q is"),
    ({"k": x[:, :4]}, ValueError, r"k has shape \(2, 4, 8, 8, 2, 16\), expected \(2, 5, 8, 8, 2, 16\), q's shape"),
    ({"v": x[..., :1, :]}, ValueError, r"v has shape \(2, 5, 8, 8, 1, 16\), expected \(2, 5, 8, 8, 2, 16\), q's shape"),
    ({"q": x[:, :0]}, ValueError, "q has shape .*, expected at least one frame, row, column and head"),
    (dict.fromkeys("qkv", x[..., :7]), ValueError, "q has dim 7 in its last dimension, expected 8 to 256"),
    ({"window": (1, 0, 4)}, ValueError, r"window is \(1, 0, 4\), expected three positive integers \(t, h, w\)"),
    ({"window": (4, 4)}, ValueError, r"window is \(4, 4\), expected three positive integers \(t, h, w\)"),
    ({"window": 4}, TypeError, r"window is 4, expected three integers \(t, h, w\)"),
    ({"window": (1, 4.0, 4)}, TypeError, r"window is \(1, 4.0, 4\), expected three integers"),
    (
        {"bias_table": torch.zeros(2, 9, 7, 8)},
        ValueError,
        r"bias_table has shape \(2, 9, 7, 8\), expected \(2, 9, 7, 7\), \[heads, 2t-1, 2h-1, 2w-1\]",
    ),
    ({"bias_table": torch.zeros(3, 9, 7, 7)}, ValueError, r"bias_table has shape .*, expected \(2, 9, 7, 7\)"),
    (
        {"bias_table": torch.zeros(2, 9, 7, 7).double()},
        TypeError,
        "bias_table has dtype torch.float64, expected one of torch.float32, torch.bfloat16, torch.float16",
    ),
    ({"q_norm": torch.zeros(15)}, ValueError, r"q_norm has shape \(15,\), expected \(16,\), \[dim\]"),
    (
        {"k_norm": torch.zeros(16, dtype=torch.int)},
        TypeError,
        "k_norm has dtype torch.int32, expected one of torch.float32",
    ),
    ({"norm_eps": -1.0}, ValueError, "norm_eps is -1.0, expected a number >= 0"),
    ({"norm_eps": "small"}, TypeError, "norm_eps is 'small', expected a number"),
    ({"scale": math.inf}, ValueError, "scale is inf, expected a finite number"),
    ({"scale": x}, TypeError, "scale is a Tensor, expected a number"),
    ({"image": still.float()}, TypeError, "image has dtype torch.float32, expected torch.bool"),
    ({"image": still[:1]}, ValueError, r"image has shape \(1,\), expected \[B\] = \(2,\) or \[B, T\] = \(2, 5\)"),
    ({"image": still[:, None].expand(2, 4)}, ValueError, r"image has shape \(2, 4\), expected \[B\]"),
    ({"image": still, "context_k": c, "context_v": c}, ValueError, "image is given together with context_k"),
    ({"context_k": c}, ValueError, "context_v is None while context_k is given"),
    ({"context_v": c}, ValueError, "context_k is None while context_v is given"),
    ({"context_mask": still}, ValueError, "context_k is None while context_mask is given"),
    ({"context_k": c[0], "context_v": c}, ValueError, r"context_k has shape \(3, 2, 16\), expected 4 dimensions"),
    ({"context_k": c[:1], "context_v": c}, ValueError, r"context_k has shape .*, expected \(2, 3, 2, 16\)"),
    ({"context_k": c, "context_v": c[:, :2]}, ValueError, r"context_v has shape .*, expected \(2, 3, 2, 16\)"),
    ({"context_k": c.half(), "context_v": c}, TypeError, "context_k has dtype torch.float16, expected torch.float32"),
    (
        {"context_k": c, "context_v": c, "context_mask": still},
        ValueError,
        r"context_mask has shape \(2,\), expected \(2, 3\), \[B, L\]",
    ),
    (
        {"context_k": c, "context_v": c, "context_mask": torch.zeros(2, 3)},
        TypeError,
        "context_mask has dtype torch.float32, expected torch.bool",
    ),
]


@pytest.mark.parametrize(("changes", "error", "text"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments = {"q": x, "k": x, "v": x, "window": (5, 4, 4)} | changes
    for call in (window_attention, lambda **kwargs: explain("window_attention", **kwargs)):
        with pytest.raises(error, match=text) as info:
            call(**arguments)
        assert "\n" not in str(info.value)
