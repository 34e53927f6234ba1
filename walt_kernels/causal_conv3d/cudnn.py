"""cuDNN through its graph API (nvidia-cudnn-frontend), which pads one side of time by itself: no padded copy of x.

PyTorch's own calls of cuDNN pad both sides alike, so a causal convolution costs them a copy. Tensors go in as
channels_last_3d, which cuDNN's kernels read; others are copied to it. Products are summed in float32 (TF32 only where
``torch.backends.cudnn.allow_tf32`` says so), by engines that give the same bits in every run.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._dispatch import Backend
from .layout import output_shape
from .reference import past

LAST = torch.channels_last_3d
DTYPES = {torch.float32: "FLOAT", torch.bfloat16: "BFLOAT16", torch.float16: "HALF"}  # cuDNN's names
IMAGE, FILTER, RESPONSE, BIAS = 1, 2, 3, 4  # a plan's tensors: x, weight and y, or the gradients of these
OPT_IN = "behind triton where both were measured, so only where it is forced"
MISSING = "nvidia-cudnn-frontend is not installed (pip install walt-kernels[cudnn])"


def _find() -> str | None:
    """Why there is no cuDNN. It is imported by the first call that needs it."""
    found = importlib.util.find_spec("cudnn")
    return None if found is not None and found.origin is not None else MISSING  # a mere folder has no origin


reason = _find()


def backend() -> Backend:
    return Backend("cudnn", unsupported, forward, backward, OPT_IN)


def unsupported(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    space_padding: str,
    groups: int,
    **inputs: Any,
) -> str | None:
    if reason is not None:
        return reason
    if x.device.type != "cuda" or torch.version.hip is not None:
        return f"runs on NVIDIA GPUs; this tensor is on {x.device}"
    if x.dtype not in DTYPES:
        return f"no convolution for {x.dtype}"
    if groups > 1:
        return "takes one group: with more, its gradient of the weight was wrong on an H200"
    if space_padding != "zeros" and any(padding):
        return f"pads frames with zeros only, not with {space_padding!r}"
    if not torch.compiler.is_compiling():  # where sizes may be open
        shapes = x.shape, output_shape(x, weight, stride, dilation, padding)
        if max(map(math.prod, shapes)) >= 2**31:
            return "tensors of 2**31 elements and more need 64-bit offsets"
    return None


class Window(NamedTuple):
    """How outputs lie over inputs, in (time, height, width)."""

    before: tuple[int, int, int]  # zeros in front, on top and on the left
    after: tuple[int, int, int]
    stride: tuple[int, int, int]
    dilation: tuple[int, int, int]


class Call(NamedTuple):
    """All that a plan depends on. ``kind`` is what is computed: "y", "grad_x" or "grad_weight"."""

    kind: str
    sizes: tuple[tuple[int, ...], ...]  # of image, filter and response
    batch_strides: tuple[int, int]  # of image and response
    window: Window
    dtype: torch.dtype
    bias: bool
    tf32: bool
    device: int
    thread: int


class Plan(NamedTuple):
    graph: Any
    handle: int
    workspace_bytes: int


@functools.cache
def _handle(device: int, thread: int) -> int:
    """cuDNN's state of a thread on a device, which is the current one."""
    import cudnn

    return cudnn.create_handle()


