"""causal_conv3d: against float64 truth, exact properties, an independent oracle, and every bad argument."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import signal
from torch import Tensor

from walt_kernels import _native, causal_conv3d, explain, next_history, use_backend
from walt_kernels._dispatch import prepare
from walt_kernels.testing import LAYOUTS, check_op, embed, random

native = pytest.mark.skipif(_native.C is None, reason="the native module is not built")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RUNNABLE = _native.C.build_info()["isa_runnable"] if _native.C is not None else []
ISAS = [isa for isa in RUNNABLE if isa != "amx"]  # whose convolutions are those of avx512


@pytest.fixture
def restore_isa():
    before = _native.C.build_info()["isa"]
    yield
    _native.C.set_isa(before)


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def reference(**inputs: Any) -> Tensor:
    with use_backend("reference"):
        return causal_conv3d(**inputs)


def sample(
    *,
    batch: int = 2,
    channels: int = 6,
    out_channels: int = 20,
    frames: int = 4,
    size: tuple[int, int] = (7, 9),
    kernel: tuple[int, int, int] = (3, 3, 3),
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    layout: str = "contiguous",
    history: bool = False,
    bias: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Keyword inputs of a call, all of them leaves that want a gradient."""
    groups = options.get("groups", 1)
    inputs = {
        "x": embed(random(batch, channels, frames, *size, dtype=dtype, scale=scale), layout),
        "weight": embed(random(out_channels, channels // groups, *kernel, dtype=dtype, scale=0.3), layout),
        "bias": random(out_channels, dtype=dtype) if bias else None,
        **options,
    }
    if history:
        dilation = options.get("dilation", 1)
        past = (kernel[0] - 1) * (dilation if isinstance(dilation, int) else dilation[0])
        inputs["history"] = embed(random(batch, channels, past, *size, dtype=dtype, scale=scale, seed=1), layout)
    return inputs


def terms(inputs: dict[str, Any]) -> int:
    """The longest sum of products in the forward pass."""
    return inputs["weight"][0].numel()


def check(inputs: dict[str, Any], op: Callable[..., Tensor] = causal_conv3d) -> None:
    check_op(op, reference, inputs, rows=terms(inputs))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "first_frame": {"time_padding": "first_frame"},
    "replicate": {"time_padding": "first_frame", "space_padding": "replicate"},
    "reflect": {"space_padding": "reflect", "padding": 2},
    "reflect, stride": {"space_padding": "reflect", "time_padding": "first_frame", "stride": 2},
    "stride": {"stride": (2, 1, 3)},
    "stride wider than the kernel": {"stride": 2, "kernel": (1, 1, 1)},
    "dilation": {"dilation": (2, 1, 2)},
    "dilation and stride": {"dilation": 2, "stride": (2, 3, 2), "time_padding": "first_frame"},
    "even kernel": {"kernel": (4, 4, 2)},
    "even kernel, stride": {"kernel": (4, 4, 4), "stride": 2},
    "asymmetric": {"padding": ((0, 2), (3, 1)), "space_padding": "replicate", "stride": (1, 2, 2)},
    "no padding": {"padding": 0},
    "padding pair": {"padding": (2, 0)},
    "groups": {"groups": 2},
    "depthwise": {"groups": 6, "out_channels": 12},
    "history": {"history": True},
    "history, stride and dilation": {"history": True, "stride": 2, "dilation": (2, 1, 1)},
    "history, reflect": {"history": True, "space_padding": "reflect", "time_padding": "first_frame"},
    "one by one": {"kernel": (1, 1, 1)},
    "time only": {"kernel": (3, 1, 1), "time_padding": "first_frame"},
    "space only": {"kernel": (1, 3, 3), "bias": False},
}


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_matches_the_truth_for_every_option(option: str, dtype: torch.dtype) -> None:
    for layout in ("contiguous", "channels_last"):
        check(sample(dtype=dtype, layout=layout, **OPTIONS[option]))


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_the_truth_in_every_layout(layout: str, dtype: torch.dtype) -> None:
    check(sample(dtype=dtype, layout=layout, channels=19, out_channels=37, history=True))


SHAPES = {
    "all ones": {"batch": 1, "channels": 1, "out_channels": 1, "frames": 1, "size": (1, 1)},
    "one pixel": {"channels": 5, "frames": 3, "size": (1, 1)},
    "one frame": {"frames": 1},
    "one row": {"size": (1, 13)},
    "one column": {"size": (13, 1)},
    "tile less one": {"batch": 1, "frames": 1, "size": (1, 11), "out_channels": 31},
    "tile": {"batch": 1, "frames": 1, "size": (3, 4), "out_channels": 32},
    "tile and one": {"batch": 1, "frames": 1, "size": (1, 13), "out_channels": 33},
    "one vector and one": {"channels": 17, "out_channels": 17},
    "stem": {"channels": 3, "out_channels": 64},
    "head": {"channels": 64, "out_channels": 3},
    "several blocks": {"batch": 1, "channels": 4, "out_channels": 8, "frames": 5, "size": (23, 61)},
    "columns cut": {"batch": 1, "channels": 2, "out_channels": 3, "frames": 2, "size": (2, 811)},
    "long sum": {"batch": 1, "channels": 130, "out_channels": 40, "frames": 2, "size": (5, 6)},
    "wide batch": {"batch": 7, "channels": 8, "out_channels": 8, "frames": 2, "size": (3, 3)},
}


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_truth_in_every_shape(shape: str, dtype: torch.dtype) -> None:
    for layout in ("contiguous", "channels_last"):
        check(sample(dtype=dtype, layout=layout, **SHAPES[shape]))


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_matches_the_truth_at_every_scale(scale: float, dtype: torch.dtype) -> None:
    check(sample(dtype=dtype, scale=scale, channels=24))


@native
def test_takes_expanded_and_overlapping_inputs() -> None:
    inputs = sample(batch=1)
    inputs["x"] = inputs["x"].detach().expand(3, -1, -1, -1, -1).requires_grad_()
    check(inputs)
    y = causal_conv3d(**inputs)
    (expected,) = torch.autograd.grad(y.sum(), inputs["x"], retain_graph=True)
    grad = torch.ones((), dtype=y.dtype).expand_as(y)  # what sum() sends back: every stride zero
    (actual,) = torch.autograd.grad(y, inputs["x"], grad)
    assert torch.equal(actual, expected)


@native
@pytest.mark.usefixtures("restore_isa")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_agrees(isa: str, dtype: torch.dtype) -> None:
    _native.C.set_isa(isa)
    check(sample(dtype=dtype, channels=10, layout="channels_last", stride=(1, 2, 1), space_padding="replicate"))
    check(sample(dtype=dtype, channels=21, out_channels=9, size=(6, 17), history=True))


@native
def test_offsets_are_64_bit() -> None:
    far = 2**31 + 8  # elements between the samples: only the pages that are written exist
    memory = torch.from_numpy(np.empty(far + 4096, dtype=np.float16))
    x = memory.as_strided((2, 3, 2, 4, 5), (far, 40, 20, 5, 1))
    x.copy_(random(2, 3, 2, 4, 5, dtype=torch.float16, grad=False))
    check({"x": x.requires_grad_(), "weight": random(4, 3, 3, 3, 3, dtype=torch.float16), "bias": None})


def test_scipy_agrees() -> None:
    generator = np.random.default_rng(0)
    x, weight = generator.normal(size=(2, 4, 5, 6, 7)), generator.normal(size=(6, 2, 3, 2, 3))
    bias = generator.normal(size=6)
    stride, dilation, padding = (2, 1, 2), (1, 2, 1), ((1, 2), (0, 3))
    spread = np.zeros((6, 2, *((k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True))))
    spread[:, :, :: dilation[0], :: dilation[1], :: dilation[2]] = weight
    for mode in ("constant", "edge", "reflect"):
        padded = np.pad(x, ((0, 0), (0, 0), (0, 0), *padding), mode=mode)
        padded = np.concatenate([np.repeat(padded[:, :, :1], 2, axis=2), padded], axis=2)
        full = [
            [
                sum(signal.correlate(padded[b, o // 3 * 2 + c], spread[o, c], mode="valid") for c in range(2)) + bias[o]
                for o in range(6)
            ]
            for b in range(2)
        ]
        expected = np.array(full)[:, :, :: stride[0], :: stride[1], :: stride[2]]
        y = causal_conv3d(
            *map(torch.from_numpy, (x, weight, bias)),
            stride=stride,
            dilation=dilation,
            padding=padding,
            groups=2,
            time_padding="first_frame",
            space_padding={"constant": "zeros", "edge": "replicate", "reflect": "reflect"}[mode],
        )
        np.testing.assert_allclose(y.numpy(), expected, rtol=1e-12, atol=1e-12)


@native
def test_numpy_calls_the_kernel_without_torch() -> None:
    C = _native.C

    def view(array: np.ndarray) -> Any:
        strides = [s // array.itemsize for s in array.strides]
        return C.TensorView(array.ctypes.data, str(array.dtype), array.shape, strides)

    generator = np.random.default_rng(1)
    x = generator.normal(size=(1, 2, 3, 4, 5)).astype(np.float32)
    weight = generator.normal(size=(3, 2, 2, 1, 1)).astype(np.float32)
    y = np.full((1, 3, 3, 4, 5), np.nan, dtype=np.float32)
    options = {
        "stride": [1, 1, 1],
        "dilation": [1, 1, 1],
        "padding": [0, 0, 0, 0],
        "time_padding": "zeros",
        "space_padding": "zeros",
        "groups": 1,
        "threads": 2,
    }
    C.causal_conv3d(x=view(x), weight=view(weight), y=view(y), **options)
    past = np.concatenate([np.zeros_like(x[:, :, :1]), x[:, :, :-1]], axis=2)
    expected = np.einsum("oc,bcthw->bothw", weight[..., 0, 0, 0], past)
    expected += np.einsum("oc,bcthw->bothw", weight[:, :, 1, 0, 0], x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="y has size 3 in dimension 1, expected 5"):
        C.causal_conv3d(x=view(x), weight=view(np.zeros((5, 2, 2, 1, 1), np.float32)), y=view(y), **options)
    with pytest.raises(ValueError, match="time_padding must be zeros or first_frame"):
        C.causal_conv3d(x=view(x), weight=view(weight), y=view(y), **options | {"time_padding": "last_frame"})
    with pytest.raises(TypeError, match="causal_conv3d: stride is missing"):
        C.causal_conv3d(x=view(x), weight=view(weight), y=view(y))
    with pytest.raises(TypeError, match="causal_conv3d: unknown argument strides"):
        C.causal_conv3d(x=view(x), weight=view(weight), y=view(y), **options, strides=None)
    with pytest.raises(TypeError, match=r"causal_conv3d: stride cannot be \[1, 1\]"):
        C.causal_conv3d(x=view(x), weight=view(weight), y=view(y), **options | {"stride": [1, 1]})


# ---- exact properties -----------------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_is_causal_bit_for_bit(layout: str, dtype: torch.dtype) -> None:
    for stride, dilation, time_padding in itertools.product((1, 2), (1, 2), ("zeros", "first_frame")):
        inputs = sample(dtype=dtype, layout=layout, frames=9, time_padding=time_padding)
        inputs.update(stride=(stride, 1, 1), dilation=(dilation, 1, 1))
        y = causal_conv3d(**inputs)
        for frame in range(1, 9):
            changed = inputs["x"].detach().clone()
            changed[:, :, frame:] = float("nan")
            unseen = (frame - 1) // stride + 1  # outputs that see frames up to `frame - 1` only
            assert torch.equal(causal_conv3d(**{**inputs, "x": changed})[:, :, :unseen], y[:, :, :unseen])


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("time_padding", ["zeros", "first_frame"])
def test_an_image_is_the_first_frame_of_a_video(time_padding: str, dtype: torch.dtype) -> None:
    inputs = sample(dtype=dtype, frames=9, channels=17, size=(13, 11), time_padding=time_padding)
    video = causal_conv3d(**inputs)
    image = causal_conv3d(**{**inputs, "x": inputs["x"][:1, :, :1]})
    assert torch.equal(image, video[:1, :, :1])


def in_chunks(inputs: dict[str, Any], plan: list[int]) -> Tensor:
    """The convolution of a clip chunk by chunk, dropping frames that complete no window into the history."""
    x, weight, stride = inputs["x"], inputs["weight"], inputs["stride"]
    mode, dilation = inputs["time_padding"], inputs["dilation"]
    history, outputs, seen = None, [], 0
    for chunk in x.split(plan, dim=2):
        skip = min(-seen % stride[0], chunk.shape[2])
        seen += chunk.shape[2]
        for part in (chunk[:, :, :skip], chunk[:, :, skip:]):
            if part.shape[2] == 0:
                continue
            if part.shape[2] == chunk.shape[2] - skip:
                outputs.append(causal_conv3d(**{**inputs, "x": part, "history": history}))
            history = next_history(part, history, weight.shape[2:], dilation, time_padding=mode)
    return torch.cat(outputs, dim=2)


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("time_padding", ["zeros", "first_frame"])
def test_chunks_equal_the_whole_bit_for_bit(time_padding: str, layout: str, dtype: torch.dtype) -> None:
    for kernel, stride, dilation in ((3, 1, 1), (3, 1, 2), (4, 1, 1), (1, 1, 1), (3, 2, 1), (4, 4, 1), (4, 2, 3)):
        inputs = sample(dtype=dtype, layout=layout, frames=13, kernel=(kernel, 3, 3), time_padding=time_padding)
        inputs.update(stride=(stride, 2, 1), dilation=(dilation, 1, 1))
        whole = causal_conv3d(**inputs)
        for plan in ([1, 4, 4, 4], [1, 8, 4], [1, 12], [4, 4, 4, 1], [8, 4, 1]):
            if stride == 4 and plan[0] == 1 and any(n % 4 for n in plan[1:]):
                continue
            assert torch.equal(in_chunks(inputs, plan), whole), (kernel, stride, dilation, plan)


@native
def test_gradients_flow_through_chunks() -> None:
    inputs = sample(dtype=torch.float64, frames=9, time_padding="first_frame", stride=(1, 1, 1), dilation=(1, 1, 1))
    cotangent = random(2, 20, 9, 7, 9, dtype=torch.float64, grad=False)
    wanted = [inputs["x"], inputs["weight"], inputs["bias"]]
    whole = torch.autograd.grad(causal_conv3d(**inputs), wanted, cotangent)
    chunked = torch.autograd.grad(in_chunks(inputs, [1, 4, 4]), wanted, cotangent)
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_frame_is_a_repeated_history(dtype: torch.dtype) -> None:
    inputs = sample(dtype=dtype, frames=5, dilation=(2, 1, 1))
    repeated = inputs["x"].detach()[:, :, :1].expand(-1, -1, 4, -1, -1)
    y = causal_conv3d(**inputs, time_padding="first_frame")
    assert torch.equal(y, causal_conv3d(**inputs, history=repeated))
    assert torch.equal(y, causal_conv3d(**inputs, history=repeated, time_padding="first_frame"))


@native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_and_batches_do_not_change_each_other(dtype: torch.dtype) -> None:
    inputs = sample(dtype=dtype, batch=3)
    whole = causal_conv3d(**inputs)
    for i in range(3):
        assert torch.equal(causal_conv3d(**{**inputs, "x": inputs["x"][i : i + 1]}), whole[i : i + 1])


def all_results(inputs: dict[str, Any]) -> list[Tensor]:
    y = causal_conv3d(**inputs)
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    leaves = [value for value in inputs.values() if isinstance(value, Tensor)]
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]


@native
@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_runs_or_threads(dtype: torch.dtype) -> None:
    inputs = sample(dtype=dtype, channels=20, out_channels=70, frames=5, size=(19, 23), history=True)
    inputs["space_padding"] = "replicate"
    with use_backend("cpu"):
        expected = all_results(inputs)
        for run in range(10):
            torch.set_num_threads(1 + run % 3)
            for a, b in zip(all_results(inputs), expected, strict=True):
                assert torch.equal(a, b)


@native
def test_keeps_the_memory_format() -> None:
    for layout, format in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last_3d)):
        inputs = sample(layout=layout)
        y = causal_conv3d(**inputs)
        assert y.is_contiguous(memory_format=format)
        assert torch.autograd.grad(y.sum(), inputs["x"])[0].is_contiguous(memory_format=format)
        assert next_history(inputs["x"], None, 3).is_contiguous(memory_format=format)
    chunk = sample(layout="channels_last")["x"][:, :, 1:]
    assert causal_conv3d(chunk, random(4, 6, 3, 3, 3)).is_contiguous(memory_format=torch.channels_last_3d)


@native
def test_nothing_the_size_of_x_is_allocated() -> None:
    x, weight = torch.zeros(1, 4, 40, 64, 64), torch.zeros(4, 4, 3, 3, 3)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        causal_conv3d(x, weight, space_padding="replicate", time_padding="first_frame")
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert allocated < 1.01 * x.nbytes  # the output


# ---- registration ---------------------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("option", ["plain", "stride", "replicate", "history", "depthwise"])
def test_gradcheck(option: str) -> None:
    small = {"batch": 1, "channels": 2, "out_channels": 2, "frames": 2, "size": (3, 3), "dtype": torch.float64}
    if option == "depthwise":
        small |= {"groups": 2}
    else:
        small |= OPTIONS[option]
    inputs = sample(**small)
    names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    torch.autograd.gradcheck(
        lambda *leaves: causal_conv3d(**{**inputs, **dict(zip(names, leaves, strict=True))}),
        [inputs[name] for name in names],
    )


@native
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "channels_last"])
@pytest.mark.parametrize("option", ["plain", "stride", "history", "replicate"])
def test_opcheck(option: str, layout: str) -> None:
    inputs = sample(layout=layout, batch=1, channels=3, out_channels=4, frames=3, size=(5, 4), **OPTIONS[option])
    arguments = {**prepare("causal_conv3d", **inputs), "backend": "cpu"}
    torch.library.opcheck(torch.ops.walt_kernels.causal_conv3d.default, (), arguments)
    detached = {name: a.detach() if isinstance(a, Tensor) else a for name, a in arguments.items() if name != "bias"}
    detached["grad_y"] = torch.ones_like(causal_conv3d(**inputs).detach())
    detached["wanted"] = [True, True, True, detached["history"] is not None]
    torch.library.opcheck(torch.ops.walt_kernels.causal_conv3d_backward.default, (), detached)


