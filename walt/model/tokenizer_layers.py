"""Layers of the tokenizer: causal convolutions that stream, norms of single frames, down- and up-sampling."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from walt.model.config import TokenizerConfig
from walt_kernels import causal_conv3d, next_history, video_norm
from walt_kernels.nn import CausalConv3d

__all__ = [
    "AdaptiveNorm",
    "Downsample",
    "FrameNormSwish",
    "History",
    "ResidualBlock",
    "Upsample",
    "causal_conv",
    "channels_last",
    "convolve",
    "depth_to_space",
    "frame_means",
]


class History:
    """The last input frames of every causal convolution, which the next chunk of a stream needs."""

    def __init__(self) -> None:
        self.frames: dict[nn.Module, Tensor] = {}

    def __contains__(self, conv: nn.Module) -> bool:
        return conv in self.frames

    def convolve(self, conv: CausalConv3d, x: Tensor) -> Tensor:
        """Run `conv` on the next chunk and remember the chunk's end.

        With stride s in time, a first chunk of 1 + sk frames ends on an output frame, so later chunks of sk frames give
        their outputs at frames s-1, 2s-1, ...: the s-1 frames before the first of these belong to the past.
        """
        past = self.frames.get(conv)
        skipped = 0 if past is None else conv.stride[0] - 1
        if skipped:
            past = next_history(x[:, :, :skipped], past, conv.kernel_size, conv.dilation)
            x = x[:, :, skipped:]
        y = conv(x, past)
        self.frames[conv] = next_history(x, past, conv.kernel_size, conv.dilation, time_padding=conv.time_padding)
        return y


def convolve(conv: CausalConv3d, x: Tensor, history: History | None) -> Tensor:
    """`conv(x)`, as the next chunk of a stream where there is a history."""
    return conv(x) if history is None or conv.time_span == 0 else history.convolve(conv, x)


def channels_last(x: Tensor) -> Tensor:
    """x in channels_last_3d, in which convolutions are fastest. Not under torch.func: vmap has no such copy."""
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return x if transformed else x.contiguous(memory_format=torch.channels_last_3d)


class FrameNormSwish(nn.Module):
    """swish(GroupNorm(frame)) for each frame of [B, C, T, H, W]: statistics over a group of channels and H, W only."""

    def __init__(self, channels: int, groups: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return video_norm(x, self.weight, self.bias, groups=self.groups, eps=self.eps, activation="silu")


class AdaptiveNorm(nn.Module):
    """GroupNorm(frame) * (1 + scale) + shift; scale and shift are linear in the spatial mean of the frame's latent.

    MAGVIT-v2 has an adaptive group norm before the residual blocks of each resolution of the decoder and leaves its
    form open; this one is ours. Zero weights at first make a new layer a plain norm. Of `frames` (1, 2 or 4) frames per
    latent frame, frame 0 belongs to latent frame 0 and frame f to latent frame 1 + (f - 1) // frames, which is never
    later than those that the convolutions before it have seen: the decoder stays causal.
    """

    def __init__(self, channels: int, frames: int, config: TokenizerConfig, eps: float = 1e-6) -> None:
        super().__init__()
        self.frames, self.groups, self.eps = frames, config.groups, eps
        self.weight = nn.Parameter(torch.empty(2 * channels, config.latent_channels))
        self.bias = nn.Parameter(torch.empty(2 * channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, means: Tensor) -> Tensor:
        """x [B, C, T, H, W] and `frame_means` of the latent that it comes from, of a video or a stream's chunk."""
        # A convolution: its bits do not depend on the number of frames. In the weights' dtype also under autocast.
        modulation = causal_conv3d(means, self.weight.view(*self.weight.shape, 1, 1, 1), self.bias)
        modulation = modulation.to(self.weight.dtype).flatten(2)  # [B, 2C, t]
        if self.frames > 1:
            # At a stream's start, up-sampling has dropped all but the last frame of the first latent frame.
            dropped = self.frames * means.shape[2] - x.shape[2]
            modulation = modulation.repeat_interleave(self.frames, dim=2)[:, :, dropped:]
        scale, shift = modulation.chunk(2, dim=1)
        return video_norm(x, groups=self.groups, eps=self.eps, scale=scale, shift=shift)


