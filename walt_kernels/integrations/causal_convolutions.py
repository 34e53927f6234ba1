"""Causal convolutions of other libraries, by `causal_conv3d`: no padded copy, no concatenation with a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import DTYPES
from .._library import autocast_enabled
from ..causal_conv3d import causal_conv3d
from ..causal_conv3d.reference import past
from .adapter import Adapter

FAMILY = ("CausalConv3d",)

# The names that PyTorch has for space padding, and ours.
_MODES = {"zeros": "zeros", "constant": "zeros", "replicate": "replicate", "reflect": "reflect"}


def _convolve(
    conv: nn.Conv3d,
    x: Tensor,
    *,
    front: int,
    before: Tensor | None = None,
    time_padding: str = "first_frame",
    padding: Any = 0,
    mode: str = "zeros",
) -> Tensor | None:
    """The convolution over ``front`` frames of time padding, then ``before``, then x, with no padding of time itself.

    None where the op cannot take it: the call is then the original's.
    """
    span = (conv.kernel_size[0] - 1) * conv.dilation[0]
    known = front + (0 if before is None else before.shape[2])
    if not _takes(conv, x, before) or mode not in _MODES or front < 0 or not known <= span < known + x.shape[2]:
        return None
    history = None
    if before is not None or front < span:
        pieces = [past(x, front, time_padding)] if front else []
        pieces += [] if before is None else [before]
        if known < span:  # the first output frame stands at a later frame of x
            pieces.append(x[:, :, : span - known])
            x = x[:, :, span - known :]
        history = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
    return causal_conv3d(
        x,
        conv.weight,
        conv.bias,
        stride=conv.stride,
        dilation=conv.dilation,
        padding=padding,
        time_padding=time_padding,
        space_padding=_MODES[mode],
        history=history,
        groups=conv.groups,
    )


def _takes(conv: nn.Conv3d, x: Tensor, before: Tensor | None) -> bool:
    """Whether the tensors of a call are of one dtype that the op has, on one device, or become so by autocast."""
    if x.dim() != 5 or 0 in x.shape[1:]:
        return False
    tensors = [tensor for tensor in (x, conv.weight, conv.bias, before) if tensor is not None]
    dtypes = {tensor.dtype for tensor in tensors}
    if len({tensor.device for tensor in tensors}) > 1 or not dtypes.issubset(DTYPES):
        return False
    return len(dtypes) == 1 or (autocast_enabled(x.device.type) and torch.float64 not in dtypes)


def _wan(self: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """Zeros in front of time; what a cache has of the past takes the place of as many of them."""
    left, _, top, _, front, _ = self._padding
    before = None if cache_x is None or not front else cache_x.to(x.device)
    missing = front if before is None else front - before.shape[2]
    y = _convolve(self, x, front=missing, before=before, time_padding="zeros", padding=(top, left))
    return self.original_forward(x, cache_x) if y is None else y


def _refuses_own_padding(module: nn.Module) -> str | None:
    """For classes that are an nn.Conv3d and pad before they call it."""
    assert isinstance(module, nn.Conv3d)
    padding = module.padding if isinstance(module.padding, str) else any(module.padding)
    return f"its convolution pads once more (padding is {module.padding!r})" if padding else None


def _diffusers(path: str, forward: Any, known: str, **options: Any) -> Adapter:
    return Adapter(f"diffusers.models.autoencoders.{path}", "causal_conv3d", forward, frozenset({known}), **options)


ADAPTERS = (_diffusers("autoencoder_kl_wan.WanCausalConv3d", _wan, "3437b1ebe51ce66f", refuses=_refuses_own_padding),)
