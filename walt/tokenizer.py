"""Causal video tokenizer: pixels [B, 3, 1+4k, H, W] <-> real-valued latents [B, c, 1+k, H/8, W/8].

The autoencoder of MAGVIT-v2 without its quantizer (W.A.L.T, paper section 3.1). No layer sees a later frame: the
convolutions are causal and the norms take their statistics from one frame. Hence an image is a video of one frame, and
a long video can be coded chunk by chunk.

Our own choices, where the papers are silent: padding modes, the shapes of the strided kernels, GroupNorm per frame, the
1x1x1 convolution that makes the latent, and its normalisation by the mean and deviation of each channel. MAGVIT-v2's
adaptive group norm in the decoder is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from walt.config import TIME_FACTOR, TRANSITIONS, TokenizerConfig, check_frames
from walt_kernels import next_history
from walt_kernels.nn import CausalConv3d

__all__ = ["History", "Tokenizer"]


class History:
    """The last input frames of every causal convolution: what the next chunk of a stream has to know of the past."""

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


class _FrameNormSwish(torch.autograd.Function):
    """GroupNorm and swish, frame by frame on the CPU.

    One call for all frames would let the number of frames decide how the sums are split over threads and which
    elements fall into a vector loop's tail: the first frame of a video would differ from an image in the last bits.
    A frame also stays in the cache between the two, and only x is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.groups, ctx.eps = groups, eps
        y = torch.empty_like(x)
        for b, t in product(range(x.shape[0]), range(x.shape[2])):
            normed, _, _ = _group_norm(_frame(x, b, t), weight, bias, groups, eps)
            torch.ops.aten.silu.out(normed, out=y[b : b + 1, :, t])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for b, t in product(range(x.shape[0]), range(x.shape[2])):
            frame = _frame(x, b, t)
            normed, mean, rstd = _group_norm(frame, weight, bias, ctx.groups, ctx.eps)
            grad_normed = torch.ops.aten.silu_backward(_frame(grad_y, b, t), normed)
            sizes = (1, frame.shape[1], frame[0, 0].numel())
            grad_frame, d_weight, d_bias = torch.ops.aten.native_group_norm_backward(
                grad_normed, frame, mean, rstd, weight, *sizes, ctx.groups, [True, True, True]
            )
            grad_x[b : b + 1, :, t] = grad_frame
            grad_weight += d_weight
            grad_bias += d_bias
        return grad_x, grad_weight, grad_bias, None, None


def _frame(x: Tensor, sample: int, time: int) -> Tensor:
    """Frame [1, C, H, W] in channels_last, without a copy if x is in channels_last_3d.

    The strides are spelled out because those of axes of length 1 are arbitrary, and PyTorch chooses kernels by them.
    """
    frame = x[sample : sample + 1, :, time].contiguous(memory_format=torch.channels_last)
    _, channels, height, width = frame.shape
    return frame.as_strided(frame.shape, (channels * height * width, 1, channels * width, channels))


