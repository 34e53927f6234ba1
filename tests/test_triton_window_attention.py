"""The Triton kernels of window_attention against the float64 reference, and exact properties (``pytest.mark.gpu``)."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from on_gpu import DEVICE, DTYPES, check, marks, on_device, through, without_plans
from test_window_attention import equal, gradients, keys_of, make, mask
from torch import Tensor

from walt_kernels import _dispatch, _triton, use_backend, window_attention
from walt_kernels.testing import embed, random

pytestmark = marks()

SMALL = {"B": 1, "heads": 1}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"T": 1, "window": (1, 8, 8), "table": False, "norm": False, "dim": 16},
    "bias and norms, two tiles of tokens, dim in two tiles": {"T": 2, "H": 5, "W": 4, "window": (2, 5, 4), "dim": 72},
    "normed ahead, image frames": {"T": 5, "H": 4, "W": 4, "window": (5, 4, 4), "image": mask(1, 5), "dim": 24},
    "normed ahead, edges, context": {"H": 6, "W": 9, "T": 2, "window": (2, 5, 7), "context": 20, "dim": 16},
    "edges": {"B": 2, "heads": 2, "T": 3, "H": 2, "W": 3, "window": (2, 2, 2), "dim": 12},
    "window wider than the video": {"T": 2, "H": 3, "W": 3, "window": (4, 4, 8), "dim": 24},
    "one token": {"T": 1, "H": 1, "W": 1, "window": (1, 1, 1), "dim": 8},
    "dim 131": {"T": 1, "H": 3, "W": 3, "window": (1, 3, 3), "dim": 131},
    "dim 256": {"T": 1, "H": 2, "W": 2, "window": (1, 2, 2), "dim": 256},
    "images": {"B": 2, "T": 2, "H": 4, "W": 4, "window": (1, 4, 4), "image": torch.tensor([True, False]), "dim": 16},
    "image frames": {"T": 3, "H": 3, "W": 3, "window": (3, 3, 3), "image": torch.tensor([[0, 1, 0]]) > 0, "dim": 24},
    "images, dim 72": {"T": 3, "H": 2, "W": 2, "window": (2, 2, 2), "image": torch.tensor([[1, 1, 0]]) > 0, "dim": 72},
    "context": {"B": 2, "T": 1, "H": 3, "W": 4, "window": (1, 3, 2), "context": 35, "masked": True, "dim": 24},
    "dim in two tiles, context": {"T": 1, "H": 3, "W": 3, "window": (1, 3, 3), "context": 2, "dim": 88},
    "own scale": {"T": 1, "H": 4, "W": 4, "window": (1, 4, 4), "context": 3, "dim": 8, "norm": False},
}


def sample(case: str, **more: Any) -> dict[str, Any]:
    options = SMALL | CASES[case] | more
    if options.pop("masked", False):
        options["context_mask"] = mask(options["B"], options["context"])
    inputs = make(**options)
    return inputs | {"scale": 0.5} if case == "own scale" else inputs


def matches(inputs: dict[str, Any], **options: Any) -> None:
    check(window_attention, inputs, rows=keys_of(inputs), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case: str, dtype: torch.dtype) -> None:
    matches(sample(case, dtype=dtype))


@pytest.mark.skipif(len(DTYPES) == 1, reason="whole windows take long in the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 72, 88, 128])
@pytest.mark.parametrize("window", [(5, 4, 4), (1, 16, 16), (5, 8, 8), (7, 8, 8), (5, 8, 14), (5, 16, 16)], ids=str)
def test_windows_of_the_model(window: tuple[int, int, int], dim: int, dtype: torch.dtype) -> None:
    matches(make(2, window[0] + 1, 2 * window[1], window[2], 2, dim, window=window, dtype=dtype))


@pytest.mark.parametrize(("norm", "scale"), [(True, 16.0), (False, 4.0), (False, 16.0)])
def test_large_inputs(norm: bool, scale: float) -> None:
    # Without norms and at 16 every row sees one key alone. The reference's gradient of its scores is then zero to the
    # bit, dP - dP; ours is dP - delta, two sums of the same terms in different orders. So there only the output is held
    # against it.
    inputs = make(1, 1, 4, 4, 1, 16, window=(1, 4, 4), scale=scale, norm=norm)
    matches(inputs, backward=norm or scale < 16)


@pytest.mark.parametrize("layout", ["channels_last", "permuted", "sliced"])
def test_layouts(layout: str) -> None:
    """Strides of every kind, masks included; what surrounds a sliced tensor is NaN."""
    inputs = make(2, 1, 3, 3, 2, 8, window=(1, 3, 3), layout=layout, context=5, context_mask=mask(5, 2).t())
    for name in ("context_k", "context_v"):
        inputs[name] = embed(inputs[name], layout)
    matches(inputs)


def test_expanded_batch_and_gradient() -> None:
    inputs = make(1, 1, 3, 3, 1, 8, window=(1, 3, 3))
    for name in "qkv":
        inputs[name] = inputs[name].detach().expand(2, -1, -1, -1, -1, -1).requires_grad_()
    inputs = on_device(inputs)
    grads = []
    for backend in ("triton", "reference"):
        out = through(backend, window_attention)(**inputs)
        grads.append(torch.autograd.grad(out.sum(), [inputs[n] for n in "vqk"]))  # stride 0 everywhere
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_64_bit_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch that tensors of more than 2^31 elements take, on a small one."""
    geometry = importlib.import_module("walt_kernels.window_attention.triton_geometry")
    monkeypatch.setattr(geometry, "NARROW", 1)
    matches(sample("dim in two tiles, context", T=2, window=(2, 3, 3), context=2))