@functools.lru_cache(maxsize=4096)
def _plan(call: Call) -> Plan:
    """The fastest engine for the call by cuDNN's heuristics, ready to run."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"causal_conv3d: cuDNN has no plan yet for {call.kind} of x {call.sizes[0]} and weight {call.sizes[1]}, "
            "and none can be made while a CUDA graph is captured; run the same call once before"
        )
    import cudnn

    dtype, handle = getattr(cudnn.data_type, DTYPES[call.dtype]), _handle(call.device, call.thread)
    graph = cudnn.pygraph(
        io_data_type=dtype,
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=handle,
    )
    image, filters, response = call.sizes
    layouts = {
        IMAGE: (image, _strides(image, call.batch_strides[0])),
        FILTER: (filters, _strides(filters)),
        RESPONSE: (response, _strides(response, call.batch_strides[1])),
    }

    def given(uid: int) -> Any:
        sizes, strides = layouts[uid]
        return graph.tensor(dim=list(sizes), stride=list(strides), data_type=dtype, uid=uid)

    window = dict(
        zip(("pre_padding", "post_padding", "stride", "dilation"), map(list, call.window), strict=True),
        compute_data_type=cudnn.data_type.FLOAT,
    )
    if call.kind == "y":
        uid, out = RESPONSE, graph.conv_fprop(image=given(IMAGE), weight=given(FILTER), **window)
        if call.bias:
            channels = filters[0]
            sizes, strides = [1, channels, 1, 1, 1], [channels, 1, channels, channels, channels]
            out = graph.add(a=out, b=graph.tensor(dim=sizes, stride=strides, data_type=dtype, uid=BIAS))
    elif call.kind == "grad_x":
        uid, out = IMAGE, graph.conv_dgrad(loss=given(RESPONSE), filter=given(FILTER), **window)
    else:
        uid, out = FILTER, graph.conv_wgrad(image=given(IMAGE), loss=given(RESPONSE), **window)
    out.set_output(True)
    out.set_uid(uid)
    out.set_data_type(dtype)
    out.set_dim(list(layouts[uid][0]))
    out.set_stride(list(layouts[uid][1]))
    try:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.deselect_numeric_notes(_refused(call))
        graph.check_support()
        graph.build_plans(cudnn.build_plan_policy.HEURISTICS_CHOICE)
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
        raise RuntimeError(
            f"causal_conv3d: cuDNN has no deterministic engine for {call.kind} of x {image} and weight {filters} in "
            f"{call.dtype} ({error}); use_backend('triton') or 'reference' runs it"
        ) from error
    return Plan(graph, handle, graph.get_workspace_size())


def _refused(call: Call) -> list[Any]:
    """Properties of engines that our kernels have not either."""
    import cudnn

    note = cudnn.numerical_note
    notes = [note.NONDETERMINISTIC, note.DOWN_CONVERT_INPUTS, note.REDUCED_PRECISION_REDUCTION]
    return [*notes, note.TENSOR_CORE] if call.dtype is torch.float32 and not call.tf32 else notes


def _strides(sizes: Sequence[int], batch: int | None = None) -> tuple[int, ...]:
    """Of a channels_last_3d tensor, samples ``batch`` apart; those that torch has for sizes of 1 may be any."""
    _, C, T, H, W = sizes
    return T * H * W * C if batch is None else batch, 1, H * W * C, W * C, C


def _apart(tensor: Tensor) -> int:
    """The stride of samples."""
    return tensor.stride(0) if tensor.shape[0] > 1 else tensor[0].numel()


def _ready(tensor: Tensor) -> bool:
    """Whether cuDNN takes the tensor as it is: samples in channels_last_3d that do not overlap, 16-byte aligned."""
    apart = tensor.shape[0] == 1 or tensor.stride(0) >= tensor[0].numel()
    return apart and tensor[:1].is_contiguous(memory_format=LAST) and tensor.data_ptr() % 16 == 0


def _read(tensor: Tensor) -> Tensor:
    return tensor if _ready(tensor) else tensor.clone(memory_format=LAST)


def _written(tensor: Tensor, write: Callable[[Tensor], None]) -> None:
    """``write`` gets the tensor, or memory that is copied to it."""
    if _ready(tensor):
        write(tensor)
    else:
        memory = torch.empty_like(tensor, memory_format=LAST)
        write(memory)
        tensor.copy_(memory)


def run(
    kind: str, image: Tensor, filters: Tensor, response: Tensor, window: Window, bias: Tensor | None = None
) -> None:
    """One of cuDNN's convolutions. All tensors are ``_ready``; ``kind`` says which one is written."""
    import cudnn

    device = image.device.index
    call = Call(
        kind,
        (tuple(image.shape), tuple(filters.shape), tuple(response.shape)),
        (_apart(image), _apart(response)),
        window,
        image.dtype,
        bias is not None,
        image.dtype is torch.float32 and torch.backends.cudnn.allow_tf32,
        device,
        threading.get_ident(),
    )
    with torch.cuda.device(device):
        plan = _plan(call)
        cudnn.set_stream(handle=plan.handle, stream=torch.cuda.current_stream().cuda_stream)
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=image.device)
        tensors = {IMAGE: image.data_ptr(), FILTER: filters.data_ptr(), RESPONSE: response.data_ptr()}
        if bias is not None:
            tensors[BIAS] = bias.data_ptr()
        plan.graph.execute(tensors, workspace.data_ptr(), handle=plan.handle)


