"""PyTorch's own convolution (oneDNN) in the layout that it likes, over a copy of x that is padded in time.

It is by far the fastest where the processor multiplies matrices of 16-bit numbers (AMX), and mostly slower elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch import Backend
from .._layout import memory_format
from .._library import transformed
from .._native import PROCESSOR_FLAGS
from . import reference

AVAILABLE = torch.backends.mkldnn.is_available()  # torch.compile cannot ask
DTYPES = (torch.float32, torch.bfloat16)  # oneDNN's; what it has not, PyTorch computes in minutes
SLOWER = "mostly slower than cpu on a processor without AMX, so only where it is forced"


def backend(flags: frozenset[str] = PROCESSOR_FLAGS) -> Backend:
    """The backend on a processor with these flags."""
    amx = {"amx_tile", "amx_bf16"} <= flags
    return Backend("onednn", unsupported, forward, opt_in=None if amx else SLOWER, behind=behind)


def unsupported(x: Tensor, **inputs: Any) -> str | None:
    if x.device.type != "cpu":
        return f"runs on CPU tensors; this one is on {x.device}"
    if not AVAILABLE:
        return "this PyTorch was built without oneDNN"
    if x.dtype not in DTYPES:
        return f"no convolution for {x.dtype}"
    if transformed():
        return "does not run in forward mode and under torch.func, which know no memory formats"
    return None


def behind(x: Tensor, **inputs: Any) -> str | None:
    """Why the C++ kernels are the faster ones for this call on a processor with AMX, or None.

    In bfloat16 it was measured to be ahead with 3 channels as with 512, with any kernel, stride, groups and padding.
    """
    return None if x.dtype is torch.bfloat16 else f"AMX does not multiply {x.dtype}"


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    history: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    time_padding: str,
    space_padding: str,
    groups: int,
) -> Tensor:
    given, wanted = memory_format(x), torch.channels_last_3d
    frames = (weight.shape[2] - 1) * dilation[0]
    x = x.contiguous(memory_format=wanted)
    if history is None and frames == 0:
        padded = x
    elif history is None and time_padding == "zeros":
        padded = F.pad(x, (0, 0, 0, 0, frames, 0))
    else:
        before = reference.past(x, frames, time_padding) if history is None else history
        padded = torch.cat([before.contiguous(memory_format=wanted), x], dim=2)
    top, bottom, left, right = padding
    if space_padding == "zeros" and (top, left) == (bottom, right):
        both = (0, top, left)
    else:  # in a tenth of the time that gathering takes, as the reference does
        mode = "constant" if space_padding == "zeros" else space_padding
        padded, both = F.pad(padded, (left, right, top, bottom, 0, 0), mode), (0, 0, 0)
    y = F.conv3d(padded, weight, bias, tuple(stride), both, tuple(dilation), groups)
    return y.contiguous(memory_format=given)