@pytest.mark.parametrize("narrow", [2**31, 1], ids=["32 bits", "64 bits"])
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced"])
def test_rows_normed_ahead(layout: str, narrow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = importlib.import_module("walt_kernels.window_attention.triton_geometry")
    monkeypatch.setattr(geometry, "NARROW", narrow)
    inputs = on_device(make(2, 2, 3, 2, 2, 24, window=(1, 3, 2), layout=layout))
    call = geometry.Geometry(_dispatch.prepare("window_attention", **inputs))
    call.normed = True
    call.norm("k", "k_norm", "keys")
    expected = torch.nn.functional.layer_norm(inputs["k"], (24,), inputs["k_norm"], eps=call.arguments["norm_eps"])
    torch.testing.assert_close(call.arguments["keys"].at, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_float32_table_is_read_as_float16(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside 16-bit tokens: right for large entries, exact for those that float16 holds; -inf hides its pairs."""
    inputs = make(1, 1, 3, 4, 1, 8, window=(1, 3, 4), dtype=dtype)
    table = 16 * inputs["bias_table"].detach()
    table[:, :, 0] = -torch.inf
    matches(inputs | {"bias_table": table.requires_grad_()})
    inputs = on_device(inputs | {"bias_table": table.detach().half().float().requires_grad_()})
    geometry = importlib.import_module("walt_kernels.window_attention.triton_geometry").Geometry
    without_plans(monkeypatch)
    found = []
    for kind in (torch.float16, torch.float32):
        monkeypatch.setattr(geometry, "bias_dtype", lambda _, kind=kind: kind)
        found.append(results(inputs))
    assert not found[0]["bias_table"][:, :, 0].any()
    equal(*found)


# ---- exact properties -----------------------------------------------------------------------------------------------


def results(
    inputs: dict[str, Any],
) -> dict[str, Tensor]:
    """The output of a call and the gradients of everything that wants one, on the Triton backend."""
    with use_backend("triton"):
        return gradients(inputs)


@pytest.mark.parametrize("dim", [24, 72])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_image_frames_pass_v_through_and_leave_no_trace(dtype: torch.dtype, dim: int) -> None:
    image = torch.tensor([[True, False, True], [True, True, True], [False, False, True]])
    inputs = on_device(make(3, 3, 3, 3, 1, dim, window=(2, 3, 3), image=image, dtype=dtype))
    image = inputs["image"]
    result = results(inputs)
    grad = random(*result["out"].shape, dtype=dtype, grad=False).to(image.device)
    assert torch.equal(result["out"][image], inputs["v"][image])
    assert torch.equal(result["v"][image], grad[image])
    assert not result["q"][image].any()
    assert not result["k"][image].any()
    assert result["q"][~image].abs().amax((1, 2, 4)).gt(0).all()
    for name in "qkv":
        x = inputs[name].detach().clone()
        x[image] = torch.nan
        inputs[name] = x.requires_grad_()
    changed = results(inputs)
    for name in ("bias_table", "q_norm", "k_norm"):
        assert torch.equal(changed[name], result[name]), name
    assert torch.equal(changed["out"][~image], result["out"][~image])


def test_only_images_give_no_gradient() -> None:
    inputs = on_device(make(1, 2, 3, 3, 1, 16, window=(2, 3, 3), image=torch.tensor([True])))
    result = results(inputs)
    assert torch.equal(result["out"], inputs["v"])
    for name in ("q", "k", "bias_table", "q_norm", "k_norm"):
        assert not result[name].any(), name


def test_windows_do_not_see_each_other() -> None:
    inputs = on_device(make(1, 3, 4, 3, 1, 16, window=(2, 2, 3)))
    result = results(inputs)
    for name in "qkv":
        x = inputs[name].detach().clone()
        x[:, :2, :2] = torch.nan
        inputs[name] = x.requires_grad_()
    changed = results(inputs)
    for name in ("out", "q", "k", "v"):
        assert changed[name][:, :2, :2].isnan().all(), name
        changed[name][:, :2, :2] = result[name][:, :2, :2]
        assert torch.equal(changed[name], result[name]), name


@pytest.mark.parametrize("options", [{}, {"dim": 72}, {"context": 5}], ids=["own", "dim 72", "context"])
def test_a_sample_does_not_depend_on_its_batch(options: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"dim": 16, "window": (1, 2, 3)}
    inputs = on_device(make(2, 1, 6, 3, 1, **sizes | options))
    whole = results(inputs)
    per_sample = [n for n in ("q", "k", "v", "context_k", "context_v") if n in inputs]
    alone = inputs | {n: inputs[n].detach()[1:].requires_grad_() for n in per_sample}
    with use_backend("triton"):
        out = window_attention(**alone)
    grad = random(*whole["out"].shape, dtype=out.dtype, grad=False)[1:].to(out.device)
    assert torch.equal(out[0], whole["out"][1])
    for name, g in zip(per_sample, torch.autograd.grad(out, [alone[n] for n in per_sample], grad), strict=True):
        assert torch.equal(g[0], whole[name][1]), name


@pytest.mark.parametrize(("dim", "options"), [(16, {"image": mask(2, 2)}), (72, {}), (16, {"context": 5})], ids=str)
def test_runs_are_bit_identical(dim: int, options: dict[str, Any]) -> None:
    inputs = on_device(make(2, 2, 3, 3, 1, dim, window=(1, 3, 2), dtype=DTYPES[-1], **options))
    first = results(inputs)
    for _ in range(1 if len(DTYPES) == 1 else 9):
        equal(results(inputs), first)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias_table", "q_norm", "k_norm", "context_k", "context_v"])
def test_one_gradient_alone_and_what_it_costs(wanted: str) -> None:
    """A gradient alone is bitwise the one beside all others; without the table's no kernel of its runs."""
    inputs = on_device(make(1, 1, 2, 3, 1, 8, window=(1, 2, 3), context=3))
    everything = results(inputs)[wanted]
    inputs = {n: x.detach() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    inputs[wanted].requires_grad_()
    with use_backend("triton"):
        out = window_attention(**inputs)
    with _triton.record(_triton.target(out.device)) as launches:
        out.backward(torch.ones_like(out))
    names = [x.kernel.__name__ for x in launches]
    assert ("bias_backward_kernel" in names) == (wanted == "bias_table")
    assert names.count("bias_kernel") <= 2  # by query and by key
    assert names.count("sum_rows_kernel") <= 2
    inputs[wanted].grad = None
    assert torch.equal(results(inputs)[wanted], everything)


def test_nothing_in_nothing_out() -> None:
    inputs = on_device(make(0, 1, 2, 2, 1, 8, window=(1, 2, 2)))
    result = results(inputs)
    assert result["out"].shape == (0, 1, 2, 2, 1, 8)
    assert not result["bias_table"].any()
    inputs = on_device(make(1, 1, 2, 2, 1, 8, window=(1, 2, 2), context=1))
    for name in ("context_k", "context_v"):  # a context of no tokens
        inputs[name] = inputs[name].detach()[:, :0].requires_grad_()
    matches(inputs)


def test_nothing_is_the_size_of_the_input() -> None:
    """Launches read the tensors themselves, however they lie in memory; of larger windows, all but normed keys."""
    for window, normed in (((1, 2, 2), ""), ((2, 6, 6), "k")):
        inputs = on_device(make(1, *window, 2, 8, window=window))
        with use_backend("triton"), _triton.record(_triton.target(inputs["q"].device)) as launches:
            window_attention(**inputs)
        arguments = launches[-1].arguments
        for name, argument in (("q", "q"), ("k", "keys"), ("v", "v")):
            assert (arguments[argument].at.data_ptr() == inputs[name].data_ptr()) == (name != normed), name


@pytest.mark.large
@pytest.mark.skipif(DEVICE == "cpu", reason="more than 2^31 elements need a GPU")
def test_more_elements_than_32_bits_count() -> None:
    packed = torch.randn(2, 1, 1088, 1024, 3, 4, 88, device=DEVICE, dtype=torch.bfloat16)
    assert packed.numel() > 2**31
    q, k, v = packed.unbind(4)
    out = through("triton", window_attention)(q=q, k=k, v=v, window=(1, 16, 16))
    corner = {n: x[1:, :, -16:, -16:] for n, x in {"q": q, "k": k, "v": v}.items()}
    expected = through("triton", window_attention)(**corner, window=(1, 16, 16))
    assert torch.equal(out[1:, :, -16:, -16:], expected)