def frame_means(latent: Tensor) -> Tensor:
    """The spatial mean of each frame of a latent [B, c, t, h, w] -> [B, c, t, 1, 1]."""
    # Over numbers that stand in a line: the bits do not depend on the number of frames.
    return latent.contiguous().mean(dim=(3, 4), keepdim=True)


class ZeroConv3d(CausalConv3d):
    """A causal convolution that starts at zero."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1x1 shortcut where the channels change.

    The last convolution is zero at first (our choice): a new block is its shortcut, and a new tokenizer nearly linear.
    """

    def __init__(self, channels: int, out_channels: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.norm1 = FrameNormSwish(channels, config.groups)
        self.conv1 = causal_conv(channels, out_channels, 3, config)
        self.norm2 = FrameNormSwish(out_channels, config.groups)
        self.conv2 = causal_conv(out_channels, out_channels, 3, config, kind=ZeroConv3d)
        self.shortcut = causal_conv(channels, out_channels, 1, config) if channels != out_channels else None

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        h = convolve(self.conv1, self.norm1(x), history)
        h = convolve(self.conv2, self.norm2(h), history)
        return h + (x if self.shortcut is None else self.shortcut(x))


class Downsample(nn.Module):
    """Strided causal convolution, four taps along each halved axis and one along the others."""

    def __init__(self, channels: int, factor: tuple[int, int, int], config: TokenizerConfig) -> None:
        super().__init__()
        kernel = tuple(4 if f == 2 else 1 for f in factor)
        self.conv = CausalConv3d(
            channels,
            channels,
            kernel,
            stride=factor,
            padding=1,
            time_padding=config.time_padding,
            space_padding=config.space_padding,
        )

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        return convolve(self.conv, x, history)


class Upsample(nn.Module):
    """Causal convolution and depth-to-space; a video's first frame yields one, the others `factor[0]` each."""

    def __init__(self, channels: int, factor: tuple[int, int, int], config: TokenizerConfig) -> None:
        super().__init__()
        self.factor = factor
        self.conv = causal_conv(channels, channels * factor[0] * factor[1] * factor[2], 3, config)

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        starts = history is None or self.conv not in history
        y = depth_to_space(convolve(self.conv, x, history), self.factor)
        dropped = self.factor[0] - 1 if starts else 0
        return y[:, :, dropped:]


def depth_to_space(x: Tensor, factor: tuple[int, int, int]) -> Tensor:
    """[B, st * sh * sw * C, T, H, W] -> [B, C, st T, sh H, sw W] in channels_last_3d.

    Channels are ordered (st, sh, sw, C), so that in channels_last_3d runs of C numbers move as a whole.
    """
    (B, _, T, H, W), (st, sh, sw) = x.shape, factor
    y = x.permute(0, 2, 3, 4, 1).unflatten(4, (*factor, -1))  # B T H W st sh sw C
    y = y.permute(0, 1, 4, 2, 5, 3, 6, 7)  # B T st H sh W sw C
    return y.reshape(B, st * T, sh * H, sw * W, y.shape[-1]).permute(0, 4, 1, 2, 3)


def causal_conv(
    channels: int, out_channels: int, kernel: int, config: TokenizerConfig, kind: type[CausalConv3d] = CausalConv3d
) -> CausalConv3d:
    """Convolution of `kernel` taps along each axis, padded as configured; of one tap in time for images."""
    taps = (kernel if config.kind == "video" else 1, kernel, kernel)
    time, space = config.time_padding, config.space_padding
    return kind(channels, out_channels, taps, time_padding=time, space_padding=space)
