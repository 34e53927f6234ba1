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
    history: Tensor | None,
    **inputs: Any,
) -> str | None:
    """What decides which backend is the fastest. Calls whose past is not zeros are as those whose past is.

    But not where x is contiguous: with a ``history`` the kernels read it as it lies, and make channels innermost
    without.
    """
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    if groups > 1 or max(dilation) > 1 or space_padding != "zeros":
        return None
    out_channels, channels, *kernel = weight.shape
    few, last = min(channels, out_channels) < FEW, memory_format(x) is torch.channels_last_3d
    boxes = not few and channels % 8 == out_channels % 8 == 0  # for TMA
    if x.dtype is torch.float32:
        return "strided, float32" if boxes and last and max(stride) > 1 else None
    if last and few:
        return "from few channels" if channels < FEW else "to few channels"
    if not boxes:
        return None
    if max(stride) > 1:
        return "strided" if last else None
    if max(kernel) == 1:
        return None
    if last:
        return "3x3x3"
    return "3x3x3, contiguous" if x.is_contiguous() and history is None else None


SM_90 = {
    "3x3x3": Fastest("triton", "cuda-sm90.json: C 128, 17x128x128"),
    "3x3x3, contiguous": Fastest("triton", "contiguous C 128, 17x128x128: 1.22 ms against 1.61 of cuDNN, on an H200"),
    "strided": Fastest("triton", "down 128, 17x64x64: 0.13 ms against 0.25 of cuDNN, on an H200"),
    "strided, float32": Fastest("reference", "down 128, 17x64x64: 3.7 ms against 5.8 of triton, on an H200"),
    "from few channels": Fastest("triton", "stem 3 to 128, 17x128x128: 0.55 ms against 0.85 of cuDNN, on an H200"),
    "to few channels": Fastest("triton", "head 128 to 3, 17x128x128: 0.46 ms against 0.73 of cuDNN, on an H200"),
}
DEFAULTS = Defaults(classify, {"sm_90": SM_90})
