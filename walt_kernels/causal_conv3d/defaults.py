"""What causal_conv3d runs on by default on a GPU, and the times that say so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._defaults import Defaults, Measured
from .._layout import memory_format

FEW = 16  # channels: with fewer, a convolution is bound by memory


def classify(
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
) -> str | None:
    """What decides which backend is the fastest. Calls whose past is not zeros are as those whose past is."""
    if x.dtype is torch.float32 or x.dtype is torch.float64 or groups > 1 or max(dilation) > 1:
        return None
    if space_padding != "zeros" and any(padding):
        return None
    out_channels, channels, *kernel = weight.shape
    if max(stride) > 1:
        kind = "strided"
    elif max(kernel) == 1:
        kind = "1x1x1"
    elif channels < FEW:
        kind = "from few channels"
    elif out_channels < FEW:
        kind = "to few channels"
    else:
        kind = "to 192 channels" if channels <= 192 else "to 384 channels" if channels <= 384 else "more channels"
    if any(number >= FEW and number % 8 for number in (channels, out_channels)):
        return None
    return f"{kind}, {'NDHWC' if memory_format(x) is torch.channels_last_3d else 'NCDHW'}"


# H200. Triton's passes are those of the kernels that are now being replaced; where a time is missing, none was taken.
PASSES = {"data gradient": ("x", "history"), "weight gradient": ("weight", "bias")}
SM_90 = {
    "to 192 channels, NDHWC": Measured(
        "gpu-h200.json: C 128, 17x128x128",
        {"cudnn": 0.372, "reference": 0.445},
        {
            "data gradient": {"cudnn": 0.340, "reference": 0.379},
            "weight gradient": {"cudnn": 0.352, "reference": 0.353},
        },
    ),
    "to 384 channels, NDHWC": Measured(
        "gpu-h200.json: C 256, 17x64x64",
        {"cudnn": 0.354, "reference": 0.364},
        {
            "data gradient": {"cudnn": 0.362, "reference": 0.374, "triton": 0.371},
            "weight gradient": {"cudnn": 0.366, "reference": 0.340, "triton": 0.665},
        },
    ),
    "more channels, NDHWC": Measured(
        "gpu-h200.json: C 512, 4 x 5x16x16",
        {"cudnn": 0.119, "reference": 0.119},
        {
            "data gradient": {"cudnn": 0.138, "reference": 0.199},
            "weight gradient": {"cudnn": 0.110, "reference": 0.110},
        },
    ),
    "from few channels, NDHWC": Measured(
        "gpu-h200.json: stem 3 to 128, 17x128x128", {"triton": 0.278, "reference": 0.359}, {}
    ),
    "to few channels, NDHWC": Measured(
        "gpu-h200.json: head 128 to 3, 17x128x128", {"triton": 0.229, "reference": 0.369}, {}
    ),
    "strided, NDHWC": Measured("gpu-h200.json: down 128, 17x64x64", {"triton": 0.091, "reference": 0.136}, {}),
}
DEFAULTS = Defaults(classify, PASSES, {"sm_90": SM_90})