def _group_norm(frame: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised frame [1, C, H, W], mean and 1/std of each group."""
    sizes = (1, frame.shape[1], frame[0, 0].numel())
    return torch.ops.aten.native_group_norm(frame, weight, bias, *sizes, groups, eps)


class FrameNormSwish(nn.Module):
    """swish(GroupNorm(frame)) for each frame of [B, C, T, H, W]: statistics over a group of channels and H, W only."""

    def __init__(self, channels: int, groups: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _FrameNormSwish.apply(x, self.weight, self.bias, self.groups, self.eps)
        frames = x.transpose(1, 2).flatten(0, 1)
        y = F.silu(F.group_norm(frames, self.groups, self.weight, self.bias, self.eps))
        return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1x1 shortcut where the channels change.

    The last convolution is zero at first (our choice): a new block is its shortcut, and a new tokenizer nearly linear.
    """

    def __init__(self, channels: int, out_channels: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.norm1 = FrameNormSwish(channels, config.groups)
        self.conv1 = _conv(channels, out_channels, 3, config)
        self.norm2 = FrameNormSwish(out_channels, config.groups)
        self.conv2 = _conv(out_channels, out_channels, 3, config)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)
        self.shortcut = _conv(channels, out_channels, 1, config) if channels != out_channels else None

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
        self.conv = _conv(channels, channels * factor[0] * factor[1] * factor[2], 3, config)

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        starts = history is None or self.conv not in history
        y = depth_to_space(convolve(self.conv, x, history), self.factor)
        dropped = self.factor[0] - 1 if starts else 0
        return y[:, :, dropped:].contiguous(memory_format=torch.channels_last_3d)


def depth_to_space(x: Tensor, factor: tuple[int, int, int]) -> Tensor:
    """[B, st * sh * sw * C, T, H, W] -> [B, C, st T, sh H, sw W] in channels_last_3d.

    Channels are ordered (st, sh, sw, C), so that in channels_last_3d runs of C numbers move as a whole.
    """
    y = x.permute(0, 2, 3, 4, 1).unflatten(4, (*factor, -1))  # B T H W st sh sw C
    y = y.permute(0, 1, 4, 2, 5, 3, 6, 7)  # B T st H sh W sw C
    return y.flatten(5, 6).flatten(3, 4).flatten(1, 2).permute(0, 4, 1, 2, 3)


def _conv(channels: int, out_channels: int, kernel: int, config: TokenizerConfig) -> CausalConv3d:
    time, space = config.time_padding, config.space_padding
    return CausalConv3d(channels, out_channels, kernel, time_padding=time, space_padding=space)


def _blocks(channels: int, out_channels: int, count: int, config: TokenizerConfig) -> list[nn.Module]:
    widths = [channels, *[out_channels] * count]
    return [ResidualBlock(a, b, config) for a, b in pairwise(widths)]


class _Coder(nn.Module):
    """convolution, layers, norm and swish, convolution."""

    def __init__(self, first: CausalConv3d, layers: list[nn.Module], norm: FrameNormSwish, last: CausalConv3d) -> None:
        super().__init__()
        self.first, self.layers, self.norm, self.last = first, nn.ModuleList(layers), norm, last

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        x = convolve(self.first, x, history)
        for layer in self.layers:
            x = layer(x, history)
        return convolve(self.last, self.norm(x), history)


def make_encoder(config: TokenizerConfig) -> nn.Module:
    """Pixels [B, 3, 1+4k, H, W] -> latent [B, c, 1+k, H/8, W/8]."""
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    layers = _blocks(widths[0], widths[0], config.blocks, config)
    for (before, after), factor in zip(pairwise(widths), TRANSITIONS, strict=True):
        layers += [Downsample(before, factor, config), *_blocks(before, after, config.blocks, config)]
    layers += _blocks(widths[-1], widths[-1], config.middle_blocks, config)
    norm = FrameNormSwish(widths[-1], config.groups)
    return _Coder(_conv(3, widths[0], 3, config), layers, norm, _conv(widths[-1], config.latent_channels, 1, config))


def make_decoder(config: TokenizerConfig) -> nn.Module:
    """Latent [B, c, 1+k, h, w] -> pixels [B, 3, 1+4k, 8h, 8w]."""
    widths = [config.channels * multiplier for multiplier in config.multipliers][::-1]
    layers = _blocks(widths[0], widths[0], config.middle_blocks + config.blocks, config)
    for (before, after), factor in zip(pairwise(widths), TRANSITIONS[::-1], strict=True):
        layers += [Upsample(before, factor, config), *_blocks(before, after, config.blocks, config)]
    norm = FrameNormSwish(widths[-1], config.groups)
    return _Coder(_conv(config.latent_channels, widths[0], 3, config), layers, norm, _conv(widths[-1], 3, 3, config))


def _alike(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The chunks, as long as all but their frames is like the first."""
    first = None
    for i, chunk in enumerate(chunks):
        shape = (*chunk.shape[:2], *chunk.shape[3:])
        first = shape if first is None else first
        if shape != first:
            raise ValueError(f"chunk {i}: got {shape} beside its frames; expected {first}, like the chunks before")
        yield chunk


class Tokenizer(nn.Module):
    """Encoder, decoder and the statistics that bring latents to mean 0 and deviation 1 per channel.

    An image is coded as the first frame of a video would be: to the same bits where the native convolution runs, to
    rounding where PyTorch's own does.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = make_encoder(config)
        self.decoder = make_decoder(config)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Mean and standard deviation [c] of the encoder's raw output over training data; (0, 1) until set."""
        for name, value in (("mean", mean), ("std", std)):
            if tuple(value.shape) != (self.config.latent_channels,):
                raise ValueError(f"{name}: got shape {tuple(value.shape)}; expected [{self.config.latent_channels}]")
            if not bool(value.isfinite().all()) or (name == "std" and bool((value <= 0).any())):
                kind = "finite numbers above 0" if name == "std" else "finite numbers"
                raise ValueError(f"{name}: got {value.tolist()}; expected {kind}")
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def encode(self, video: Tensor) -> Tensor:
        """Video [B, 3, 1+4k, H, W] in [-1, 1] -> normalised latent [B, c, 1+k, H/8, W/8]. An image has one frame."""
        self._check_video(video)
        check_frames(video.shape[2])
        return self._encode(video, None)

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised latent [B, c, 1+k, h, w] -> video [B, 3, 1+4k, 8h, 8w], near [-1, 1] but not clipped to it."""
        self._check_latent(latent)
        return self._decode(latent, None)

    def forward(self, video: Tensor) -> Tensor:
        """The reconstruction `decode(encode(video))`."""
        return self.decode(self.encode(video))

    def encode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode a stream: a first chunk of 1 + 4k frames, then chunks of 4k. The latents join to `encode(whole)`."""
        history = History()
        for i, chunk in enumerate(_alike(chunks)):
            self._check_video(chunk)
            if i == 0:
                check_frames(chunk.shape[2], "first chunk")
            elif chunk.shape[2] == 0 or chunk.shape[2] % TIME_FACTOR:
                raise ValueError(f"chunk {i}: got {chunk.shape[2]} frames; expected a multiple of {TIME_FACTOR}")
            yield self._encode(chunk, history)

    def decode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode a stream of any number of latent frames at a time. The videos join to `decode(whole)`."""
        history = History()
        for chunk in _alike(chunks):
            self._check_latent(chunk)
            yield self._decode(chunk, history)

    def _encode(self, video: Tensor, history: History | None) -> Tensor:
        latent = self.encoder(video.contiguous(memory_format=torch.channels_last_3d), history)
        return (latent - self._per_channel(self.latent_mean)) / self._per_channel(self.latent_std)

    def _decode(self, latent: Tensor, history: History | None) -> Tensor:
        raw = latent * self._per_channel(self.latent_std) + self._per_channel(self.latent_mean)
        return self.decoder(raw.contiguous(memory_format=torch.channels_last_3d), history)

    def _per_channel(self, statistic: Tensor) -> Tensor:
        return statistic[:, None, None, None]

    def _check_video(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
            expected = "floating point [B, 3, 1+4k, H, W]"
            raise ValueError(f"video: got {video.dtype} {tuple(video.shape)}; expected {expected}")
        self.config.latent_shape(1, *video.shape[3:])

    def _check_latent(self, latent: Tensor) -> None:
        good = latent.ndim == 5 and latent.shape[1] == self.config.latent_channels and latent.shape[2] >= 1
        if not good or not latent.is_floating_point():
            expected = f"floating point [B, {self.config.latent_channels}, 1+k, h, w]"
            raise ValueError(f"latent: got {latent.dtype} {tuple(latent.shape)}; expected {expected}")
