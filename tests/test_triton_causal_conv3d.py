"""The Triton kernels of causal_conv3d against the float64 reference, and exact properties (``pytest.mark.gpu``)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from on_gpu import DEVICE, DTYPES, check, marks, on_device, through, without_plans
from test_causal_conv3d import OPTIONS, in_chunks, sample, terms
from torch import Tensor

from walt_kernels import _dispatch, _triton, causal_conv3d, use_backend
from walt_kernels.testing import LAYOUTS, random

pytestmark = marks()

# Small: the interpreter takes milliseconds for every load.
SMALL = {"batch": 1, "frames": 2, "size": (3, 4), "channels": 6, "out_channels": 6, "kernel": (2, 3, 3)}
# Everything that TMA needs; tiles of pixels and channels are cut in every direction.
PATCH = {"batch": 2, "frames": 2, "size": (9, 3), "channels": 20, "out_channels": 24, "layout": "channels_last"}
NAMES = ("x", "weight", "bias", "history")


def compare(inputs: dict[str, Any]) -> None:
    check(causal_conv3d, inputs, rows=terms(inputs))


def convolve(**inputs: Any) -> Tensor:
    return through("triton", causal_conv3d)(**on_device(inputs))


def without_gradients(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def launched(inputs: dict[str, Any], architecture: str = "sm_90") -> list[str]:
    """The kernels of a call and its gradients on a GPU of that architecture."""
    checked = _dispatch.prepare("causal_conv3d", **without_gradients(inputs))
    with _triton.record(_triton.TARGETS[architecture]) as launches:
        _dispatch.op("causal_conv3d").both_passes("triton", checked)
    return [launch.kernel.fn.__name__ for launch in launches]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_matches_the_truth_for_every_option(option: str, dtype: torch.dtype) -> None:
    compare(sample(dtype=dtype, **{**SMALL, **OPTIONS[option]}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_the_truth_in_every_layout(layout: str, dtype: torch.dtype) -> None:
    """With 16 channels or more, a step of the sum stays within one tap."""
    options = {"batch": 2, "history": True, "kernel": (2, 1, 2), "stride": (1, 1, 2)}
    compare(sample(dtype=dtype, layout=layout, **{**SMALL, **options, "channels": 19, "out_channels": 17}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("space_padding", ["replicate", "reflect"])
def test_every_pixel_has_copies(space_padding: str, dtype: torch.dtype) -> None:
    size = {"replicate": (1, 2), "reflect": (2, 3)}[space_padding]
    options = {"space_padding": space_padding, "padding": ((1, 1), (1, 0)), "time_padding": "first_frame"}
    compare(sample(dtype=dtype, **{**SMALL, **options, "size": size}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [4.0, 16.0])
def test_matches_the_truth_at_every_scale(scale: float, dtype: torch.dtype) -> None:
    compare(sample(dtype=dtype, scale=scale, **{**SMALL, "kernel": (2, 1, 1), "channels": 17}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("time_padding", ["zeros", "first_frame"])
def test_patches_match_the_truth(time_padding: str, dtype: torch.dtype) -> None:
    inputs = sample(dtype=dtype, time_padding=time_padding, kernel=(3, 2, 1), padding=((0, 1), (1, 0)), **PATCH)
    if DEVICE == "cpu":  # on a GPU the architecture decides
        assert launched(inputs).count("conv_patch_kernel") == 2

    def in_patches(**inputs: Any) -> Tensor:
        y = causal_conv3d(**inputs)
        if y.requires_grad:
            y.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last_3d))
        return y

    check(in_patches, inputs, rows=terms(inputs))


@pytest.mark.parametrize(
    "change",
    [
        {"layout": "contiguous"},
        {"history": True},
        {"stride": (1, 2, 1)},
        {"dilation": (2, 1, 1)},
        {"space_padding": "reflect"},
        {"groups": 2, "channels": 40},
        {"channels": 19},
        {"channels": 12},
    ],
    ids=str,
)
def test_patches_are_only_for_plain_convolutions(change: dict[str, Any]) -> None:
    kernels = launched(sample(**{**PATCH, **change}))
    assert "conv_forward_kernel" in kernels
    assert "conv_data_kernel" in kernels
    assert "conv_patch_kernel" not in kernels
    assert "conv_patch_kernel" not in launched(sample(**PATCH), "sm_80")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [SMALL, PATCH], ids=["pointers", "patches"])
def test_is_causal_bit_for_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = without_gradients(sample(dtype=dtype, **{**options, "batch": 1, "frames": 3, "kernel": (2, 1, 1)}))
    y = convolve(**inputs)
    for frame in (1, 2):
        changed = inputs["x"].clone()
        changed[:, :, frame:] = math.nan
        assert torch.equal(convolve(**{**inputs, "x": changed})[:, :, :frame], y[:, :, :frame])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("time_padding", ["zeros", "first_frame"])
def test_chunks_equal_the_whole_bit_for_bit(time_padding: str, dtype: torch.dtype) -> None:
    inputs = sample(dtype=dtype, **{**SMALL, "frames": 7, "kernel": (3, 1, 1), "channels": 17})
    inputs = without_gradients(inputs) | {"time_padding": time_padding}
    for stride in (1, 2):
        inputs.update(stride=(stride, 1, 1), dilation=(1, 1, 1))
        with use_backend("triton"):
            chunked = in_chunks(on_device(inputs), [3, 4])
        assert torch.equal(chunked, convolve(**inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_frame_is_a_repeated_history(dtype: torch.dtype) -> None:
    inputs = without_gradients(sample(dtype=dtype, **SMALL))
    history = inputs["x"][:, :, :1]
    assert torch.equal(convolve(**inputs, history=history), convolve(**inputs, time_padding="first_frame"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [SMALL | {"space_padding": "reflect", "history": True}, PATCH], ids=str)
def test_runs_are_identical(options: dict[str, Any], dtype: torch.dtype) -> None:
    def run() -> list[Tensor]:
        inputs = sample(dtype=dtype, **{**options, "kernel": (2, 1, 2), "size": (2, 3)})
        leaves = on_device(inputs)
        y = through("triton", causal_conv3d)(**leaves)
        grad = random(*y.shape, dtype=dtype, grad=False).to(DEVICE)
        return [y, *torch.autograd.grad(y, [leaves[n] for n in NAMES if leaves.get(n) is not None], grad)]

    first = run()
    for _ in range(1 if DEVICE == "cpu" else 9):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_wide_offsets_change_nothing(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from walt_kernels.causal_conv3d import triton_data, triton_forward, triton_patch, triton_weight

    calls = []
    without_plans(monkeypatch)
    for options in (SMALL | {"layout": layout, "history": True}, PATCH):
        inputs = sample(**{**options, "kernel": (2, 1, 2), "size": (2, 3)})
        for module in (triton_data, triton_forward, triton_patch, triton_weight):
            monkeypatch.setattr(module, "wide", lambda *tensors: calls.append(tensors) or True)
        compare(inputs)
    assert len(calls) >= 7  # forward, data (x and history), weight and bias; two patches


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_keeps_the_memory_format(layout: str) -> None:
    inputs = sample(**{**SMALL, "layout": layout, "kernel": (1, 1, 1)})
    leaves = on_device(inputs)
    y = through("triton", causal_conv3d)(**leaves)
    (grad,) = torch.autograd.grad(y.sum(), leaves["x"])  # of a gradient with strides of 0
    for tensor in (y, grad):
        assert tensor.is_contiguous() == (layout == "contiguous")
        assert tensor.is_contiguous(memory_format=torch.channels_last_3d) == (layout == "channels_last")


def test_gradients_are_computed_only_where_wanted() -> None:
    inputs = sample(**{**SMALL, "history": True, "kernel": (2, 1, 1)})
    for wanted in NAMES:
        compare({k: v.detach() if isinstance(v, Tensor) and k != wanted else v for k, v in inputs.items()})


def test_empty_batch() -> None:
    for options in (SMALL | {"history": True}, PATCH):
        leaves = on_device(sample(**{**options, "batch": 0}))
        y = through("triton", causal_conv3d)(**leaves)
        assert y.shape[0] == 0
        _, weight, bias = torch.autograd.grad(y.sum(), [leaves[n] for n in ("x", "weight", "bias")])
        assert not weight.any()
        assert not bias.any()


@pytest.mark.large
@pytest.mark.skipif(DEVICE == "cpu", reason="more than 2^31 elements need a GPU")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d], ids=str)
def test_offsets_are_64_bit(layout: torch.memory_format) -> None:
    """The last rows of a frame of more than 2^31 elements equal the same rows alone."""
    x = torch.empty((1, 16, 1, 12000, 12000), device=DEVICE, dtype=torch.bfloat16, memory_format=layout).normal_()
    weight = random(16, 16, 1, 3, 3, dtype=torch.bfloat16, scale=0.3, grad=False).to(DEVICE)
    x.requires_grad_()
    call = through("triton", causal_conv3d)
    y = call(x=x, weight=weight)
    grad = torch.empty_like(y).normal_()
    (grad_x,) = torch.autograd.grad(y, x, grad)
    rows = x.detach()[..., -40:, :].clone(memory_format=layout).requires_grad_()
    alone = call(x=rows, weight=weight)
    (grad_rows,) = torch.autograd.grad(alone, rows, grad[..., -40:, :])
    torch.testing.assert_close(y[..., -39:, :], alone[..., -39:, :])
    torch.testing.assert_close(grad_x[..., -39:, :], grad_rows[..., -39:, :])