def _seeing_the_past(weight: Tensor, y: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> tuple[int, int]:
    """Frames before x that a kernel reaches, and how many outputs see some of them."""
    frames = (weight.shape[2] - 1) * dilation[0]
    return frames, min(math.ceil(frames / stride[0]), y.shape[2])


def _over(before: int, after: int, padding: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Window:
    """With so many frames of zeros before and after the input."""
    top, bottom, left, right = padding
    return Window((before, top, left), (after, bottom, right), tuple(stride), tuple(dilation))  # type: ignore[arg-type]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    y: Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_padding: str,
    space_padding: str,
    groups: int,
) -> None:
    if y.numel() == 0:
        return
    weight = _read(weight)
    if bias is not None and not (bias.is_contiguous() and bias.data_ptr() % 16 == 0):
        bias = bias.clone(memory_format=torch.contiguous_format)
    frames, seeing = _seeing_the_past(weight, y, stride, dilation)

    def convolve(image: Tensor, zeros: int, out: Tensor) -> None:
        image, window = _read(image), _over(zeros, 0, padding, stride, dilation)
        _written(out, lambda memory: run("y", image, weight, memory, window, bias))

    if frames == 0 or (history is None and time_padding == "zeros"):
        convolve(x, frames, y)
        return
    first = x[:, :, : (seeing - 1) * stride[0] + 1]  # what those outputs see of x
    B, C, T, H, W = first.shape
    joined = torch.empty((B, C, frames + T, H, W), dtype=x.dtype, device=x.device, memory_format=LAST)
    joined[:, :, :frames].copy_(past(x, frames, time_padding) if history is None else history)
    joined[:, :, frames:].copy_(first)
    convolve(joined, 0, y[:, :, :seeing])
    if seeing < y.shape[2]:
        convolve(x[:, :, seeing * stride[0] - frames :], 0, y[:, :, seeing:])


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    history: Tensor | None,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_history: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_padding: str,
    space_padding: str,
    groups: int,
) -> None:
    """The convolution is the sum of one over x, zeros before it, and one over the past, zeros behind it.

    The past's share of grad_weight is rounded before it is added, as PyTorch rounds that of each of two convolutions.
    """
    if grad_bias is not None:
        torch.sum(grad_y, (0, 2, 3, 4), out=grad_bias)  # added up in float32
    if grad_y.numel() == 0:
        for gradient in (grad_x, grad_weight, grad_history):
            if gradient is not None:
                gradient.zero_()
        return
    weight, grad_y = _read(weight), _read(grad_y)
    frames, seeing = _seeing_the_past(weight, grad_y, stride, dilation)
    window = _over(frames, 0, padding, stride, dilation)
    if grad_x is not None:
        _written(grad_x, lambda memory: run("grad_x", memory, weight, grad_y, window))
    if grad_weight is not None:
        image = _read(x)
        _written(grad_weight, lambda memory: run("grad_weight", image, memory, grad_y, window))

    repeated = history is None and time_padding == "first_frame"
    if frames == 0 or not (repeated or history is not None):
        return
    window, sent = _over(0, (seeing - 1) * stride[0] + 1, padding, stride, dilation), _read(grad_y[:, :, :seeing])
    if repeated and grad_x is not None:
        copies = torch.empty_like(past(x, frames, time_padding), memory_format=LAST)
        run("grad_x", copies, weight, sent, window)
        grad_x[:, :, :1].add_(copies.sum(2, keepdim=True, dtype=torch.float32))
    if grad_history is not None:
        _written(grad_history, lambda memory: run("grad_x", memory, weight, sent, window))
    if grad_weight is not None:
        before, share = _read(past(x, frames, time_padding) if history is None else history), torch.empty_like(weight)
        run("grad_weight", before, share, sent, window)
        grad_weight.add_(share)
