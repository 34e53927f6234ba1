"""The Triton kernels of video_norm against the float64 reference, and exact properties (``pytest.mark.gpu``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from on_gpu import DEVICE, DTYPES, check, marks, on_device, through
from torch import Tensor

from walt_kernels import _dispatch, _triton, video_norm
from walt_kernels.testing import embed, random

pytestmark = marks()

NAMES = ("x", "weight", "bias", "scale", "shift")
FORMATS = ("contiguous", "channels_last")
OVER = ("frame", "clip", "pixel")


def sample(
    shape: tuple[int, ...] = (1, 6, 2, 3, 5),
    layout: str = "channels_last",
    dtype: torch.dtype = DTYPES[0],
    given: str = "weight bias scale shift",
    per_frame: tuple[str, ...] = ("shift",),
    rows_dtype: torch.dtype | None = None,
    **options: Any,
) -> dict[str, Any]:
    B, C, T = shape[:3]
    rows = {name: (C,) if name in ("weight", "bias") else (B, C, T) if name in per_frame else (B, C) for name in NAMES}
    inputs = {name: random(*rows[name], dtype=rows_dtype or dtype, seed=len(name)) for name in given.split()}
    return {"x": embed(random(*shape, dtype=dtype), layout), **inputs, **options}


def compare(inputs: dict[str, Any]) -> None:
    x = inputs["x"]
    rows = x.shape[1] if inputs.get("over") == "pixel" else x[0].numel()
    check(video_norm, inputs, rows=rows)


def norm(**inputs: Any) -> Tensor:
    return through("triton", video_norm)(**on_device(inputs)).detach()


def launched(inputs: dict[str, Any]) -> list[str]:
    """The kernels of a call and its gradients."""
    checked = _dispatch.prepare("video_norm", **inputs)
    with _triton.record(_triton.TARGETS["sm_90"]) as launches:
        _dispatch.op("video_norm").both_passes("triton", checked)
    return [launch.kernel.fn.__name__.removeprefix("video_norm_").removesuffix("_kernel") for launch in launches]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("over", "groups"), [("frame", 1), ("frame", 3), ("clip", 1), ("clip", 3), ("pixel", 1)])
def test_matches_the_reference(
    over: str, groups: int, layout: str, activation: str | None, center: bool, dtype: torch.dtype
) -> None:
    compare(sample(layout=layout, dtype=dtype, over=over, groups=groups, activation=activation, center=center))


# Few and many pixels, a part of a frame that is cut short, groups of every kind: padded, exact, wider than a tile.
SIZES = (
    ((1, 3, 1, 1, 1), 3),
    ((2, 5, 2, 7, 5), 1),
    ((1, 24, 1, 33, 17), 3),
    ((1, 96, 1, 33, 17), 32),
    ((1, 32, 1, 33, 17), 4),
    ((1, 136, 2, 17, 9), 1),
    ((1, 128, 1, 2, 3), 32),
)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize(("shape", "groups"), SIZES, ids=str)
def test_sizes(shape: tuple[int, ...], groups: int, over: str, layout: str) -> None:
    groups = 1 if over == "pixel" else groups
    compare(sample(shape, layout, DTYPES[-1], over=over, groups=groups, activation="silu"))


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("given", ["", "weight", "bias", "scale", "shift", "scale shift"])
def test_modulation_that_is_given(given: str, over: str) -> None:
    for per_frame in ((), ("scale", "shift")):
        compare(sample((2, 6, 2, 2, 3), given=given, per_frame=per_frame, over=over, activation="silu"))


@pytest.mark.parametrize("wanted", NAMES)
@pytest.mark.parametrize("shape", [(1, 6, 2, 3, 2), (1, 16, 1, 33, 32)], ids=str)
def test_gradients_are_computed_only_where_wanted(shape: tuple[int, ...], wanted: str) -> None:
    for over in OVER:
        inputs = sample(shape, over=over, activation="silu")
        compare({n: v.detach() if isinstance(v, Tensor) and n != wanted else v for n, v in inputs.items()})


@pytest.mark.skipif(len(DTYPES) == 1, reason="16-bit video needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_float32_modulation_of_16_bit_video(dtype: torch.dtype) -> None:
    compare(sample(dtype=dtype, rows_dtype=torch.float32, activation="silu"))


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("layout", ["permuted", "sliced", "channels_last", "contiguous"])
def test_layouts_of_all_tensors(layout: str, over: str) -> None:
    inputs = sample((2, 6, 2, 5, 3), layout, over=over, groups=1)
    compare(inputs | {name: embed(inputs[name], layout) for name in ("scale", "shift")})


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("layout", FORMATS)
def test_slices_in_time_are_read_where_they_are(layout: str, over: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_copy(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a slice in time was copied")

    whole = sample((2, 6, 5, 5, 3), layout)["x"]
    inputs = sample((2, 6, 3, 5, 3), over=over) | {"x": whole[:, :, 1:4].detach().requires_grad_()}
    expected = norm(**inputs)
    leaves = on_device(inputs)
    monkeypatch.setattr(Tensor, "clone", no_copy)
    monkeypatch.setattr(Tensor, "contiguous", no_copy)
    y = through("triton", video_norm)(**leaves)
    grad_of_slice = torch.empty_like(whole, device=DEVICE).fill_(0.5)[:, :, 1:4]
    torch.autograd.grad(y, [leaves[name] for name in NAMES], grad_of_slice)
    monkeypatch.undo()
    assert torch.equal(y, expected)
    compare(inputs)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("form", ["expanded", "other format", "scattered"])
def test_gradients_that_arrive_in_any_strides(form: str, layout: str) -> None:
    other = {"expanded": None, "other format": FORMATS[layout == "contiguous"], "scattered": "sliced"}[form]

    def rearranged(grad: Tensor) -> Tensor:
        return grad[:1, :1, :1].expand(grad.shape) if other is None else embed(grad, other)

    def call(**inputs: Any) -> Tensor:
        y = video_norm(**inputs)
        if y.requires_grad:
            y.register_hook(rearranged)
        return y

    for over in OVER:
        inputs = sample(layout=layout, over=over)
        check(call, inputs, rows=inputs["x"][0].numel())


@pytest.mark.parametrize("layout", FORMATS)
def test_keeps_the_memory_format(layout: str) -> None:
    leaves = on_device(sample(layout=layout))
    y = through("triton", video_norm)(**leaves)
    (grad,) = torch.autograd.grad(y.sum(), leaves["x"])  # of a gradient with strides of 0
    for tensor in (y, grad):
        assert tensor.is_contiguous() == (layout == "contiguous")
        assert tensor.is_contiguous(memory_format=torch.channels_last_3d) == (layout == "channels_last")


def results(inputs: dict[str, Any], cut: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """y and the gradient of x, for the frames of a cut."""
    per_frame = {"x", "shift"}
    leaves = on_device(inputs)
    cut_leaves = {n: v[:, :, cut].detach().requires_grad_() if n in per_frame else v for n, v in leaves.items()}
    y = through("triton", video_norm)(**cut_leaves)
    grad = random(*inputs["x"].shape, dtype=inputs["x"].dtype, grad=False, seed=1).to(DEVICE)
    (grad_x,) = torch.autograd.grad(y, cut_leaves["x"], grad[:, :, cut])
    return y.detach(), grad_x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("over", "size"), [("frame", (3, 5)), ("frame", (57, 41)), ("pixel", (7, 19))], ids=str)
def test_images_and_chunks_have_the_bits_of_the_whole(
    over: str, size: tuple[int, int], layout: str, dtype: torch.dtype
) -> None:
    inputs = sample((1, 6, 3, *size), layout, dtype, over=over, activation="silu")
    whole = results(inputs)
    for cut in (slice(0, 1), slice(1, 3)):
        for all_frames, frames in zip(whole, results(inputs, cut), strict=True):
            assert torch.equal(all_frames[:, :, cut], frames)
    twice = {n: torch.cat([v, v]).detach() if n in ("x", "scale", "shift") else v for n, v in inputs.items()}
    assert torch.equal(norm(**twice)[1:], whole[0])


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("over", "size"), [*[(o, (3, 5)) for o in OVER], ("frame", (57, 41))], ids=str)
def test_large_mean(size: tuple[int, int], over: str, layout: str) -> None:
    inputs = sample((1, 6, 2, *size), layout, over=over)
    inputs["x"] = embed(inputs["x"].detach() + 100, layout).requires_grad_()
    compare(inputs)


@pytest.mark.parametrize("over", OVER)
def test_runs_are_identical(over: str) -> None:
    def run() -> list[Tensor]:
        leaves = on_device(sample((2, 6, 2, 9, 17), dtype=DTYPES[-1], over=over, activation="silu"))
        y = through("triton", video_norm)(**leaves)
        grad = random(*y.shape, dtype=y.dtype, grad=False).to(DEVICE)
        return [y, *torch.autograd.grad(y, [leaves[name] for name in NAMES], grad)]

    first = run()
    for _ in range(1 if DEVICE == "cpu" else 9):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_launches() -> None:
    small, large = (2, 64, 3, 8, 8), (2, 64, 3, 128, 128)
    assert launched(sample(small, groups=32)) == ["forward", "backward", "finish"]
    assert launched(sample(large, over="pixel")) == ["forward", "backward", "finish"]
    assert launched(sample((2, 64, 1, 8, 8), over="clip")) == ["forward", "backward", "finish"]
    in_parts = ["statistics", "combine", "forward", "backward", "finish", "backward"]
    assert launched(sample(large, groups=32)) == in_parts
    assert launched(sample(small, over="clip", groups=32)) == in_parts


def test_of_nothing() -> None:
    for over in OVER:
        leaves = on_device(sample((0, 6, 2, 40, 40), over=over))
        y = through("triton", video_norm)(**leaves)
        assert y.shape == leaves["x"].shape
        for grad in torch.autograd.grad(y.sum(), [leaves[name] for name in NAMES]):
            assert grad.numel() == 0 or not grad.any()


@pytest.mark.large
@pytest.mark.skipif(DEVICE == "cpu", reason="more than 2^31 elements need a GPU")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
def test_offsets_are_64_bit(layout: torch.memory_format) -> None:
    """The last rows of a frame of more than 2^31 elements equal the same rows alone."""
    x = torch.empty((1, 16, 1, 12000, 12000), device=DEVICE, dtype=torch.bfloat16, memory_format=layout).normal_()
    x.requires_grad_()
    options = {"over": "pixel", "activation": "silu"}
    y = norm(x=x, **options)
    rows = x.detach()[..., -40:, :].clone(memory_format=layout)
    assert torch.equal(y[..., -40:, :], norm(x=rows, **options))
