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
# What the weight's gradient needs on top: pixels that fill patches.
SQUARE = PATCH | {"batch": 1, "size": (8, 8), "channels": 16}
STRIDED = PATCH | {"batch": 1, "size": (4, 6), "channels": 64, "out_channels": 16, "stride": 2, "kernel": (4, 4, 4)}
FEW_OUT = {"batch": 1, "frames": 3, "size": (4, 3), "channels": 17, "out_channels": 3, "kernel": (2, 3, 2)}
NAMES = ("x", "weight", "bias", "history")
# Every tile of the tables for 16 bits meets frames that fill a GPU.
BESIDE: dict[str, dict[str, Any]] = {
    "wide": {"batch": 1, "frames": 5, "size": (64, 64), "channels": 256, "out_channels": 256},
    "128 channels": {"batch": 1, "frames": 9, "size": (64, 64), "channels": 128, "out_channels": 128},
    "narrow": {"batch": 1, "frames": 9, "size": (64, 64), "channels": 64, "out_channels": 64},
    "in parts": {"batch": 2, "frames": 5, "size": (16, 16), "channels": 512, "out_channels": 512},
    "first frame": {"frames": 5, "size": (32, 32), "channels": 128, "out_channels": 128, "time_padding": "first_frame"},
    "stride": {"frames": 5, "size": (64, 64), "channels": 128, "out_channels": 128, "kernel": (4, 4, 4), "stride": 2},
    "head": {"batch": 1, "frames": 5, "size": (64, 64), "channels": 128, "out_channels": 3},
    "stem": {"batch": 1, "frames": 5, "size": (64, 64), "channels": 3, "out_channels": 128},
    "history": {"frames": 2, "size": (33, 40), "channels": 128, "out_channels": 128, "history": True},
    "reflect": {"frames": 2, "size": (33, 40), "channels": 64, "out_channels": 128, "space_padding": "reflect"},
}


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


