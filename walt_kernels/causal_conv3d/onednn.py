"""PyTorch's own convolution (oneDNN) in the layout that it likes, over a copy of x that is padded in time.

It is by far the fastest where the processor multiplies matrices of 16-bit numbers (AMX), and mostly slower elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch import Backend
from .._layout import memory_format
from .._library import transformed
from .._native import PROCESSOR_FLAGS, C
from . import reference

AVAILABLE = torch.backends.mkldnn.is_available()  # torch.compile cannot ask
DTYPES = (torch.float32, torch.bfloat16)  # oneDNN's; what it has not, PyTorch computes in minutes
SLOWER = "mostly slower than cpu on a processor without AMX, so only where it is forced"


# Levels that run here; where nobody has asked the system for tiles, it is taken to grant them.
_BUILT = {} if C is None else C.build_info()
LEVELS = tuple(_BUILT["isa_runnable"]) if "amx" in _BUILT.get("isa_compiled", ()) else ("amx",)


def backend(
    flags: frozenset[str] = PROCESSOR_FLAGS,
    levels: Sequence[str] = LEVELS,
    environment: Mapping[str, str] = os.environ,
) -> Backend:
    """The backend on a processor with these flags, where kernels of these levels run."""
    return Backend("onednn", unsupported, forward, opt_in=_without_amx(flags, levels, environment), behind=behind)


def _without_amx(flags: frozenset[str], levels: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """Why oneDNN would not multiply on tiles, or None."""
    if not {"amx_tile", "amx_bf16"} <= flags:
        return SLOWER
    if "amx" not in levels:
        return "the operating system does not let this process use AMX, without which it is mostly slower than cpu"
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        limit = environment.get(name, "").upper()
        if limit and "AMX" not in limit and limit not in ("DEFAULT", "ALL"):
            return f"{name}={environment[name]} keeps it from AMX, without which it is mostly slower than cpu"
    return None


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


def behind(x: Tensor, weight: Tensor, groups: int, **inputs: Any) -> str | None:
    """Why the C++ kernels are the faster ones for this call on a processor with AMX, or None.

    In bfloat16 it was measured to be ahead with 3 channels as with 512, with any kernel, stride, groups and padding,
    but for the gradients of depthwise convolutions, for which it takes twice as long.
    """
    if x.dtype is not torch.bfloat16:
        return f"AMX does not multiply {x.dtype}"
    if not torch.compiler.is_compiling() and not torch.backends.mkldnn.enabled:  # torch.compile cannot ask
        return "torch.backends.mkldnn.enabled is False"
    if groups > 1 and weight.shape[1] == 1 and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return "behind for the gradients of a depthwise convolution"
    return None


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
    return y.contiguous(memory_format=wanted) if given is wanted else _contiguous(y)


def _contiguous(y: Tensor) -> Tensor:
    """y as a contiguous tensor: sample by sample, as PyTorch transposes a matrix several times as
    fast as what has more dimensions.
    """
    if torch.compiler.is_compiling() or y.shape[0] == 0:
        return y.contiguous()
    samples = [sample.t().contiguous() for sample in y.permute(0, 2, 3, 4, 1).flatten(1, 3).unbind()]
    joined = samples[0][None] if len(samples) == 1 else torch.stack(samples)
    return joined.unflatten(2, y.shape[2:])
