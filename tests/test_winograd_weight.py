"""causal_conv3d's gradient of the weights by Winograd's method: which calls take it, and that it is right there."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_causal_conv3d import DTYPES, ISAS, native, reference
from test_causal_conv3d import sample as call_sample
from torch import Tensor

from walt_kernels import _native, causal_conv3d, use_backend
from walt_kernels.testing import LAYOUTS, check_op, random

pytestmark = native


@pytest.fixture(autouse=True)
def restore():  # and nothing else than these kernels
    isa, threads = _native.C.build_info()["isa"], torch.get_num_threads()
    with use_backend("cpu"):
        yield
    _native.C.set_isa(isa)
    torch.set_num_threads(threads)


def sample(**options: Any) -> dict[str, Any]:
    """A call that is as small as tiles allow."""
    small = {"batch": 1, "channels": 8, "out_channels": 8, "frames": 3, "size": (5, 6)}
    return call_sample(**{**small, **options})


def check(inputs: dict[str, Any]) -> None:
    x, weight = inputs["x"], inputs["weight"]
    rows = max(weight[0].numel(), x[:, 0].numel())  # products in an output, and in a weight's gradient
    check_op(causal_conv3d, reference, inputs, rows=rows)


def takes_winograd(**options: Any) -> bool:
    """Whether the gradient of the weights came from sums of neighbouring output gradients, where the smaller of two is
    lost; computed directly it comes back as it is.
    """
    inputs = sample(**options)
    large, small = 2.0**14, 2.0 ** (-50 if inputs["x"].dtype == torch.float64 else -14)
    with torch.no_grad():
        inputs["x"].zero_()[0, 0, 0, 0, 0] = 1
    y = causal_conv3d(**inputs)
    grad = torch.zeros_like(y)
    grad[0, 0, 0, 0, 0], grad[0, 0, 0, 0, 1] = large, small
    (result,) = torch.autograd.grad(y, inputs["weight"], grad)
    row, column = result.shape[3] // 2, result.shape[4] // 2
    assert result[0, 0, -1, row, column] == large
    beside = result[0, 0, -1, row, column - 1].item()
    assert beside in (0, small)
    return beside == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_takes_it_where_it_pays(dtype: torch.dtype, isa: str) -> None:
    _native.C.set_isa(isa)
    pairs = dtype == torch.bfloat16 and isa == "avx512"  # that processor multiplies pairs: only large frames pay
    taken = [
        {},
        {"channels": 64, "out_channels": 64},
        {"channels": 8, "out_channels": 3},
        {"channels": 16, "kernel": (1, 3, 3)},
        {"channels": 16, "groups": 2},
        {"size": (3, 3)},
        {"frames": 1},
        {"stride": (2, 1, 1), "dilation": (2, 1, 1)},
    ]
    assert [takes_winograd(dtype=dtype, **options) for options in taken] == [not pairs] * len(taken)
    large = [{"channels": 16, "size": (16, 16)}, {"channels": 16, "size": (18, 20), "kernel": (1, 3, 3)}]
    assert all(takes_winograd(dtype=dtype, **options) for options in large)
    between = [{"channels": 15, "size": (16, 16)}, {"channels": 16, "size": (14, 16)}]
    assert [takes_winograd(dtype=dtype, **options) for options in between] == [not pairs] * len(between)
    direct = [
        {"channels": 7},
        {"channels": 15, "kernel": (1, 3, 3)},
        {"channels": 16, "groups": 4},
        {"size": (1, 8)},
        {"stride": (1, 2, 1)},
        {"kernel": (3, 5, 3)},
        {"kernel": (3, 5, 5)},
    ]
    assert not any(takes_winograd(dtype=dtype, **options) for options in direct)


@pytest.mark.parametrize("height", range(1, 8))
def test_matches_the_truth_around_the_edges_of_tiles(height: int) -> None:
    for width, layout in itertools.product(range(1, 8), ("contiguous", "channels_last")):
        check(sample(size=(height, width), layout=layout, batch=2, frames=2))


CHANNELS = [(7, 8), (8, 1), (9, 15), (16, 17), (24, 40), (33, 9), (130, 20), (20, 130), (150, 140)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_matches_the_truth_for_every_number_of_channels(channels: tuple[int, int], layout: str) -> None:
    check(sample(channels=channels[0], out_channels=channels[1], layout=layout))


OPTIONS: dict[str, dict[str, Any]] = {
    "one tap in time": {"kernel": (1, 3, 3), "channels": 16},
    "two taps in time": {"kernel": (2, 3, 3)},
    "four taps, few frames": {"kernel": (4, 3, 3), "frames": 2},
    "stride": {"stride": (2, 1, 1), "frames": 6},
    "stride wider than the kernel": {"stride": (3, 1, 1), "kernel": (2, 3, 3), "frames": 8},
    "dilation": {"dilation": (2, 1, 1), "frames": 6},
    "stride and dilation": {"stride": (2, 1, 1), "dilation": (3, 1, 1), "frames": 9, "time_padding": "first_frame"},
    "first_frame": {"time_padding": "first_frame"},
    "replicate": {"space_padding": "replicate", "time_padding": "first_frame"},
    "reflect": {"space_padding": "reflect", "padding": 2},
    "no padding": {"padding": 0},
    "asymmetric": {"padding": ((0, 2), (3, 1)), "space_padding": "replicate"},
    "history": {"history": True},
    "history, replicate": {"history": True, "space_padding": "replicate", "frames": 1},
    "groups": {"groups": 3, "channels": 27, "out_channels": 51},
    "one frame": {"frames": 1},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_matches_the_truth_for_every_option(option: str, dtype: torch.dtype) -> None:
    for layout in ("contiguous", "channels_last"):
        check(sample(dtype=dtype, layout=layout, **OPTIONS[option]))


SLABS: dict[str, dict[str, Any]] = {
    "columns": {"size": (3, 141), "frames": 5},
    "rows": {"size": (60, 50), "frames": 4, "channels": 40},
    "frames": {"size": (19, 21), "frames": 17, "channels": 130},
    "samples": {"batch": 3, "size": (9, 8), "history": True},
}


@pytest.mark.parametrize("slabs", SLABS)
def test_slabs_add_up(slabs: str) -> None:
    check(sample(**SLABS[slabs]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_agrees(isa: str, dtype: torch.dtype) -> None:
    _native.C.set_isa(isa)
    check(sample(dtype=dtype, channels=21, out_channels=37, size=(7, 9), layout="channels_last", history=True))
    check(sample(dtype=dtype, channels=12, out_channels=9, size=(8, 17), space_padding="replicate"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    inputs = sample(dtype=dtype, batch=2, channels=140, out_channels=45, frames=5, size=(13, 12))
    y = causal_conv3d(**inputs)
    leaves, grad = [inputs["weight"], inputs["bias"]], torch.randn_like(y)
    torch.set_num_threads(1)
    expected = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    for threads in (2, 3, 2, 7):
        torch.set_num_threads(threads)
        actual = torch.autograd.grad(y, leaves, grad, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_either_gradient_alone() -> None:
    inputs = sample(channels=10, out_channels=19)
    grad = random(1, 19, 3, 5, 6, grad=False)
    both = torch.autograd.grad(causal_conv3d(**inputs), [inputs["weight"], inputs["bias"]], grad)
    for name, expected in zip(("weight", "bias"), both, strict=True):
        alone = {k: v.detach() if isinstance(v, Tensor) and k != name else v for k, v in inputs.items()}
        torch.testing.assert_close(torch.autograd.grad(causal_conv3d(**alone), alone[name], grad)[0], expected)


def test_an_expanded_gradient() -> None:
    inputs = sample(batch=2)
    y = causal_conv3d(**inputs)
    leaves = [inputs["weight"], inputs["bias"]]
    expected = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    actual = torch.autograd.grad(y, leaves, torch.ones(()).expand_as(y))  # every stride zero
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