def in_patches(**inputs: Any) -> Tensor:
    y = causal_conv3d(**inputs)
    if y.requires_grad:
        y.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last_3d))
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("time_padding", ["zeros", "first_frame"])
def test_patches_match_the_truth(time_padding: str, dtype: torch.dtype) -> None:
    inputs = sample(dtype=dtype, time_padding=time_padding, kernel=(3, 2, 1), padding=((0, 1), (1, 0)), **PATCH)
    if DEVICE == "cpu":  # on a GPU the architecture decides
        assert launched(inputs).count("conv_patch_kernel") == 2
    check(in_patches, inputs, rows=terms(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        STRIDED,
        STRIDED | {"time_padding": "first_frame", "frames": 3, "kernel": (3, 3, 2), "stride": (2, 1, 2)},
        SQUARE | {"kernel": (2, 3, 2)},
        SQUARE | {"time_padding": "first_frame", "kernel": (2, 1, 3), "size": (16, 4), "batch": 2},
        STRIDED | {"frames": 1, "size": (16, 16), "kernel": (1, 4, 3), "stride": (1, 2, 2)},
    ],
    ids=str,
)
def test_patches_one_stride_apart_and_of_weights_match_the_truth(options: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = sample(dtype=dtype, **options)
    if DEVICE == "cpu":
        kernels = launched(inputs)
        assert kernels.count("conv_patch_kernel") == 2
        assert ("conv_weight_patch_kernel" in kernels) == (options["size"] != STRIDED["size"])
    check(in_patches, inputs, rows=terms(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [SQUARE, STRIDED | {"size": (4, 4), "kernel": (2, 2, 2)}], ids=str)
def test_patches_of_other_layouts_match_the_truth(options: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = sample(dtype=dtype, **{**options, "layout": "contiguous", "time_padding": "first_frame"})
    kernels = launched(inputs)
    assert kernels.count("conv_patch_kernel") == 2
    assert kernels.count("conv_transpose_kernel") == (3 if "conv_weight_patch_kernel" in kernels else 2)
    compare(inputs)


def test_tiles_follow_the_processors() -> None:
    from walt_kernels.causal_conv3d import triton_weight_patch
    from walt_kernels.causal_conv3d.triton_patch import many, parts_of
    from walt_kernels.causal_conv3d.triton_tiles import weight_patch

    clip = torch.empty(1, 256, 17, 64, 64, device="meta")
    assert many(clip, (1, 1), 132)
    assert not many(clip[:, :, :15], (1, 1), 132)
    assert [parts_of(tiles, 216, 132) for tiles in (16, 72, 160, 264)] == [4, 4, 2, 1]
    assert parts_of(72, 64, 132) == 2  # sums that are too short for more
    assert parts_of(544, 16, 132) == parts_of(0, 16, 132) == 1
    # Just under two rounds of 264 programs of 4 warps, and just under three of 132 of 8.
    of_weight = triton_weight_patch.parts_of
    assert of_weight(27, 4352, weight_patch(128, 128, 64, 1, 4, 3), 27 * 128 * 128, 132) == 19
    assert of_weight(54, 1088, weight_patch(128, 256, 64, 1, 8, 3), 27 * 256 * 256, 132) == 7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_a_sum_match_the_truth(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from walt_kernels.causal_conv3d import triton_patch, triton_weight_patch

    without_plans(monkeypatch)
    monkeypatch.setattr(triton_patch, "parts_of", lambda *sizes: 3)
    monkeypatch.setattr(triton_weight_patch, "parts_of", lambda *sizes: 9)  # more than one step of adding up takes
    inputs = sample(dtype=dtype, **{**SQUARE, "kernel": (2, 2, 1), "time_padding": "first_frame", "batch": 2})
    assert "conv_sum_kernel" in launched(inputs)
    check(in_patches, inputs, rows=terms(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_taps_share_a_step_of_the_weights_sum(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from walt_kernels.causal_conv3d import triton_tiles

    shared = triton_tiles.weight_patch(64, 64, 16, 2, 8, 2)
    pick = _triton.pick
    without_plans(monkeypatch)
    monkeypatch.setattr(
        _triton, "pick", lambda table, *key: shared if key[0][0].startswith("weight patch") else pick(table, *key)
    )
    inputs = sample(dtype=dtype, **{**SQUARE, "kernel": (1, 2, 4)})
    check(in_patches, {k: v.detach() if k == "x" else v for k, v in inputs.items() if k != "bias"}, rows=terms(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "channels_last", "time_padding": "first_frame"},
        {"layout": "channels_last", "history": True, "space_padding": "reflect", "padding": ((1, 1), (1, 0))},
        {"space_padding": "replicate", "time_padding": "first_frame", "stride": (2, 1, 2)},
        {"dilation": (2, 1, 2), "stride": (1, 2, 1), "layout": "channels_last"},
    ],
    ids=str,
)
def test_few_output_channels_match_the_truth(options: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = sample(dtype=dtype, **{**FEW_OUT, **options})
    assert "conv_weight_few_kernel" in launched(inputs)
    compare(inputs)


@pytest.mark.parametrize(
    "change",
    [
        {"layout": "contiguous", "kernel": (1, 1, 1)},
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


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU runs programs side by side")
@pytest.mark.parametrize("case", BESIDE)
def test_runs_are_identical_beside_a_busy_stream(case: str) -> None:
    """A race between loads and products shows when memory is slow and the frames are many."""
    inputs = sample(dtype=torch.bfloat16, layout="channels_last", **BESIDE[case])
    leaves = {k: v.contiguous(memory_format=torch.channels_last_3d) if k == "x" else v for k, v in inputs.items()}
    leaves = {k: v.detach().requires_grad_() if isinstance(v, Tensor) else v for k, v in on_device(leaves).items()}
    names = [name for name in NAMES if leaves.get(name) is not None]

    def run() -> list[Tensor]:
        y = in_patches(**leaves)
        grad = random(*y.shape, dtype=y.dtype, grad=False).to(DEVICE)
        return [y, *torch.autograd.grad(y, [leaves[name] for name in names], grad)]

    busy = torch.cuda.Stream()
    source, copy = (torch.empty(64 << 20, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    with use_backend("triton"):
        first = run()
        different = torch.zeros((), dtype=torch.int64, device=DEVICE)
        for _ in range(50):
            with torch.cuda.stream(busy):
                for _ in range(20):
                    copy.copy_(source)
            different += sum((a != b).any() for a, b in zip(first, run(), strict=True))
        assert different.item() == 0
    check(in_patches, inputs, rows=terms(inputs))


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
