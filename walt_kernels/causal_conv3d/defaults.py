"""What causal_conv3d runs on by default on a GPU, and the rows that say so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._defaults import Defaults, Fastest
from .._layout import memory_format

FEW = 16  # channels: with fewer, a convolution is bound by memory


def classify(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
    space_padding: str,
    groups: int,
    **inputs: Any,
) -> str | None:
    """What decides which backend is the fastest. Calls whose past is not zeros are as those whose past is."""
    if x.dtype is not torch.bfloat16 and x.dtype is not torch.float16:
        return None
    if groups > 1 or max(dilation) > 1 or space_padding != "zeros":
        return None
    if memory_format(x) is not torch.channels_last_3d:
        return None
    out_channels, channels, *kernel = weight.shape
    if channels < FEW:
        return "from few channels"
    if out_channels < FEW:
        return "to few channels"
    if channels % 8 or out_channels % 8:  # no boxes for TMA
        return None
    if max(stride) > 1:
        return "strided"
    return "3x3x3" if max(kernel) > 1 else None


SM_90 = {
    "3x3x3": Fastest("triton", "cuda-sm90.json: C 128, 17x128x128"),
    "strided": Fastest("triton", "cuda-sm90.json: down 128, 17x64x64"),
    "from few channels": Fastest("triton", "cuda-sm90.json: stem 3 to 128, 17x128x128"),
    "to few channels": Fastest("triton", "cuda-sm90.json: head 128 to 3, 17x128x128"),
}
DEFAULTS = Defaults(classify, {"sm_90": SM_90})