@native
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_once_for_all_batch_sizes(layout: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(
        lambda x, w, b: causal_conv3d(x * 2, w, b, time_padding="first_frame", stride=(1, 2, 2)) + 1,
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    for batch in (2, 3, 5):
        inputs = sample(batch=batch, layout=layout)
        leaves = [inputs["x"], inputs["weight"], inputs["bias"]]
        actual = compiled(*leaves)
        expected = causal_conv3d(leaves[0] * 2, *leaves[1:], time_padding="first_frame", stride=(1, 2, 2)) + 1
        torch.testing.assert_close(actual, expected)
        assert actual.stride() == expected.stride()
        for a, b in zip(
            torch.autograd.grad(actual.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@native
def test_autocast_casts_as_convolutions_do() -> None:
    inputs = sample(channels=8)
    with torch.autocast("cpu", torch.bfloat16):
        y = causal_conv3d(**inputs)
        expected = torch.nn.functional.conv3d(inputs["x"], inputs["weight"], inputs["bias"])
    assert y.dtype == expected.dtype == torch.bfloat16
    y.sum().backward()
    assert inputs["x"].grad.dtype == torch.float32
    low = {k: v.detach().bfloat16() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    assert torch.equal(y, causal_conv3d(**low))


@native
def test_second_derivative_raises() -> None:
    inputs = sample()
    y = causal_conv3d(**inputs)
    (grad,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="causal_conv3d has no second derivative"):
        grad.sum().backward()
    with use_backend("reference"):
        (grad,) = torch.autograd.grad(causal_conv3d(**inputs).square().sum(), inputs["x"], create_graph=True)
        grad.sum().backward()
    assert inputs["weight"].grad is not None


@native
def test_gradients_are_computed_only_where_wanted() -> None:
    for wanted in ("x", "weight", "bias", "history"):
        inputs = sample(history=True, dtype=torch.float64)
        expected = torch.autograd.grad(reference(**inputs).sum(), inputs[wanted])[0]
        alone = {k: v.detach() if isinstance(v, Tensor) and k != wanted else v for k, v in inputs.items()}
        torch.testing.assert_close(torch.autograd.grad(causal_conv3d(**alone).sum(), alone[wanted])[0], expected)


@native
def test_no_incoming_gradient_gives_none() -> None:
    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    inputs = sample()
    Drop.apply(causal_conv3d(**inputs)).sum().backward()
    assert all(inputs[name].grad is None for name in ("x", "weight", "bias"))


@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect"])
def test_same_padding_pads_what_no_window_reads(mode: str) -> None:
    """Under a stride of 2, four taps on eight columns read one at the right; "same" pads two, whatever the size."""
    inputs = sample(kernel=(1, 1, 4), size=(5, 8), stride=(1, 1, 2), space_padding=mode)
    results = []
    for padding in ("same", ((0, 0), (1, 1))):
        y = causal_conv3d(**inputs, padding=padding)
        results.append([y, *torch.autograd.grad(y.square().sum(), [inputs["x"], inputs["weight"]])])
    assert results[0][0].shape[3:] == (5, 4)
    assert all(map(torch.equal, *results))


@native
def test_empty_batch() -> None:
    inputs = sample(batch=0, history=True)
    y = causal_conv3d(**inputs)
    assert y.shape == (0, 20, 4, 7, 9)
    gradients = torch.autograd.grad(y.sum(), [inputs[n] for n in ("x", "weight", "bias", "history")])
    assert gradients[0].shape == inputs["x"].shape
    assert gradients[3].shape == inputs["history"].shape
    assert not gradients[1].any()
    assert not gradients[2].any()


@native
def test_explains_its_backends() -> None:
    inputs = sample()
    reasons = explain("causal_conv3d", **inputs)
    assert reasons.pop("triton") is not None  # opt-in
    assert reasons.pop("cudnn") is not None  # for GPUs
    assert reasons.pop("onednn") is not None  # slower
    assert reasons == {"cpu": None, "reference": None}
    on_meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs.items()}
    assert "runs on CPU tensors" in explain("causal_conv3d", **on_meta)["cpu"]


# ---- bad arguments --------------------------------------------------------------------------------------------------

X, W = torch.zeros(1, 4, 3, 5, 6), torch.zeros(8, 4, 3, 3, 3)
BAD = [
    ({"x": X[0]}, ValueError, r"x has shape \(4, 3, 5, 6\), expected 5 dimensions \[B, C, T, H, W\]"),
    ({"x": 3}, TypeError, r"x is a int, expected a tensor \[B, C, T, H, W\]"),
    ({"x": X.int()}, TypeError, "x has dtype torch.int32, expected one of torch.float32"),
    ({"x": X[:, :, :0]}, ValueError, "expected sizes of at least 1"),
    ({"weight": W[0]}, ValueError, r"weight has shape \(4, 3, 3, 3\), expected 5 dimensions"),
    ({"weight": W.double()}, TypeError, "weight has dtype torch.float64, expected torch.float32 as x has"),
    ({"weight": W.to("meta")}, ValueError, "weight is on meta, expected cpu as x is"),
    ({"weight": W[:, :3]}, ValueError, r"takes 3 channels a group, expected 4 \(x has 4 channels, groups is 1\)"),
    ({"weight": W[:, :, :0]}, ValueError, "weight has shape .* expected sizes of at least 1"),
    ({"groups": 2}, ValueError, "takes 4 channels a group, expected 2"),
    ({"groups": 3}, ValueError, "groups is 3, expected a divisor of x's 4 channels"),
    ({"groups": 4, "weight": W[:6, :1]}, ValueError, "groups is 4, expected a divisor of weight's 6 output channels"),
    ({"groups": 0}, ValueError, "groups is 0, expected a positive int"),
    ({"groups": 1.0}, TypeError, "groups is 1.0, expected a positive int"),
    ({"bias": torch.zeros(7)}, ValueError, "bias has 7 elements, expected weight's 8 output channels"),
    ({"bias": torch.zeros(1, 8)}, ValueError, r"bias has shape \(1, 8\), expected 1 dimensions"),
    ({"bias": torch.zeros(8).half()}, TypeError, "bias has dtype torch.float16, expected torch.float32 as x has"),
    ({"stride": 0}, ValueError, "stride is 0, expected integers of at least 1"),
    ({"stride": (1, 2)}, TypeError, r"stride is \(1, 2\), expected an int or 3 ints"),
    ({"stride": 1.5}, TypeError, "stride is 1.5, expected an int or 3 ints"),
    ({"dilation": (1, -1, 1)}, ValueError, r"dilation is \(1, -1, 1\), expected integers of at least 1"),
    ({"padding": "valid"}, ValueError, "padding is 'valid', expected 'same', an int"),
    ({"padding": -1}, ValueError, "padding is -1, expected integers of at least 0"),
    ({"padding": (1, 2, 3)}, TypeError, r"padding is \(1, 2, 3\), expected \(2, 3\), of the frame"),
    ({"padding": ((1,), (2, 3))}, TypeError, "padding is .* expected 'same'"),
    ({"time_padding": "replicate"}, ValueError, "time_padding is 'replicate', expected one of 'zeros', 'first_frame'"),
    ({"space_padding": "wrap"}, ValueError, "space_padding is 'wrap', expected one of 'zeros', 'replicate', 'reflect'"),
    ({"space_padding": "reflect", "padding": 5}, ValueError, "padding of 5 reflects more than x's height of 5 has"),
    (
        {"padding": 0, "dilation": 3},
        ValueError,
        "weight spans 7 pixels of height, expected at most the padded frame's 5",
    ),
    ({"history": X[:, :, :1]}, ValueError, r"history has shape \(1, 4, 1, 5, 6\), expected \(1, 4, 2, 5, 6\)"),
    ({"history": X}, ValueError, r"expected \(1, 4, 2, 5, 6\), \(kernel_t - 1\) \* dilation_t frames"),
    ({"history": X[:, :, :2].double()}, TypeError, "history has dtype torch.float64, expected torch.float32 as x has"),
    ({"history": 0}, TypeError, "history is a int, expected a tensor"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD, ids=[text[:40] for _, _, text in BAD])
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        causal_conv3d(**{"x": X, "weight": W, **arguments})
    assert "\n" not in str(caught.value)


def test_bad_arguments_of_next_history() -> None:
    with pytest.raises(ValueError, match="x has shape"):
        next_history(X[0], None, 3)
    with pytest.raises(ValueError, match="kernel is 0, expected integers of at least 1"):
        next_history(X, None, 0)
    with pytest.raises(ValueError, match=r"history has shape \(1, 4, 3, 5, 6\), expected \(1, 4, 2, 5, 6\)"):
        next_history(X, X, 3)
    with pytest.raises(ValueError, match="time_padding is 'same'"):
        next_history(X, None, 3, time_padding="same")
