"""Discriminator of the first stage: a 3D StyleGAN-like network with blur-pooling (MAGVIT-v2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from walt.train.precision import wide
from walt_kernels.values import plain

__all__ = ["Discriminator", "blur_pool"]

TAPS = (1.0, 3.0, 3.0, 1.0)
SLOPE = 0.2  # of leaky ReLU below 0


def blur_pool(x: Tensor) -> Tensor:
    """Halve time, height and width of [B, C, T, H, W], rounding up, after a blur; axes of length 1 are left alone.

    The blur is the outer product of [1, 3, 3, 1] / 8 along each halved axis. Output i covers inputs 2i - 1 to 2i + 2,
    those outside being the nearest inside, so that what is constant stays constant.
    """
    kernel = torch.ones((), dtype=x.dtype, device=x.device)
    padding: list[int] = []
    for size in x.shape[2:]:
        taps = torch.tensor(TAPS if size > 1 else (1.0,), dtype=x.dtype, device=x.device)
        kernel = kernel[..., None] * (taps / taps.sum())
        padding = [*((1, 1 + size % 2) if size > 1 else (0, 0)), *padding]  # F.pad starts with the last axis
    stride = [2 if size > 1 else 1 for size in x.shape[2:]]
    channels = x.shape[1]
    weight = kernel.expand(channels, 1, *kernel.shape)
    return F.conv3d(F.pad(x, padding, mode="replicate"), weight, stride=stride, groups=channels)


class Conv(nn.Conv3d):
    """Convolution that keeps the size, and at first the variance through a leaky ReLU after it (of slope 1: none)."""

    def __init__(self, channels: int, out_channels: int, kernel: int = 3, *, slope: float = SLOPE, bias: bool = True):
        self.slope = slope  # first: super().__init__ resets the parameters
        super().__init__(channels, out_channels, kernel, padding=kernel // 2, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, a=self.slope)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class DownBlock(nn.Module):
    """(blur(x) through a 1x1x1 convolution + convolutions around a blur) / sqrt 2, at half the resolution."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = Conv(channels, channels)
        self.conv2 = Conv(channels, out_channels)
        self.shortcut = Conv(channels, out_channels, 1, slope=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = blur_pool(F.leaky_relu(self.conv1(x), SLOPE))
        y = F.leaky_relu(self.conv2(y), SLOPE)
        return (self.shortcut(blur_pool(x)) + y) / math.sqrt(2)


class Discriminator(nn.Module):
    """Videos [B, 3, T, H, W] of any size, images being videos of one frame -> logits [B], high for real.

    One block for each of `multipliers` halves the axes that are longer than 1. The multipliers, the blur and the
    leaky ReLU of slope 0.2 are MAGVIT-v2's; ours are the mean over positions at the end, which lets sizes vary, and
    the absence of any layer over the batch: a sample's logit depends on no other. PyTorch's own convolutions
    throughout, since R1 differentiates twice; on a CPU in full precision also under autocast, since PyTorch's gradient
    of bfloat16 weights reads memory there that nobody wrote (2.13, AVX-512).
    """

    def __init__(self, channels: int = 128, multipliers: Sequence[int] = (2, 4, 4, 4, 4)) -> None:
        super().__init__()
        channels, multipliers = plain(channels), plain(multipliers)
        for name, values in (("channels", [channels]), ("multipliers", multipliers)):
            if not values or any(value < 1 for value in values):
                raise ValueError(f"{name}: got {values!r}; expected integers of at least 1")
        widths = [channels, *(channels * multiplier for multiplier in multipliers)]
        self.first = Conv(3, channels)
        self.blocks = nn.ModuleList(DownBlock(a, b) for a, b in pairwise(widths))
        self.last = Conv(widths[-1], widths[-1])
        self.logit = nn.Linear(widths[-1], 1)

    def forward(self, video: Tensor) -> Tensor:
        """The logits are float32 also where the video is of half precision."""
        if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
            expected = "floating point [B, 3, T, H, W]"
            raise ValueError(f"video: got {video.dtype} {tuple(video.shape)}; expected {expected}")
        if video.device.type != "cpu":
            return wide(self._logits(video))
        with torch.autocast("cpu", enabled=False):
            return wide(self._logits(video.to(self.logit.weight.dtype)))

    def _logits(self, video: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(video.contiguous(memory_format=torch.channels_last_3d)), SLOPE)
        for block in self.blocks:
            x = block(x)
        x = F.leaky_relu(self.last(x), SLOPE)
        return self.logit(x.mean(dim=(2, 3, 4))).squeeze(1)
