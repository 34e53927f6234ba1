"""The definition of causal_conv3d in plain PyTorch: right in float64, differentiable any number of times."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def past(x: Tensor, frames: int, time_padding: str) -> Tensor:
    """What stands before frame 0 when there is no history: [B, C, frames, H, W]."""
    if time_padding == "first_frame":
        return x[:, :, :1].expand(-1, -1, frames, -1, -1)
    return x.new_zeros(()).expand(x.shape[0], x.shape[1], frames, x.shape[3], x.shape[4])


def source_index(size: int, before: int, after: int, mode: str, device: torch.device) -> Tensor:
    """The row (or column) that each position of the padded frame copies under "replicate" or "reflect"."""
    index = torch.arange(-before, size + after, device=device)
    if mode == "reflect":
        index = index.abs()
        return torch.where(index >= size, 2 * (size - 1) - index, index)
    return index.clamp(0, size - 1)


def pad_space(x: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    """Pads H and W by (top, bottom, left, right)."""
    top, bottom, left, right = padding
    if mode == "zeros":
        return F.pad(x, (left, right, top, bottom))
    if top or bottom:
        x = x.index_select(3, source_index(x.shape[3], top, bottom, mode, x.device))
    if left or right:
        x = x.index_select(4, source_index(x.shape[4], left, right, mode, x.device))
    return x


def causal_conv3d(
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
    frames = (weight.shape[2] - 1) * dilation[0]
    if history is None and time_padding == "zeros" and space_padding == "zeros":  # one copy where one is enough
        top, bottom, left, right = padding
        x = F.pad(x, (left, right, top, bottom, frames, 0))
    else:
        if frames or history is not None:
            x = torch.cat([past(x, frames, time_padding) if history is None else history, x], dim=2)
        x = pad_space(x, padding, space_padding)
    return F.conv3d(x, weight, bias, tuple(stride), 0, tuple(dilation), groups)
