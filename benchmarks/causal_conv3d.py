"""What users run today for a causal convolution: a padded copy, then the vendor's convolution, in either layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .contender import Contender


def _padded(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int, int]) -> Tensor:
    kt, kh, kw = weight.shape[2:]
    # The same rule as padding="same": the last output pixel's window ends at or beyond the frame's edge.
    pads = [max(k - s - (size - 1) % s, 0) for k, s, size in zip((kh, kw), stride[1:], x.shape[3:], strict=True)]
    (ph, pw) = pads
    padded = F.pad(x, (pw // 2, pw - pw // 2, ph // 2, ph - ph // 2, kt - 1, 0)) if ph or pw or kt > 1 else x
    return F.conv3d(padded, weight, bias, stride)


def baselines(inputs: dict[str, Any]) -> dict[str, Contender]:
    """Functions of the same keyword arguments as the op."""

    def channels_last(x: Tensor, **rest: Any) -> Tensor:
        return _padded(x.contiguous(memory_format=torch.channels_last_3d), **rest)

    def channels_first(x: Tensor, **rest: Any) -> Tensor:
        return _padded(x.contiguous(), **rest)

    return {"pad + conv3d NDHWC": Contender(channels_last), "pad + conv3d NCDHW": Contender(channels_first)}
