"""Causal convolution: its cases, and what users run today, a padded copy and the vendor's convolution."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from walt_kernels.causal_conv3d.op import BACKWARD, flops
from walt_kernels.testing import random

from .case import Case, Inputs, Target
from .contender import Contender


def _padded(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int, int],
    time_padding: str = "zeros",
    space_padding: str = "zeros",
) -> Tensor:
    kt = weight.shape[2]
    pads: list[int] = []
    for size, kernel, step in zip(x.shape[:2:-1], weight.shape[:2:-1], stride[:0:-1], strict=True):  # width, height
        # The op's padding="same": the rest of the last window lies beyond the frame's edge.
        before, last = (kernel - 1) // 2, (size - 1) // step * step
        pads += [before, max(last + kernel - size - before, 0)]
    mode = "constant" if space_padding == "zeros" else space_padding  # which time takes too
    padded = F.pad(x, (*pads, kt - 1, 0), mode) if any(pads) or kt > 1 else x
    return F.conv3d(padded, weight, bias, stride)


def baselines(inputs: dict[str, Any]) -> dict[str, Contender]:
    """Functions of the same keyword arguments as the op."""

    def channels_last(x: Tensor, **rest: Any) -> Tensor:
        return _padded(x.contiguous(memory_format=torch.channels_last_3d), **rest)

    def channels_first(x: Tensor, **rest: Any) -> Tensor:
        return _padded(x.contiguous(), **rest)

    return {"pad + conv3d NDHWC": Contender(channels_last), "pad + conv3d NCDHW": Contender(channels_first)}


def convolution(
    name: str,
    shape: tuple[int, ...],
    out_channels: int,
    kernel: tuple[int, int, int] = (3, 3, 3),
    stride: tuple[int, int, int] = (1, 1, 1),
    quick: bool = True,
    memory_format: torch.memory_format = torch.channels_last_3d,
    **padding: str,
) -> Case:
    """Zero padding unless ``padding`` says otherwise; ``shape`` is [B, C, T, H, W]."""
    B, C, T, H, W = shape

    def inputs(dtype: torch.dtype) -> Inputs:
        x = random(*shape, dtype=dtype, grad=False).to(memory_format=memory_format).requires_grad_()
        weight = random(out_channels, C, *kernel, dtype=dtype, scale=(C * kernel[0] * kernel[1] * kernel[2]) ** -0.5)
        return {"x": x, "weight": weight, "bias": random(out_channels, dtype=dtype), "stride": stride, **padding}

    y = (B, out_channels, *(-(-size // s) for size, s in zip(shape[2:], stride, strict=True)))
    taps = kernel[0] * kernel[1] * kernel[2]
    moved = B * C * T * H * W + taps * C * out_channels + math.prod(y)
    return Case(
        "causal_conv3d",
        name,
        inputs,
        flops(y, (out_channels, C, *kernel)),
        moved,
        1 + BACKWARD,
        3.0,
        taps * C,
        lambda: convolution(
            "small",
            (1, min(C, 64), min(T, 2), 8, 8),
            min(out_channels, 64),
            kernel,
            stride,
            quick=True,
            memory_format=memory_format,
            **padding,
        ),
        quick,
    )


REPLICATED: dict[str, Any] = {
    "time_padding": "first_frame",
    "space_padding": "replicate",
}  # one F.pad

CASES = [
    convolution("C 64, 17x64x64", (1, 64, 17, 64, 64), 64),
    convolution("C 128, 17x32x32", (1, 128, 17, 32, 32), 128),
    convolution("C 256, 9x16x16", (1, 256, 9, 16, 16), 256),
    convolution("C 512, 5x16x16", (1, 512, 5, 16, 16), 512, quick=False),
    convolution("stem 3 to 128, 17x64x64", (1, 3, 17, 64, 64), 128, quick=False),
    convolution("head 128 to 3, 17x64x64", (1, 128, 17, 64, 64), 3, quick=False),
    convolution("down 128, 17x32x32", (1, 128, 17, 32, 32), 128, (4, 4, 4), (2, 2, 2), quick=False),
    convolution("1x1x1 128 to 256, 17x32x32", (1, 128, 17, 32, 32), 256, (1, 1, 1), quick=False),
    convolution("C 384 replicated, 5x16x16", (1, 384, 5, 16, 16), 384, quick=False, **REPLICATED),
]

# The most important ones first.
GPU_CASES = [
    convolution("C 128, 17x128x128", (1, 128, 17, 128, 128), 128),
    convolution("C 256, 17x64x64", (1, 256, 17, 64, 64), 256),
    convolution("C 512, 4 x 5x16x16", (4, 512, 5, 16, 16), 512),
    convolution("head 128 to 3, 17x128x128", (1, 128, 17, 128, 128), 3, quick=False),
    convolution("stem 3 to 128, 17x128x128", (1, 3, 17, 128, 128), 128, quick=False),
    convolution("down 128, 17x64x64", (1, 128, 17, 64, 64), 128, (4, 4, 4), (2, 2, 2), quick=False),
    convolution(
        "contiguous C 128, 17x128x128", (1, 128, 17, 128, 128), 128, quick=False, memory_format=torch.contiguous_format
    ),
    convolution("1x1x1 128 to 256, 17x64x64", (1, 128, 17, 64, 64), 256, (1, 1, 1), quick=False),
]

# A case and the same with one size doubled.
SCALING = [
    {
        "base": convolution("scaling", (1, 64, 8, 32, 32), 64),
        "frames": convolution("scaling", (1, 64, 16, 32, 32), 64),
        "channels": convolution("scaling", (1, 128, 8, 32, 32), 128),
        "batch": convolution("scaling", (2, 64, 8, 32, 32), 64),
    },
]

DEEP = ("C 128", "C 256", "C 512")

TARGETS = [
    Target("causal_conv3d", "forward", DEEP, 0.60, "product", 1.2, "pad + conv3d", lean=True),
    Target("causal_conv3d", "backward", DEEP, 0.50, "product", 1.2, "pad + conv3d", lean=True),
]
