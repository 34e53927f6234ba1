"""LTX's and LTX 2's encoder and decoder part by part: their classes know no past, so their layers in time get one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..causal_conv3d.reference import past
from .adapter import fingerprint, own_forward
from .causal_convolutions import _convolve, _plain, _tail, _twice

# Fingerprints of the forwards of the encoders and decoders, and of the layers that are given a past.
KNOWN = {
    "9c392e4d9b458b74",
    "8ffac93765179e3f",
    "d0df77c2fcce4727",
    "caffd1a3c8117f5f",
    "9a270ae96f9f09f8",
    "535ae97edc993d70",
    "d35093f954d6b5e0",
    "9c4e437b4f268a11",
    "d8e9be0cd4701f3c",
    "627fbdc99a159482",
}


class Coder:
    """The encoder or decoder of LTX from part to part: its layers in time, given a past."""

    def __init__(self, vae: Any, task: str) -> None:
        self.coder: Any = vae.encoder if task == "encode" else vae.decoder
        self.first = True
        self.past: dict[nn.Module, Tensor] = {}
        self.forwards: dict[nn.Module, Callable[..., Tensor]] = {}
        self.factor = 1  # frames of the video to one of the latents
        for name, module in self.coder.named_modules(prefix=f"{task}r"):
            forward = _LAYERS.get(type(module).__name__)
            self._check(name, module, forward is not None or module is self.coder)
            if forward is not None:
                self.forwards[module] = functools.partial(forward, self, module)
                stride = module.conv.stride if forward is Coder.convolve else module.stride
                self.factor *= stride[0]

    def _check(self, name: str, module: Any, in_time: bool) -> None:
        why = None
        if getattr(module, "is_causal", True) is False:
            why = "looks ahead"
        elif getattr(module, "patch_size_t", 1) != 1:
            why = "makes patches of several frames"
        elif getattr(module, "per_channel_scale1", None) is not None:
            why = "adds noise, which every part would draw anew"
        elif getattr(module, "scale_shift_table", None) is not None:
            why = "takes a timestep"
        elif in_time and "forward" in vars(module):
            why = "has had its forward wrapped by another library"
        elif in_time and fingerprint(own_forward(type(module))) not in KNOWN:
            why = "is of a release that was not checked"
        if why is not None:
            raise ValueError(f"vae is not streamed, because its {name} {why}")

    def __call__(self, x: Tensor) -> Tensor:
        """The part of the whole's result that x, the part after the ones before, completes."""
        for module, forward in self.forwards.items():
            module.forward = forward
        try:
            y: Tensor = self.coder(x)
        finally:
            for module in self.forwards:
                del module.forward
        self.first = False
        return y

    def convolve(self, module: Any, x: Tensor, causal: bool = True) -> Tensor:
        conv, span, before = module.conv, module.kernel_size[0] - 1, self.past.get(module)
        y = None
        if hasattr(module, "original_forward") and _plain(conv):  # accelerated
            front, padding = span if before is None else 0, _twice(conv.padding)
            y = _convolve(conv, x, front=front, before=before, padding=padding, mode=conv.padding_mode)
        frames = past(x, span, "first_frame") if before is None else before
        y = conv(torch.cat([frames, x], dim=2)) if y is None else y
        seen = frames.shape[2] + x.shape[2]
        self.past[module] = _tail(x, before, seen - y.shape[2] * conv.stride[0])  # from the next window's start on
        return y

    def downsample(self, module: Any, x: Tensor, causal: bool = True) -> Tensor:
        if self.first:
            x = torch.cat([x[:, :, : module.stride[0] - 1], x], dim=2)
        mean = _space_to_depth(x, module.stride).unflatten(1, (-1, module.group_size)).mean(dim=2)
        return _space_to_depth(module.conv(x), module.stride) + mean

    def upsample(self, module: Any, x: Tensor, causal: bool = True) -> Tensor:
        y = _depth_to_space(module.conv(x), module.stride)
        if module.residual:
            repeats = math.prod(module.stride) // module.upscale_factor
            y = y + _depth_to_space(x, module.stride).repeat(1, repeats, 1, 1, 1)
        return y[:, :, module.stride[0] - 1 :] if self.first else y


_LAYERS: dict[str, Callable[..., Tensor]] = {
    f"{family}Video{layer}": forward
    for family in ("LTX", "LTX2")
    for layer, forward in (
        ("CausalConv3d", Coder.convolve),
        ("Downsampler3d", Coder.downsample),
        ("Upsampler3d", Coder.upsample),
    )
}


def _space_to_depth(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    x = x.unflatten(4, (-1, stride[2])).unflatten(3, (-1, stride[1])).unflatten(2, (-1, stride[0]))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def _depth_to_space(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    return x.unflatten(1, (-1, *stride)).permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
