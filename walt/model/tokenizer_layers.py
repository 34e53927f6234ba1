"""Layers of the tokenizer: causal convolutions that stream, norms of single frames, down- and up-sampling."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from walt.model.config import TokenizerConfig
from walt_kernels import next_history
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


class _FrameNorm(torch.autograd.Function):
    """GroupNorm and, where asked, swish, frame by frame on the CPU.

    weight and bias are [1, C], or [B * T, C] with a row for every frame.

    One call for all frames would let the number of frames decide how the sums are split over threads and which
    elements fall into a vector loop's tail: the first frame of a video would differ from an image in the last bits.
    A frame also stays in the cache between the two, and only x is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, swish: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.groups, ctx.eps, ctx.swish = groups, eps, swish
        y = torch.empty_like(x)
        for i, (b, t) in enumerate(product(range(x.shape[0]), range(x.shape[2]))):
            row = i % len(weight)
            normed, _, _ = _group_norm(_frame(x, b, t), weight[row], bias[row], groups, eps)
            if swish:
                torch.ops.aten.silu.out(normed, out=y[b : b + 1, :, t])
            else:
                y[b : b + 1, :, t] = normed
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for i, (b, t) in enumerate(product(range(x.shape[0]), range(x.shape[2]))):
            row = i % len(weight)
            frame, grad_normed = _frame(x, b, t), _frame(grad_y, b, t)
            normed, mean, rstd = _group_norm(frame, weight[row], bias[row], ctx.groups, ctx.eps)
            if ctx.swish:
                grad_normed = torch.ops.aten.silu_backward(grad_normed, normed)
            sizes = (1, frame.shape[1], frame[0, 0].numel())
            grad_frame, d_weight, d_bias = torch.ops.aten.native_group_norm_backward(
                grad_normed, frame, mean, rstd, weight[row], *sizes, ctx.groups, [True, True, True]
            )
            grad_x[b : b + 1, :, t] = grad_frame
            grad_weight[row] += d_weight
            grad_bias[row] += d_bias
        return grad_x, grad_weight, grad_bias, None, None, None


def _frame(x: Tensor, sample: int, time: int) -> Tensor:
    """Frame [1, C, H, W] in channels_last, without a copy if x is in channels_last_3d.

    The strides are spelled out because those of axes of length 1 are arbitrary, and PyTorch chooses kernels by them.
    """
    frame = x[sample : sample + 1, :, time].contiguous(memory_format=torch.channels_last)
    _, channels, height, width = frame.shape
    return frame.as_strided(frame.shape, (channels * height * width, 1, channels * width, channels))


def _by_frame(x: Tensor) -> bool:
    """Whether frames are computed one by one, so that their number cannot change their bits (see _FrameNorm)."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not _transformed()


def _transformed() -> bool:
    """Whether forward mode or torch.func is active, which cannot use _FrameNorm's backward."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def channels_last(x: Tensor) -> Tensor:
    """x in channels_last_3d, in which convolutions are fastest. Not under torch.func: vmap has no such copy."""
    return x if _transformed() else x.contiguous(memory_format=torch.channels_last_3d)


def _frames(x: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B * T, C, H, W], in a layout in which PyTorch can differentiate group_norm."""
    frames = x.transpose(1, 2).flatten(0, 1)
    return frames.contiguous() if _transformed() else frames


def _group_norm(frame: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised frame [1, C, H, W], mean and 1/std of each group."""
    sizes = (1, frame.shape[1], frame[0, 0].numel())
    return torch.ops.aten.native_group_norm(frame, weight, bias, *sizes, groups, eps)


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
        if _by_frame(x):
            return _FrameNorm.apply(x, self.weight[None], self.bias[None], self.groups, self.eps, True)
        y = F.silu(F.group_norm(_frames(x), self.groups, self.weight, self.bias, self.eps))
        return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


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

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        """x [B, C, T, H, W] and the latent [B, c, t, h, w] that it comes from, of a video or a stream's chunk."""
        # At a stream's start, up-sampling has dropped all but the last frame of the first latent frame.
        dropped = self.frames * latent.shape[2] - x.shape[2]
        modulation = self._modulation(latent).repeat_interleave(self.frames, dim=1)[:, dropped:]
        scale, shift = modulation.flatten(0, 1).chunk(2, dim=-1)  # [B * T, C] each
        if _by_frame(x):
            return _FrameNorm.apply(x, 1 + scale, shift, self.groups, self.eps, False)
        frames = F.group_norm(_frames(x), self.groups, eps=self.eps)
        y = frames * (1 + scale[..., None, None]) + shift[..., None, None]
        return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)

    def _modulation(self, latent: Tensor) -> Tensor:
        """[B, c, t, h, w] -> [B, t, 2C], in the dtype of the weights also under autocast."""
        if _by_frame(latent):
            places = product(range(latent.shape[0]), range(latent.shape[2]))
            means = [_frame(latent, b, t).mean(dim=(0, 2, 3)) for b, t in places]
            modulation = torch.stack([F.linear(mean, self.weight, self.bias) for mean in means])
        else:
            modulation = F.linear(latent.mean(dim=(3, 4)).transpose(1, 2).flatten(0, 1), self.weight, self.bias)
        return modulation.to(self.weight.dtype).unflatten(0, (latent.shape[0], latent.shape[2]))


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
        return channels_last(y[:, :, dropped:])


def depth_to_space(x: Tensor, factor: tuple[int, int, int]) -> Tensor:
    """[B, st * sh * sw * C, T, H, W] -> [B, C, st T, sh H, sw W] in channels_last_3d.

    Channels are ordered (st, sh, sw, C), so that in channels_last_3d runs of C numbers move as a whole.
    """
    y = x.permute(0, 2, 3, 4, 1).unflatten(4, (*factor, -1))  # B T H W st sh sw C
    y = y.permute(0, 1, 4, 2, 5, 3, 6, 7)  # B T st H sh W sw C
    return y.flatten(5, 6).flatten(3, 4).flatten(1, 2).permute(0, 4, 1, 2, 3)


def causal_conv(
    channels: int, out_channels: int, kernel: int, config: TokenizerConfig, kind: type[CausalConv3d] = CausalConv3d
) -> CausalConv3d:
    """Convolution of `kernel` taps along each axis, padded as configured; of one tap in time for images."""
    taps = (kernel if config.kind == "video" else 1, kernel, kernel)
    time, space = config.time_padding, config.space_padding
    return kind(channels, out_channels, taps, time_padding=time, space_padding=space)
