"""Causal video tokenizer: pixels [B, 3, 1+4k, H, W] <-> real-valued latents [B, c, 1+k, H/8, W/8].

The autoencoder of MAGVIT-v2 without its quantizer (W.A.L.T, paper section 3.1). No layer sees a later frame: the
convolutions are causal and the norms take their statistics from one frame. Hence an image is a video of one frame, and
a long video can be coded chunk by chunk.

Our own choices, where the papers are silent: padding modes, the shapes of the strided kernels, GroupNorm per frame, the
1x1x1 convolution that makes the latent, its normalisation by the mean and deviation of each channel, and the form of
MAGVIT-v2's adaptive group norm in the decoder (`AdaptiveNorm`).

With `kind="image"` in the configuration no kernel reaches over time and every frame is coded alone:
[B, 3, T, H, W] <-> [B, c, T, H/8, W/8]. `walt.model.convert` turns it into a video tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from walt.model.config import TokenizerConfig, check_frames
from walt.model.tokenizer_layers import (
    AdaptiveNorm,
    Downsample,
    FrameNormSwish,
    History,
    ResidualBlock,
    Upsample,
    causal_conv,
    channels_last,
    convolve,
    frame_means,
)
from walt_kernels.nn import CausalConv3d, reset_children

__all__ = ["Tokenizer"]


def _blocks(channels: int, out_channels: int, count: int, config: TokenizerConfig) -> list[nn.Module]:
    widths = [channels, *[out_channels] * count]
    return [ResidualBlock(a, b, config) for a, b in pairwise(widths)]


def _norms(channels: int, frames: int, config: TokenizerConfig) -> list[nn.Module]:
    return [AdaptiveNorm(channels, frames, config)] if config.adaptive_norm else []


class _Coder(nn.Module):
    """convolution, layers, norm and swish, convolution."""

    def __init__(self, first: CausalConv3d, layers: list[nn.Module], norm: FrameNormSwish, last: CausalConv3d) -> None:
        super().__init__()
        self.first, self.layers, self.norm, self.last = first, nn.ModuleList(layers), norm, last
        self.adaptive = any(isinstance(layer, AdaptiveNorm) for layer in layers)

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        means = frame_means(x) if self.adaptive else x  # of the latent: in the decoder, which alone has adaptive norms
        x = convolve(self.first, x, history)
        for layer in self.layers:
            x = layer(x, means) if isinstance(layer, AdaptiveNorm) else layer(x, history)
        return convolve(self.last, self.norm(x), history)


def make_encoder(config: TokenizerConfig) -> nn.Module:
    """Pixels [B, 3, 1+4k, H, W] -> latent [B, c, 1+k, H/8, W/8]."""
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    first = causal_conv(3, widths[0], 3, config)
    layers = _blocks(widths[0], widths[0], config.blocks, config)
    for (before, after), factor in zip(pairwise(widths), config.transitions, strict=True):
        layers += [Downsample(before, factor, config), *_blocks(before, after, config.blocks, config)]
    layers += _blocks(widths[-1], widths[-1], config.middle_blocks, config)
    norm = FrameNormSwish(widths[-1], config.groups)
    return _Coder(first, layers, norm, causal_conv(widths[-1], config.latent_channels, 1, config))


def make_decoder(config: TokenizerConfig) -> nn.Module:
    """Latent [B, c, 1+k, h, w] -> pixels [B, 3, 1+4k, 8h, 8w]."""
    widths = [config.channels * multiplier for multiplier in config.multipliers][::-1]
    first = causal_conv(config.latent_channels, widths[0], 3, config)
    layers = _norms(widths[0], 1, config)
    layers += _blocks(widths[0], widths[0], config.middle_blocks + config.blocks, config)
    frames = 1  # per latent frame
    for (before, after), factor in zip(pairwise(widths), config.transitions[::-1], strict=True):
        frames *= factor[0]
        layers += [Upsample(before, factor, config), *_norms(before, frames, config)]
        layers += _blocks(before, after, config.blocks, config)
    norm = FrameNormSwish(widths[-1], config.groups)
    return _Coder(first, layers, norm, causal_conv(widths[-1], 3, 3, config))


def _alike(chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The chunks; ValueError for one that differs from the first in more than its frames."""
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
        self.register_buffer("latent_mean", torch.empty(config.latent_channels))
        self.register_buffer("latent_std", torch.empty(config.latent_channels))
        self.reset_parameters(recurse=False)

    def reset_parameters(self, *, recurse: bool = True) -> None:
        """Reset all as in a new tokenizer, latent statistics (0, 1) included; with recurse=False these alone."""
        if recurse:
            reset_children(self)
        nn.init.zeros_(self.latent_mean)
        nn.init.ones_(self.latent_std)

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
        self.check_video(video)
        check_frames(video.shape[2], time_factor=self.config.time_factor)
        return self._encode(video, None)

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised latent [B, c, 1+k, h, w] -> video [B, 3, 1+4k, 8h, 8w], near [-1, 1] but not clipped to it."""
        self.check_latent(latent)
        return self._decode(latent, None)

    def forward(self, video: Tensor) -> Tensor:
        """The reconstruction `decode(encode(video))`."""
        return self.decode(self.encode(video))

    def encode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode a stream: a chunk of 1 + 4k frames, then chunks of 4k. Joined, the latents are `encode(video)`."""
        history = History()
        factor = self.config.time_factor
        for i, chunk in enumerate(_alike(chunks)):
            self.check_video(chunk)
            if i == 0:
                check_frames(chunk.shape[2], "first chunk", time_factor=factor)
            elif chunk.shape[2] == 0 or chunk.shape[2] % factor:
                raise ValueError(f"chunk {i}: got {chunk.shape[2]} frames; expected a multiple of {factor}")
            yield self._encode(chunk, history)

    def decode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode a stream of any number of latent frames at a time. Joined, the videos are `decode(latent)`."""
        history = History()
        for chunk in _alike(chunks):
            self.check_latent(chunk)
            yield self._decode(chunk, history)

    def _encode(self, video: Tensor, history: History | None) -> Tensor:
        latent = self.encoder(channels_last(video), history)
        return (latent - self._per_channel(self.latent_mean)) / self._per_channel(self.latent_std)

    def _decode(self, latent: Tensor, history: History | None) -> Tensor:
        raw = latent * self._per_channel(self.latent_std) + self._per_channel(self.latent_mean)
        return self.decoder(channels_last(raw), history)

    def _per_channel(self, statistic: Tensor) -> Tensor:
        return statistic.view(-1, 1, 1, 1)

    def check_video(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
            expected = "floating point [B, 3, 1+4k, H, W]"
            raise ValueError(f"video: got {video.dtype} {tuple(video.shape)}; expected {expected}")
        self.config.latent_shape(1, *video.shape[3:])

    def check_latent(self, latent: Tensor) -> None:
        good = latent.ndim == 5 and latent.shape[1] == self.config.latent_channels and latent.shape[2] >= 1
        if not good or not latent.is_floating_point():
            expected = f"floating point [B, {self.config.latent_channels}, 1+k, h, w]"
            raise ValueError(f"latent: got {latent.dtype} {tuple(latent.shape)}; expected {expected}")
