"""causal_conv3d where Winograd's kernel computes it: against float64 truth around tile edges, and exact properties."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_causal_conv3d import ISAS, all_results, check, in_chunks, native, sample
from torch import Tensor

from walt_kernels import _native, causal_conv3d, use_backend

pytestmark = native
FLOATS = (torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def restore():  # and nothing else than these kernels
    threads = torch.get_num_threads()
    isa = _native.C.build_info()["isa"]
    with use_backend("cpu"):
        yield
    torch.set_num_threads(threads)
    _native.C.set_isa(isa)


def direct(inputs: dict[str, Any]) -> Tensor:
    """The same convolution with a kernel of 3 x 4 whose last column is zero: its plain sums, to the bit."""
    assert inputs.get("padding", "same") == "same"
    wide = F.pad(inputs["weight"].detach(), (0, 1))
    return causal_conv3d(**{**inputs, "weight": wide, "padding": ((1, 1), (1, 2))})


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("channels", [(7, 8, False), (8, 7, False), (8, 8, True), (9, 17, True), (64, 40, True)])
def test_runs_from_eight_channels_on(channels: tuple[int, int, bool], dtype: torch.dtype) -> None:
    inputs = sample(channels=channels[0], out_channels=channels[1], size=(9, 8), dtype=dtype)
    y, plain = causal_conv3d(**inputs), direct(inputs)
    torch.testing.assert_close(y, plain, rtol=1e-3, atol=1e-4)
    assert torch.equal(y, plain) != channels[2]


PAIRS = [  # channels, height and width, whether it beats a processor that multiplies pairs of bfloat16
    (16, (16, 16), True),
    (16, (18, 20), True),
    (40, (37, 44), True),
    (15, (16, 16), False),
    (16, (15, 16), False),
    (16, (14, 16), False),
    (16, (17, 18), False),
]


@pytest.mark.skipif("avx512" not in ISAS, reason="this processor multiplies no pairs of bfloat16")
@pytest.mark.parametrize(("channels", "size", "taken"), PAIRS)
def test_runs_in_place_of_pairs_on_large_frames(channels: int, size: tuple[int, int], taken: bool) -> None:
    _native.C.set_isa("avx512")
    inputs = sample(channels=channels, out_channels=channels, size=size, dtype=torch.bfloat16)
    y, plain = causal_conv3d(**inputs), direct(inputs)
    torch.testing.assert_close(y, plain, rtol=2**-7, atol=2**-7 * plain.abs().max().item())
    assert torch.equal(y, plain) != taken


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [*itertools.product((1, 2, 3, 4, 7), (3, 6, 7)), (5, 1), (37, 35)], ids=str)
def test_matches_the_truth_around_tile_edges(size: tuple[int, int], dtype: torch.dtype) -> None:
    for layout in ("contiguous", "channels_last"):
        check(sample(batch=1, channels=9, out_channels=19, size=size, dtype=dtype, layout=layout))


OPTIONS: dict[str, dict[str, Any]] = {
    "kt 1": {"kernel": (1, 3, 3)},
    "kt 2": {"kernel": (2, 3, 3)},
    "kt 4": {"kernel": (4, 3, 3), "time_padding": "first_frame"},
    "time stride": {"stride": (2, 1, 1)},
    "time dilation": {"dilation": (2, 1, 1)},
    "time stride and dilation": {"stride": (3, 1, 1), "dilation": (2, 1, 1)},
    "replicate": {"space_padding": "replicate", "time_padding": "first_frame"},
    "reflect": {"space_padding": "reflect", "padding": 2},
    "no padding": {"padding": 0},
    "asymmetric": {"padding": ((0, 2), (3, 1))},
    "history": {"history": True},
    "history, reflect, stride": {"history": True, "space_padding": "reflect", "stride": (2, 1, 1)},
    "groups": {"groups": 2},
    "many frames": {"frames": 23, "batch": 1},
    "wide": {"channels": 136, "out_channels": 130, "batch": 1},
}


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_matches_the_truth_for_every_option(option: str, dtype: torch.dtype) -> None:
    size = (16, 18) if dtype is torch.bfloat16 else (7, 9)
    for layout in ("contiguous", "channels_last", "sliced"):
        shape = {"channels": 18, "out_channels": 34, "size": size, "dtype": dtype, "layout": layout}
        check(sample(**{**shape, **OPTIONS[option]}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_matches_the_truth_at_every_scale(scale: float, dtype: torch.dtype) -> None:
    check(sample(dtype=dtype, scale=scale, channels=64, out_channels=33))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_instruction_set_agrees(isa: str, dtype: torch.dtype) -> None:
    _native.C.set_isa(isa)
    check(sample(dtype=dtype, channels=21, out_channels=37, size=(7, 18), history=True, layout="channels_last"))
    check(sample(dtype=dtype, channels=16, out_channels=9, size=(6, 17), space_padding="replicate"))


# ---- exact properties -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("time_padding", ["zeros", "first_frame"])
def test_chunks_equal_the_whole_bit_for_bit(time_padding: str, layout: str) -> None:
    for kernel, stride, dilation in ((3, 1, 1), (3, 1, 2), (2, 1, 1), (1, 1, 1), (3, 2, 1)):
        inputs = sample(frames=13, channels=24, kernel=(kernel, 3, 3), time_padding=time_padding, layout=layout)
        inputs.update(stride=(stride, 1, 1), dilation=(dilation, 1, 1))
        whole = causal_conv3d(**inputs)
        for plan in ([1, 4, 4, 4], [1, 12], [4, 4, 4, 1]):
            assert torch.equal(in_chunks(inputs, plan), whole), (kernel, stride, dilation, plan)
        image = causal_conv3d(**{**inputs, "x": inputs["x"][:1, :, :1]})
        assert torch.equal(image, whole[:1, :, :1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_pixel_reaches_its_receptive_field_only(dtype: torch.dtype) -> None:
    inputs = sample(batch=1, channels=16, frames=6, size=(9, 11), dtype=dtype)
    y = causal_conv3d(**inputs)
    for frame, row, column in ((0, 0, 0), (2, 4, 5), (3, 5, 4), (5, 8, 10)):
        x = inputs["x"].detach().clone()
        x[:, 3, frame, row, column] = float("nan")
        changed = causal_conv3d(**{**inputs, "x": x})
        reached = torch.zeros(y.shape, dtype=torch.bool)
        reached[:, :, frame : frame + 3, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = True
        assert changed[reached].isnan().all()
        assert torch.equal(changed[~reached], y[~reached])


@pytest.mark.parametrize("space_padding", ["zeros", "replicate"])
def test_results_do_not_depend_on_threads_or_batch(space_padding: str) -> None:
    inputs = sample(channels=24, out_channels=70, frames=5, size=(19, 43), history=True, space_padding=space_padding)
    expected = all_results(inputs)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for a, b in zip(all_results(inputs), expected, strict=True):
            assert torch.equal(a, b)
    one = {**inputs, "x": inputs["x"][1:], "history": inputs["history"][1:]}
    assert torch.equal(causal_conv3d(**one), expected[0][1:])


def test_weights_that_are_transformed_in_parts() -> None:
    check(sample(batch=1, channels=384, out_channels=400, frames=2, size=(5, 4)))
