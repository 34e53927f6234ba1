"""What users run today for a causal convolution: a padded copy, then the vendor's convolution, in either layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .contender import Contender


def _padded(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int, int]) -> Tensor:
    kt = weight.shape[2]
    pads: list[int] = []
    for size, kernel, step in zip(x.shape[:2:-1], weight.shape[:2:-1], stride[:0:-1], strict=True):  # width, height
        # The op's padding="same": the rest of the last window lies beyond the frame's edge.
        before, last = (kernel - 1) // 2, (size - 1) // step * step
        pads += [before, max(last + kernel - size - before, 0)]
    padded = F.pad(x, (*pads, kt - 1, 0)) if any(pads) or kt > 1 else x
    return F.conv3d(padded, weight, bias, stride)


def baselines(inputs: dict[str, Any]) -> dict[str, Contender]:
    """Functions of the same keyword arguments as the op."""

    def channels_last(x: Tensor, **rest: Any) -> Tensor:
        return _padded(x.contiguous(memory_format=torch.channels_last_3d), **rest)

    def channels_first(x: Tensor, **rest: Any) -> Tensor:
        return _padded(x.contiguous(), **rest)

    return {"pad + conv3d NDHWC": Contender(channels_last), "pad + conv3d NCDHW": Contender(channels_first)}
