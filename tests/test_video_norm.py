"""video_norm against the float64 reference, PyTorch's own norms, NumPy, and its exact properties."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import walt_kernels as wk
from walt_kernels import _native, testing
from walt_kernels.video_norm import reference

pytestmark = pytest.mark.skipif(_native.C is None, reason=f"native kernels: {_native.reason}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OVER = ("frame", "clip", "pixel")
# B, C, T, H, W: sizes of 1, primes, around one vector and around four, several units of work in a frame
SHAPES = (
    (1, 1, 1, 1, 1),
    (2, 3, 2, 1, 5),
    (1, 5, 3, 4, 1),
    (2, 8, 1, 3, 5),
    (1, 24, 3, 7, 5),
    (2, 15, 2, 4, 4),
    (1, 66, 2, 9, 17),
    (1, 130, 2, 33, 16),
)


def groups_of(channels: int, over: str) -> tuple[int, ...]:
    if over == "pixel":
        return (1,)
    return tuple(g for g in (1, 2, 3, channels) if channels % g == 0)


def inputs_of(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    rows: str = "weight bias scale shift",
    per_frame: bool = True,
    rows_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    scale: float = 1.0,
    mean: float = 0.0,
    **options: Any,
) -> dict[str, Any]:
    B, C, T = shape[:3]
    sizes = dict.fromkeys(("weight", "bias"), (C,)) | dict.fromkeys(
        ("scale", "shift"), (B, C, T) if per_frame else (B, C)
    )
    x = testing.random(*shape, dtype=dtype, scale=scale, grad=False)
    inputs: dict[str, Any] = {"x": testing.embed((x + mean).requires_grad_(), layout)}
    for i, name in enumerate(rows.split()):
        inputs[name] = testing.random(*sizes[name], dtype=rows_dtype or dtype, scale=0.5, seed=1 + i)
    return inputs | {"over": "frame", "groups": 1, "activation": "silu"} | options


def check(inputs: dict[str, Any]) -> None:
    """Forward at the tolerance of single values, gradients at that of sums over a frame's or clip's pixels."""

    def definition(**kwargs: Any) -> Tensor:
        rows = dict.fromkeys(("weight", "bias", "scale", "shift"))
        return reference.video_norm(**(rows | kwargs))

    B, _, T, H, W = inputs["x"].shape
    testing.check_op(wk.video_norm, definition, inputs, backward=False)
    testing.check_op(wk.video_norm, definition, inputs, rows=B * T * H * W)


def run(inputs: dict[str, Any]) -> list[Tensor]:
    """y and all gradients for a fixed incoming gradient."""
    leaves = {n: testing.leaf(v) for n, v in inputs.items()}
    y = wk.video_norm(**leaves)
    grad = testing.random(*y.shape, dtype=y.dtype, grad=False, seed=50)
    wanted = [v for v in leaves.values() if isinstance(v, Tensor)]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad)]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- against the float64 reference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_matches_reference(over: str, dtype: torch.dtype, layout: str) -> None:
    for shape in SHAPES:
        for groups in groups_of(shape[1], over):
            if shape[1] // groups * (shape[2] if over == "clip" else 1) * shape[3] * shape[4] == 1 or (
                over == "pixel" and shape[1] == 1
            ):
                continue  # of one element: see test_a_group_of_one
            check(inputs_of(shape, dtype, over=over, groups=groups, layout=layout))


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_options(over: str, layout: str) -> None:
    forms = ("", "weight", "bias", "weight bias", "scale", "shift", "weight shift", "weight bias scale shift")
    for rows, center, activation in itertools.product(forms, (True, False), (None, "silu")):
        for per_frame in (True, False) if "s" in rows.split("bias")[-1] else (True,):
            for shape in ((2, 6, 3, 3, 4), (1, 20, 2, 5, 13)):
                options = {"over": over, "groups": 1 if over == "pixel" else 2, "layout": layout}
                check(inputs_of(shape, rows=rows, per_frame=per_frame, center=center, activation=activation, **options))


@pytest.mark.parametrize("over", OVER)
def test_a_group_of_one(over: str) -> None:
    """The norm is 0 and its gradient too; without a centre it is the sign."""
    x = torch.tensor([3.0, -2.0]).view(2, 1, 1, 1, 1).requires_grad_()
    y = wk.video_norm(x, bias=torch.tensor([0.5]), over=over)
    assert torch.equal(y, torch.full_like(y, 0.5))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros_like(x))
    inputs = inputs_of((3, 5, 2, 1, 1), over=over, groups=1 if over == "pixel" else 5, rows="scale")
    if over == "frame":
        assert torch.equal(run(inputs)[1], torch.zeros_like(inputs["x"]))
    assert torch.allclose(wk.video_norm(x, over=over, center=False), x.sign())


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_no_samples(over: str, layout: str) -> None:
    inputs = inputs_of((0, 6, 3, 5, 4), over=over, layout=layout)
    for incoming in testing.LAYOUTS:
        y = wk.video_norm(**inputs)
        leaves = {n: v for n, v in inputs.items() if isinstance(v, Tensor)}
        grads = torch.autograd.grad(y, list(leaves.values()), testing.embed(torch.zeros_like(y), incoming))
        assert y.shape == inputs["x"].shape
        assert all(torch.equal(g, torch.zeros_like(v)) for g, v in zip(grads, leaves.values(), strict=True))


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_layouts(over: str, layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = inputs_of((2, 6, 3, 5, 4), dtype, over=over, groups=1 if over == "pixel" else 3, layout=layout)
        check(inputs)
        y = wk.video_norm(**inputs)
        format = torch.channels_last_3d if layout == "channels_last" else torch.contiguous_format
        assert y.is_contiguous(memory_format=format)
        gradient = torch.autograd.grad(y.sum(), inputs["x"])[0]
        assert gradient.is_contiguous(memory_format=format)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_frames_of_a_video_are_not_copied(over: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = inputs_of((2, 6, 5, 3, 4), over=over, layout=layout)["x"].detach()
    part = whole[:, :, 1:3]
    expected = wk.video_norm(part.clone(memory_format=torch.preserve_format), over=over)
    permuted = testing.embed(whole, "permuted")

    def forbidden(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("a copy")

    for method in ("contiguous", "clone", "to", "reshape"):
        monkeypatch.setattr(Tensor, method, forbidden)
    assert torch.equal(wk.video_norm(part, over=over), expected)
    with pytest.raises(AssertionError, match="a copy"):  # the trap works
        wk.video_norm(permuted, over=over)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_incoming_gradients_in_any_layout(over: str, layout: str) -> None:
    inputs = inputs_of((2, 6, 3, 5, 4), over=over, layout=layout)
    leaves = [v for v in inputs.values() if isinstance(v, Tensor)]
    y = wk.video_norm(**inputs)
    grad = testing.random(*y.shape, grad=False, seed=50)
    expected = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    for other in testing.LAYOUTS[1:]:
        found = torch.autograd.grad(y, leaves, testing.embed(grad, other), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    scalar = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    ones = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(scalar, ones, strict=True))


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_modulation_of_a_16_bit_video(over: str, dtype: torch.dtype) -> None:
    for layout in ("contiguous", "channels_last"):
        inputs = inputs_of((2, 6, 3, 5, 4), dtype, over=over, rows_dtype=torch.float32, layout=layout)
        check(inputs)
        y, _, *of_rows = run(inputs)
        assert y.dtype == dtype
        assert all(g.dtype == torch.float32 for g in of_rows)


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_scales(over: str, scale: float) -> None:
    for dtype, layout in itertools.product((torch.float32, torch.bfloat16), ("contiguous", "channels_last")):
        check(inputs_of((2, 12, 2, 5, 7), dtype, over=over, scale=scale, layout=layout))


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_mean(over: str, dtype: torch.dtype) -> None:
    """The mean is far above the spread: a mean of squares would have lost it."""
    for layout in ("contiguous", "channels_last"):
        check(
            inputs_of(
                (1, 40, 2, 30, 31), dtype, over=over, mean=1000.0 if dtype == torch.float32 else 30.0, layout=layout
            )
        )


@pytest.mark.parametrize("over", OVER)
def test_an_outlier(over: str) -> None:
    """One value far from all others, at the start of all loops, costs these no digits."""
    for layout in ("contiguous", "channels_last"):
        inputs = inputs_of((1, 16, 2, 20, 21), over=over, layout=layout)
        with torch.no_grad():
            inputs["x"][0, 0, 0, 0, 0] = 1e4
        check(inputs)


def test_expanded_tensors() -> None:
    inputs = inputs_of((2, 6, 3, 5, 4))
    inputs["x"] = testing.random(1, 6, 3, 5, 4).detach().expand(2, 6, 3, 5, 4).requires_grad_()
    inputs["scale"] = testing.random(1, 6, 1).detach().expand(2, 6, 3).requires_grad_()
    inputs["weight"] = testing.random(1).detach().expand(6).requires_grad_()
    check(inputs)


def test_modulation_views() -> None:
    """Chunks of a packed tensor, and rows [B, T, C] seen as [B, C, T]."""
    packed = testing.random(2, 3, 12, seed=3)
    scale, shift = packed.transpose(1, 2).chunk(2, dim=1)
    inputs = inputs_of((2, 6, 3, 5, 4), rows="weight bias") | {"scale": scale, "shift": shift}
    y = wk.video_norm(**inputs)
    expected = wk.video_norm(**(inputs | {"scale": scale.contiguous(), "shift": shift.contiguous()}))
    assert torch.equal(y, expected)
    assert torch.equal(*(torch.autograd.grad(out.sum(), packed)[0] for out in (y, expected)))


@pytest.mark.parametrize("over", OVER)
def test_only_what_is_wanted(over: str) -> None:
    inputs = inputs_of((2, 6, 3, 5, 4), over=over)
    names = [n for n, v in inputs.items() if isinstance(v, Tensor)]
    every = dict(zip(names, run(inputs)[1:], strict=True))
    for name in names:
        leaves = {n: testing.leaf(v) for n, v in inputs.items()}
        for other in names:
            leaves[other].requires_grad_(other == name)
        y = wk.video_norm(**leaves)
        grad = torch.autograd.grad(y, leaves[name], testing.random(*y.shape, grad=False, seed=50))[0]
        assert torch.equal(grad, every[name])


def test_eps() -> None:
    for over, center in itertools.product(OVER, (True, False)):
        check(inputs_of((1, 4, 2, 3, 5), scale=0.01, over=over, center=center, eps=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_isa_level(dtype: torch.dtype) -> None:
    info = _native.C.build_info()
    try:
        for isa in info["isa_runnable"]:
            _native.C.set_isa(isa)
            for over, layout in itertools.product(OVER, ("contiguous", "channels_last")):
                for shape in ((2, 6, 2, 7, 5), (1, 34, 2, 9, 17)):
                    check(inputs_of(shape, dtype, over=over, groups=1 if over == "pixel" else 2, layout=layout))
    finally:
        _native.C.set_isa(info["isa"])


# ---- other oracles --------------------------------------------------------------------------------------------------


def test_is_group_norm() -> None:
    x, weight, bias = testing.random(2, 12, 3, 5, 4), testing.random(12, seed=1), testing.random(12, seed=2)
    clip = functional.silu(functional.group_norm(x, 4, weight, bias, 1e-5))
    found = wk.video_norm(x, weight, bias, over="clip", groups=4, eps=1e-5, activation="silu")
    assert torch.allclose(found, clip, atol=1e-6)
    frames = functional.group_norm(x.transpose(1, 2).flatten(0, 1), 4, weight, bias, 1e-6)
    frames = frames.unflatten(0, (2, 3)).transpose(1, 2)
    assert torch.allclose(wk.video_norm(x, weight, bias, groups=4), frames, atol=1e-6)


def test_is_wans_norm() -> None:
    """Zeros stay zeros, whose gradient is that of a division by the smallest norm."""
    x, weight = testing.random(2, 12, 3, 5, 4), testing.random(12, seed=1)
    with torch.no_grad():
        x[0, :, 0, 0, 0] = 0
        x[0, :, 0, 0, 1] *= 1e-6
    expected = functional.normalize(x, dim=1) * 12**0.5 * weight[:, None, None, None]
    found = wk.video_norm(x, weight, over="pixel", center=False, eps=1e-24 / 12)
    assert torch.allclose(found, expected, atol=1e-6, rtol=1e-5)
    grads = [torch.autograd.grad(out.sum(), x)[0] for out in (found, expected)]
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-5)


def test_is_layer_norm_of_pixels() -> None:
    x, weight, bias = testing.random(2, 12, 3, 5, 4), testing.random(12, seed=1), testing.random(12, seed=2)
    expected = functional.layer_norm(x.movedim(1, -1), (12,), weight, bias, 1e-6).movedim(-1, 1)
    assert torch.allclose(wk.video_norm(x, weight, bias, over="pixel"), expected, atol=1e-6)


@pytest.mark.parametrize("center", [True, False])
def test_against_numpy(center: bool) -> None:
    """Forward and backward of the norm over a frame, written out by its Jacobian."""
    rng = np.random.default_rng(0)
    B, C, T, P, groups, eps = 2, 6, 2, 5, 3, 1e-6
    x, grad_y = rng.standard_normal((2, B, C, T, P))
    weight, bias = rng.standard_normal((2, C))
    scale, shift = rng.standard_normal((2, B, C, T))
    y, grad_x = np.empty((2, B, C, T, P))
    grads = {n: np.zeros_like(v) for n, v in (("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift))}
    for b, t, g in np.ndindex(B, T, groups):
        of = slice(g * C // groups, (g + 1) * C // groups)
        values = x[b, of, t].ravel()
        n = values.size
        mean = values.mean() if center else 0.0
        std = np.sqrt(((values - mean) ** 2).mean() + eps)
        normal = (values - mean) / std
        gain = np.repeat(weight[of] * (1 + scale[b, of, t]), P)
        z = normal * gain + np.repeat(bias[of] * (1 + scale[b, of, t]) + shift[b, of, t], P)
        s = 1 / (1 + np.exp(-z))
        y[b, of, t] = (z * s).reshape(-1, P)
        grad = grad_y[b, of, t].ravel() * (s + z * s * (1 - s))
        jacobian = (np.eye(n) - center / n - np.outer(normal, normal) / n) / std
        grad_x[b, of, t] = (jacobian @ (grad * gain)).reshape(-1, P)
        total, with_normal = grad.reshape(-1, P).sum(1), (grad * normal).reshape(-1, P).sum(1)
        grads["weight"][of] += with_normal * (1 + scale[b, of, t])
        grads["bias"][of] += total * (1 + scale[b, of, t])
        grads["scale"][b, of, t] += with_normal * weight[of] + total * bias[of]
        grads["shift"][b, of, t] += total
    leaves = {"x": torch.from_numpy(x[..., None]).requires_grad_()}
    for name, value in (("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift)):
        leaves[name] = torch.from_numpy(value).requires_grad_()
    out = wk.video_norm(**leaves, groups=groups, center=center, eps=eps, activation="silu")
    np.testing.assert_allclose(out.detach()[..., 0], y, rtol=1e-9, atol=1e-12)
    found = torch.autograd.grad(out, list(leaves.values()), torch.from_numpy(grad_y[..., None]))
    for name, value, expected in zip(leaves, found, (grad_x[..., None], *grads.values()), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-8, atol=1e-10, err_msg=name)


# ---- exact properties -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["frame", "pixel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_and_images_have_the_bits_of_the_whole(over: str, dtype: torch.dtype) -> None:
    for layout, shape in itertools.product(("contiguous", "channels_last"), ((2, 12, 5, 7, 9), (1, 96, 5, 24, 24))):
        inputs = inputs_of(shape, dtype, over=over, layout=layout, rows="weight bias")
        y, grad_x, *_ = run(inputs)
        grad = testing.random(*y.shape, dtype=dtype, grad=False, seed=50)
        for begin, end in ((0, 1), (1, 4), (4, 5)):
            part = inputs | {"x": inputs["x"].detach()[:, :, begin:end].requires_grad_()}
            out = wk.video_norm(**part)
            assert torch.equal(out, y[:, :, begin:end])
            assert torch.equal(torch.autograd.grad(out, part["x"], grad[:, :, begin:end])[0], grad_x[:, :, begin:end])


@pytest.mark.parametrize("over", ["frame", "pixel"])
def test_never_looks_at_another_frame(over: str) -> None:
    inputs = inputs_of((1, 12, 4, 7, 9), over=over)
    other = inputs | {"x": inputs["x"].detach().clone()}
    other["x"][:, :, 2:] = torch.nan
    assert torch.equal(wk.video_norm(**inputs)[:, :, :2], wk.video_norm(**other)[:, :, :2])


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bit_identical_over_runs_and_threads(over: str, layout: str, threads: Callable[[int], None]) -> None:
    for dtype, shape in itertools.product((torch.float32, torch.bfloat16), ((2, 48, 3, 40, 41), (1, 96, 1, 40, 40))):
        inputs = inputs_of(shape, dtype, over=over, groups=1 if over == "pixel" else 4, layout=layout)
        threads(1)
        first = run(inputs)
        for i in range(6):
            threads(3 - i % 3)
            assert all(torch.equal(a, b) for a, b in zip(first, run(inputs), strict=True))


def test_a_constant_frame() -> None:
    """No variance: eps alone keeps the norm finite, and y is the bias."""
    x, bias = torch.full((1, 4, 2, 3, 3), 2.5), torch.randn(4)
    for over in OVER:
        y = wk.video_norm(x, torch.randn(4), bias, over=over)
        assert torch.allclose(y, bias[:, None, None, None].expand_as(y), atol=1e-6)


def test_extreme_values_of_the_activation() -> None:
    x = torch.tensor([-200.0, -90.0, -30.0, 0.0, 30.0, 90.0, 200.0] * 9)
    bias = x.repeat(2)[: 9 * 7]
    video = torch.zeros(1, 63, 1, 1, 2)
    y = wk.video_norm(video, bias=bias, over="frame", groups=63, activation="silu")
    # Relative: rounding of z, so of 30, in the exponential of -30, where multiplication and addition are not fused.
    rtol = 30 * torch.finfo(torch.float32).eps
    assert torch.allclose(y[0, :, 0, 0, 0], functional.silu(bias), atol=1e-30, rtol=rtol)
    for_channels_last = wk.video_norm(
        video.to(memory_format=torch.channels_last_3d), bias=bias, groups=63, activation="silu"
    )
    assert torch.allclose(for_channels_last, y, atol=1e-30, rtol=rtol)


def test_autocast_keeps_the_dtype() -> None:
    inputs = inputs_of((1, 6, 2, 3, 4), torch.bfloat16, rows="weight bias", rows_dtype=torch.float32)
    plain = wk.video_norm(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wk.video_norm(**inputs), plain)
        mixed = wk.video_norm(**(inputs | {"bias": inputs["bias"].detach().bfloat16()}))
    assert mixed.dtype == torch.bfloat16


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": None}, TypeError, "x is a NoneType"),
        ({"x": torch.zeros(1, 6, 4, 4)}, ValueError, "x has shape"),
        ({"x": torch.zeros(1, 6, 0, 4, 4)}, ValueError, "x has shape"),
        ({"x": torch.zeros(1, 6, 2, 4, 4, dtype=torch.int32)}, TypeError, "x has dtype"),
        ({"weight": torch.zeros(5)}, ValueError, "weight has shape"),
        ({"weight": 1.0}, TypeError, "weight is a float"),
        ({"weight": torch.zeros(6, dtype=torch.bfloat16)}, TypeError, "weight has dtype"),
        ({"bias": torch.zeros(6, 1)}, ValueError, "bias has shape"),
        ({"scale": torch.zeros(1, 6, 3)}, ValueError, "scale has shape"),
        ({"shift": torch.zeros(2, 6)}, ValueError, "shift has shape"),
        ({"shift": torch.zeros(6)}, ValueError, "shift has shape"),
        ({"over": "batch"}, ValueError, "over is 'batch'"),
        ({"groups": 4}, ValueError, "groups is 4"),
        ({"groups": 0}, ValueError, "groups is 0"),
        ({"groups": 2, "over": "pixel"}, ValueError, "groups is 2"),
        ({"center": 1}, TypeError, "center is 1"),
        ({"eps": 0}, ValueError, "eps is 0"),
        ({"eps": "small"}, TypeError, "eps is 'small'"),
        ({"activation": "relu"}, ValueError, "activation is 'relu'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], words: str) -> None:
    good = {"x": torch.zeros(1, 6, 2, 4, 4), "groups": 3}
    with pytest.raises(error, match=words):
        wk.video_norm(**(good | change))
