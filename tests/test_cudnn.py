"""causal_conv3d through cuDNN's graph API: what is around its calls everywhere, and the calls themselves on a GPU."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_causal_conv3d import OPTIONS, SHAPES, reference, sample, terms
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from walt_kernels import _dispatch, causal_conv3d, explain, use_backend
from walt_kernels.causal_conv3d import cudnn
from walt_kernels.nn import CausalConv3d
from walt_kernels.testing import check_op, move

on_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or cudnn.reason is not None, reason=f"no GPU, or {cudnn.reason}"
)
ZEROS = {
    name: option
    for name, option in OPTIONS.items()
    if option.get("space_padding", "zeros") == "zeros" and option.get("groups", 1) == 1
} | {
    "long history": {"history": True, "frames": 9},
    "long history, even kernel, stride": {"history": True, "frames": 9, "kernel": (4, 4, 4), "stride": 2},
    "long past": {"time_padding": "first_frame", "frames": 9, "dilation": (2, 1, 1)},
    "history of one sample": {"history": True, "batch": 1, "frames": 5},
    "history of one frame": {"history": True, "frames": 1},
}


def forced(**inputs: Any) -> Tensor:
    with use_backend("cudnn"):
        return causal_conv3d(**inputs)


# ---- everywhere: PyTorch in the place of cuDNN ----------------------------------------------------------------------


class Calls(list[tuple[str, Tensor, Tensor, Tensor, cudnn.Window]]):
    """Records the calls of cuDNN and computes what they would, over padded copies."""

    def run(
        self, kind: str, image: Tensor, filters: Tensor, response: Tensor, window: cudnn.Window, bias: Any = None
    ) -> None:
        assert all(map(cudnn._ready, (image, filters, response)))
        self.append((kind, image, filters, response, window))
        before, after = window.before, window.after
        pads = [side for pair in zip(before[::-1], after[::-1], strict=True) for side in pair]
        if kind == "y":
            response.copy_(F.conv3d(F.pad(image, pads), filters, bias, window.stride, 0, window.dilation))
            return
        padded = F.pad(image if kind == "grad_weight" else torch.zeros_like(image), pads)
        wanted = (kind == "grad_x", kind == "grad_weight", False)
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            response, padded, filters, None, window.stride, (0,) * 3, window.dilation, False, (0,) * 3, 1, wanted
        )
        if kind == "grad_x":
            inside = [slice(low, low + size) for low, size in zip(before, image.shape[2:], strict=True)]
            image.copy_(of_x[(..., *inside)])
        else:
            filters.copy_(of_weight)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """The backend takes CPU tensors, on PyTorch."""
    made, at = Calls(), _dispatch.op("causal_conv3d")
    backends = [
        dataclasses.replace(b, unsupported=lambda **inputs: None) if b.name == "cudnn" else b for b in at.backends
    ]
    monkeypatch.setitem(_dispatch._ops, "causal_conv3d", at._replace(backends=tuple(backends)))
    monkeypatch.setattr(cudnn, "run", made.run)
    yield made
    assert made


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("option", ZEROS)
def test_matches_the_truth_for_every_option(option: str, layout: str, calls: Calls) -> None:
    inputs = sample(layout=layout, **ZEROS[option])
    check_op(forced, reference, inputs, rows=terms(inputs))


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_truth_in_every_shape(shape: str, calls: Calls) -> None:
    inputs = sample(layout="channels_last", **SHAPES[shape])
    check_op(forced, reference, inputs, rows=terms(inputs))


def test_nothing_of_the_size_of_x_is_copied(calls: Calls) -> None:
    inputs = sample(layout="channels_last", channels=8, out_channels=8, frames=9, batch=1)
    x = inputs["x"]
    forced(**inputs).sum().backward()
    read = [image for kind, image, *_ in calls if kind != "grad_x"]
    assert [image.data_ptr() for image in read] == [x.data_ptr()] * 2
    calls.clear()
    forced(**sample(layout="channels_last", channels=8, out_channels=8, frames=9, batch=2, history=True))
    near, rest = (image for _, image, *_ in calls)
    assert near.shape[2] == 4  # two frames of history, and what the first two outputs see of x
    assert rest._base is not None
    assert rest.shape[2] == 9


def test_an_empty_batch_calls_nothing() -> None:
    inputs = prepared(sample(batch=0, history=True))
    y = torch.empty(0, 20, 4, 7, 9)
    cudnn.forward(**inputs, y=y)
    gradients = {f"grad_{n}": torch.full_like(inputs[n], torch.nan) for n in ("x", "weight", "bias", "history")}
    del inputs["bias"]
    cudnn.backward(**inputs, grad_y=y, **gradients)
    assert not any(gradient.any() for gradient in gradients.values())


def prepared(inputs: dict[str, Any]) -> dict[str, Any]:
    checked = _dispatch.prepare("causal_conv3d", **inputs)
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in checked.items()}


def test_a_chunk_reads_the_chunk_before(calls: Calls) -> None:
    inputs = sample(layout="channels_last", frames=8, batch=1)
    whole = forced(**inputs)
    inputs["history"] = inputs["x"][:, :, 2:4]
    inputs["x"] = inputs["x"][:, :, 4:]
    torch.testing.assert_close(forced(**inputs), whole[:, :, 4:])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float64}, "no convolution for torch.float64"),
        ({"space_padding": "reflect"}, "pads frames with zeros only, not with 'reflect'"),
        ({"space_padding": "replicate", "padding": 0}, None),
        ({"groups": 2}, "takes one group: with more, its gradient of the weight was wrong on an H200"),
    ],
)
def test_what_it_takes(options: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "reason", None)
    inputs = prepared(sample(**options))
    assert "runs on NVIDIA GPUs; this tensor is on cpu" in str(cudnn.unsupported(**inputs))
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_cuda = {n: torch.empty_like(v, device="cuda") if isinstance(v, Tensor) else v for n, v in inputs.items()}
        assert cudnn.unsupported(**on_cuda) == reason


def test_offsets_of_64_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn, "reason", None)
    inputs = prepared(sample(out_channels=6))
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs["x"] = torch.empty(1, 6, 2, 8192, 16384, device="cuda")
        assert cudnn.unsupported(**inputs) is None
        inputs["weight"] = torch.empty(8, 6, 3, 3, 3, device="cuda")
        assert "2**31" in str(cudnn.unsupported(**inputs))


@pytest.mark.skipif(cudnn.reason is None, reason="nvidia-cudnn-frontend is installed")
def test_without_the_package_the_reason_is_told() -> None:
    told = "nvidia-cudnn-frontend is not installed (pip install walt-kernels[cudnn])"
    assert explain("causal_conv3d", **sample())["cudnn"] == told
    with pytest.raises(
        RuntimeError, match=r"'cudnn' was forced and cannot run: nvidia-cudnn-frontend is not installed"
    ):
        forced(**sample())


def test_no_plan_is_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    window = cudnn.Window((2, 1, 1), (0, 1, 1), (1, 1, 1), (1, 1, 1))
    sizes = ((1, 8, 3, 4, 4), (8, 8, 3, 3, 3), (1, 8, 3, 4, 4))
    call = cudnn.Call("y", sizes, (384, 384), window, torch.float32, False, False, 0, threading.get_ident())
    with pytest.raises(
        RuntimeError, match=r"no plan yet for y of x \(1, 8, 3, 4, 4\) .* while a CUDA graph is captured"
    ):
        cudnn._plan(call)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def on_device(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: move(value, "cuda") for name, value in inputs.items()}


@pytest.fixture
def ieee(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


# Few: a plan takes half a second to make.
ON_GPU: dict[str, dict[str, Any]] = {
    "history, even kernel, stride": {"history": True, "frames": 9, "kernel": (4, 4, 4), "stride": 2},
    "first_frame, dilation": {"time_padding": "first_frame", "dilation": (2, 1, 2)},
    "contiguous": {"layout": "contiguous", "dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "to few channels": {"out_channels": 3},
}


@pytest.mark.gpu
@on_gpu
@pytest.mark.usefixtures("ieee")
@pytest.mark.parametrize("option", ON_GPU)
def test_matches_the_truth_on_a_gpu(option: str) -> None:
    given: dict[str, Any] = {"channels": 16, "out_channels": 24, "dtype": torch.bfloat16, "layout": "channels_last"}
    inputs = on_device(sample(**given | ON_GPU[option]))
    check_op(forced, reference, inputs, rows=terms(inputs))


def results(inputs: dict[str, Any]) -> list[Tensor]:
    y = forced(**inputs)
    leaves = [value for value in inputs.values() if isinstance(value, Tensor)]
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]


WIDE: dict[str, Any] = {
    "channels": 64,
    "out_channels": 64,
    "size": (16, 16),
    "dtype": torch.bfloat16,
    "layout": "channels_last",
}


@pytest.mark.gpu
@on_gpu
def test_the_same_bits_beside_a_busy_stream() -> None:
    inputs = on_device(sample(**WIDE, history=True))
    expected = results(inputs)
    noise, busy = torch.empty(2**26, device="cuda"), torch.cuda.Stream()
    for _ in range(50):
        with torch.cuda.stream(busy):
            noise.normal_()
        assert all(map(torch.equal, results(inputs), expected))


@pytest.mark.gpu
@on_gpu
def test_a_captured_graph_replays_it() -> None:
    inputs = on_device(sample(**WIDE, history=True))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(inputs)
    with torch.no_grad():
        inputs["x"].mul_(2)
    graph.replay()
    assert all(map(torch.equal, captured, results(inputs)))


@pytest.mark.gpu
@on_gpu
def test_compiles() -> None:
    module = CausalConv3d(64, 64, 3).cuda().bfloat16()
    x = torch.randn(2, 64, 4, 16, 16, device="cuda", dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    with use_backend("cudnn"):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        grads = [torch.autograd.grad(f(x).float().square().sum(), [x, module.weight]) for f in (module, compiled)]
    assert all(map(torch.equal, *grads))
