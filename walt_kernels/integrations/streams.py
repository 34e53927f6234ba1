"""Encoding and decoding of videos of any length, a few frames at a time, to what the whole clip gives."""

from __future__ import annotations

import fnmatch
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import class_path, fingerprint
from .causal_convolutions import _convolve

_AUTOENCODERS = "diffusers.models.autoencoders.autoencoder_"


def stream_encode(vae: nn.Module, video: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """Encodes a video of any length in constant memory: joined, the chunks are what ``vae.encode`` gives of the whole.

    >>> moments = torch.cat(list(stream_encode(vae, video)), dim=2)  # vae.encode(video).latent_dist.parameters

    Args:
        vae: an autoencoder of diffusers (Wan, QwenImage, LTX and LTX 2 with a causal encoder, MiniMax-H3, EasyAnimate,
            KVAE, Kandinsky 6), accelerated or not, or a WALT tokenizer.
        video: [B, C, T, H, W], or chunks of one, each of any number of frames: a generator that reads a file, say.

    Returns:
        An iterator over [B, 2 C_latent, t, h, w], mean and log variance along the channels (a WALT tokenizer: latents),
        computed as the frames come, without gradients. T must be one that ``vae.encode`` takes; what it leaves out at
        the end (Wan: frames past 1 + 4 k) is left out.

    Raises:
        ValueError: ``vae`` cannot be streamed, with the module that is the reason; or the frames do not fit together.
        TypeError: ``vae`` is no ``nn.Module``.
    """
    return _stream(vae, video, "encode")


def stream_decode(vae: nn.Module, latents: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """Decodes latents of any length in constant memory: joined, the chunks are what ``vae.decode`` gives of the whole.

    >>> for frames in stream_decode(vae, latents):
    ...     write(frames)

    Args:
        vae: as for `stream_encode`; of MiniMax-H3 and of LTX with its usual decoder, which look ahead, the encoder
            alone. Mochi's decoder, too.
        latents: [B, C, T, h, w], or chunks of them, each of any number of frames.

    Returns:
        An iterator over frames [B, 3, t, H, W], computed as the latents come, without gradients.

    Raises:
        ValueError, TypeError: as `stream_encode`.
    """
    return _stream(vae, latents, "decode")


class _Frames:
    """A video that arrives in chunks of any number of frames, taken in others."""

    def __init__(self, name: str, source: Tensor | Iterable[Tensor]) -> None:
        self._chunks = iter([source] if isinstance(source, Tensor) else source)
        self._rest: list[Tensor] = []
        self._name, self._shape = name, None

    def take(self, count: int) -> Tensor | None:
        """The next ``count`` frames, fewer at the end of the video, None after it."""
        while self._length() < count and (chunk := next(self._chunks, None)) is not None:
            self._rest.append(self._checked(chunk))
        frames = self._rest[0] if len(self._rest) == 1 else torch.cat(self._rest, dim=2) if self._rest else None
        if frames is None or frames.shape[2] <= count:
            self._rest = []
            return frames
        self._rest = [frames[:, :, count:]]
        return frames[:, :, :count]

    def parts(self, first: int, then: int, *, whole: bool = False) -> Iterator[Tensor]:
        """``first`` frames, then ``then`` at a time; the last part may have fewer, or is left out where ``whole``."""
        count = first
        while (frames := self.take(count)) is not None and frames.shape[2] > 0:
            if frames.shape[2] == count or not whole:
                yield frames
            count = then

    def _length(self) -> int:
        return sum(chunk.shape[2] for chunk in self._rest)

    def _checked(self, chunk: Tensor) -> Tensor:
        if not isinstance(chunk, Tensor) or chunk.dim() != 5:
            what = f"shape {tuple(chunk.shape)}" if isinstance(chunk, Tensor) else type(chunk).__name__
            raise ValueError(f"{self._name} has a chunk of {what}, expected a tensor [B, C, T, H, W]")
        shape = (*chunk.shape[:2], *chunk.shape[3:])
        self._shape = self._shape or shape
        if shape != self._shape:
            raise ValueError(f"{self._name} has a chunk of {shape} beside its frames, expected {self._shape} as before")
        return chunk


def _stream(vae: nn.Module, source: Tensor | Iterable[Tensor], task: str) -> Iterator[Tensor]:
    if not isinstance(vae, nn.Module):
        raise TypeError(f"vae is a {type(vae).__name__}, expected an nn.Module")
    path = class_path(type(vae))
    kind, stream = type(vae).__name__, _STREAMS.get(path)
    run = None if stream is None else getattr(stream, task)
    if stream is None or run is None:
        raise ValueError(
            f"vae is a {kind}, of which stream_{task} knows no way to get the whole clip: {_why(vae, task)}"
        )
    method = next(name for name in (f"_{task}", task) if hasattr(type(vae), name))
    if path.startswith(_AUTOENCODERS) and fingerprint(getattr(type(vae), method)) not in _KNOWN:
        raise ValueError(f"vae is a {kind} of a release that was not checked, expected one whose {method} is known")
    if path != _MINIMAX and any(getattr(vae, f"use_{way}", False) for way in _TILED):
        raise ValueError("vae blends tiles, which gives other values than its whole frames; call vae.disable_tiling()")
    return run(vae, _Frames("video" if task == "encode" else "latents", source))


_TILED = ("tiling", "framewise_encoding", "framewise_decoding")


def _why(vae: nn.Module, task: str) -> str:
    """What of a class without a stream is the reason, by its first module of a name."""
    pattern, why = _REASONS.get(class_path(type(vae)), ("", "the class is not known"))
    names = [name for name, _ in vae.named_modules() if fnmatch.fnmatch(name, f"{task}r.{pattern}")]
    return f"{names[0]} {why}" if names else why


# Every stream below calls what the class's own encode or decode calls, with the same caches, part by part.


def _filled(coder: nn.Module) -> list[Any]:
    return [None] * sum(isinstance(module, nn.Conv3d) for module in coder.modules())


@torch.no_grad()
def _wan_encode(vae: Any, frames: _Frames) -> Iterator[Tensor]:
    cache = _filled(vae.encoder)
    for part in frames.parts(1, 4, whole=True):
        if getattr(vae.config, "patch_size", None) is not None:
            part = vars(sys.modules[type(vae).__module__])["patchify"](part, patch_size=vae.config.patch_size)
        yield vae.quant_conv(vae.encoder(part, feat_cache=cache, feat_idx=[0]))


@torch.no_grad()
def _wan_decode(vae: Any, frames: _Frames, **first: bool) -> Iterator[Tensor]:
    cache = _filled(vae.decoder)
    for part in frames.parts(1, 1):
        y = vae.decoder(vae.post_quant_conv(part), feat_cache=cache, feat_idx=[0], **first)
        first = dict.fromkeys(first, False)
        if getattr(vae.config, "patch_size", None) is not None:
            y = vars(sys.modules[type(vae).__module__])["unpatchify"](y, patch_size=vae.config.patch_size)
        yield y.clamp(min=-1.0, max=1.0)


@torch.no_grad()
def _kandinsky(vae: Any, frames: _Frames, task: str) -> Iterator[Tensor]:
    coder = vae.encoder if task == "encode" else vae.decoder
    cache = coder.make_cache()
    for part in frames.parts(1, vae.temporal_compression_ratio if task == "encode" else 1):
        yield coder(part, cache)


@torch.no_grad()
def _kvae_encode(vae: Any, frames: _Frames) -> Iterator[Tensor]:
    cache = vae._make_encoder_cache()
    for part in frames.parts(17, 16):  # its norms pool over these
        mean, _ = vae.encoder(part, cache).chunk(2, dim=1)
        yield torch.cat([mean, torch.zeros_like(mean)], dim=1)


@torch.no_grad()
def _kvae_decode(vae: Any, frames: _Frames) -> Iterator[Tensor]:
    cache = vae._make_decoder_cache()
    first, then = (math.ceil(count / vae.config.temporal_compress_times) for count in (17, 16))
    for part in frames.parts(first, then):
        yield vae.decoder(part, cache)


@torch.no_grad()
def _mochi_decode(vae: Any, frames: _Frames) -> Iterator[Tensor]:
    cache, drop = None, vae.temporal_compression_ratio - 1 if vae.drop_last_temporal_frames else 0
    for part in frames.parts(1, 1):
        y, cache = vae.decoder(part, conv_cache=cache)
        yield y[:, :, drop:]
        drop = 0


@torch.no_grad()
def _minimax_encode(vae: Any, frames: _Frames) -> Iterator[Tensor]:
    length, drop = vae.config.clip_length, vae.config.token_drop
    dtype, held = next(vae.encoder.parameters()).dtype, None
    for part in frames.parts(length, length):
        if held is None and part.shape[2] == 1:  # an image
            yield vae._encode_clip(part.to(dtype))
            return
        missing = part[:, :, -1:].expand(-1, -1, length - part.shape[2], -1, -1)
        y = vae._encode_clip(torch.cat([part, missing], dim=2).to(dtype))
        y = y if held is None else torch.cat([held, y], dim=2)
        held = y[:, :, y.shape[2] - drop :]  # of the last clip, these are dropped
        yield y[:, :, : y.shape[2] - drop]


@torch.no_grad()
def _easyanimate(vae: Any, frames: _Frames, task: str) -> Iterator[Tensor]:
    """Its modules keep the past themselves: between the parts, the stream does, so that streams do not meet."""
    coder = vae.encoder if task == "encode" else vae.decoder
    kept: dict[nn.Module, Any] = {m: None for m in coder.modules() if hasattr(m, "_clear_conv_cache")}
    count = vae.num_sample_frames_batch_size if task == "encode" else vae.num_latent_frames_batch_size
    for part in frames.parts(1, count):
        others = {module: module.prev_features for module in kept}
        _remember(kept)
        y = vae.quant_conv(coder(part)) if task == "encode" else coder(vae.post_quant_conv(part))
        kept = {module: module.prev_features for module in kept}
        _remember(others)
        yield y


def _remember(past: dict[Any, Any]) -> None:
    for module, features in past.items():
        module.prev_features = features


def _own_forward(module: nn.Module) -> Any:
    return getattr(type(module), "original_forward", type(module).forward)


class _LTX:
    """The encoder or decoder of LTX from part to part: its layers in time, given a past."""

    def __init__(self, vae: Any, task: str) -> None:
        self.coder: Any = vae.encoder if task == "encode" else vae.decoder
        self.first = True
        self.past: dict[nn.Module, Tensor] = {}
        self.forwards: dict[nn.Module, Callable[..., Tensor]] = {}
        self.factor = 1  # frames of the video to one of the latents
        for name, module in self.coder.named_modules(prefix=f"{task}r"):
            forward = _LTX_LAYERS.get(type(module).__name__)
            self._check(name, module, forward is not None or module is self.coder)
            if forward is not None:
                self.forwards[module] = functools.partial(forward, self, module)
                stride = module.conv.stride if forward is _LTX.convolve else module.stride
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
        elif in_time and fingerprint(_own_forward(module)) not in _KNOWN:
            why = "is of a release that was not checked"
        if why is not None:
            raise ValueError(f"vae is not streamed, because its {name} {why}")

    def __call__(self, x: Tensor) -> Tensor:
        """The part of the whole's result that x, the part after the ones before, completes."""
        for module, forward in self.forwards.items():
            module.forward = forward  # type: ignore[method-assign]
        try:
            y: Tensor = self.coder(x)
        finally:
            for module in self.forwards:
                del module.forward
        self.first = False
        return y

    def convolve(self, module: Any, x: Tensor, causal: bool = True) -> Tensor:
        conv, span = module.conv, module.kernel_size[0] - 1
        past = self.past.get(module, x[:, :, :1].expand(-1, -1, span, -1, -1))
        ours = "original_forward" in vars(type(module))
        padding = {"padding": conv.padding[1:], "mode": conv.padding_mode}
        y = _convolve(conv, x, front=0, before=past, **padding) if ours and span else None
        y = conv(torch.cat([past, x], dim=2)) if y is None else y
        keep = past.shape[2] + x.shape[2] - y.shape[2] * conv.stride[0]  # from the next window's start on
        frames = x if keep <= x.shape[2] else torch.cat([past, x], dim=2)
        self.past[module] = frames[:, :, frames.shape[2] - keep :].clone()
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


_LTX_LAYERS: dict[str, Callable[..., Tensor]] = {
    f"{family}Video{layer}": forward
    for family in ("LTX", "LTX2")
    for layer, forward in (
        ("CausalConv3d", _LTX.convolve),
        ("Downsampler3d", _LTX.downsample),
        ("Upsampler3d", _LTX.upsample),
    )
}


def _space_to_depth(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    x = x.unflatten(4, (-1, stride[2])).unflatten(3, (-1, stride[1])).unflatten(2, (-1, stride[0]))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def _depth_to_space(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    return x.unflatten(1, (-1, *stride)).permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _ltx(vae: Any, frames: _Frames, task: str) -> Iterator[Tensor]:
    coder = _LTX(vae, task)  # says now, not at the first part, what cannot be streamed
    return _ltx_parts(coder, frames, coder.factor if task == "encode" else 1)


@torch.no_grad()
def _ltx_parts(coder: _LTX, frames: _Frames, count: int) -> Iterator[Tensor]:
    for part in frames.parts(1, count):
        if not coder.first and part.shape[2] != count:
            raise ValueError(f"video ends with {part.shape[2]} frames more than 1 + {count} k, expected none")
        yield coder(part)


@torch.no_grad()
def _walt(vae: Any, frames: _Frames, task: str) -> Iterator[Tensor]:
    parts = frames.parts(1, vae.config.time_factor if task == "encode" else 1)
    yield from vae.encode_chunks(parts) if task == "encode" else vae.decode_chunks(parts)


@dataclass(frozen=True)
class _Stream:
    """How a class is streamed; None where it cannot be."""

    encode: Callable[[Any, _Frames], Iterator[Tensor]] | None = None
    decode: Callable[[Any, _Frames], Iterator[Tensor]] | None = None


def _both(stream: Callable[..., Iterator[Tensor]]) -> _Stream:
    return _Stream(functools.partial(stream, task="encode"), functools.partial(stream, task="decode"))


_MINIMAX = f"{_AUTOENCODERS}kl_minimax_h3.AutoencoderKLMiniMaxH3"
_STREAMS = {
    "walt.model.tokenizer.Tokenizer": _both(_walt),
    f"{_AUTOENCODERS}kandinsky6_sr.Kandinsky6SRVAE": _both(_kandinsky),
    f"{_AUTOENCODERS}kl_kvae_video.AutoencoderKLKVAEVideo": _Stream(_kvae_encode, _kvae_decode),
    f"{_AUTOENCODERS}kl_ltx.AutoencoderKLLTXVideo": _both(_ltx),
    f"{_AUTOENCODERS}kl_ltx2.AutoencoderKLLTX2Video": _both(_ltx),
    f"{_AUTOENCODERS}kl_magvit.AutoencoderKLMagvit": _both(_easyanimate),
    _MINIMAX: _Stream(encode=_minimax_encode),
    f"{_AUTOENCODERS}kl_mochi.AutoencoderKLMochi": _Stream(decode=_mochi_decode),
    f"{_AUTOENCODERS}kl_qwenimage.AutoencoderKLQwenImage": _Stream(_wan_encode, _wan_decode),
    f"{_AUTOENCODERS}kl_wan.AutoencoderKLWan": _Stream(_wan_encode, functools.partial(_wan_decode, first_chunk=True)),
}
# Fingerprints of their encode and decode (or of _encode and _decode, which these call), and of what `_LTX` computes.
_KNOWN = frozenset(
    """
    f1e9e12bd4e8f722 6ddeed6d5abeeda1 29ab766f8e92b099 2223dbbbfd3bffa8 d9086d4d561bb678 04a56d733b120dec
    9a1b579fcb493135 fb4efb44ed35e068 1ea62bac2a2ae090 72838a1da8100699 cd6641d3b4524a0f 84fe67d9e626197a
    332adcd232c1a5fc 40751ee4720ec34d 2bd39235b952e964 f9d0c2a39a9fd54e
    9c392e4d9b458b74 8ffac93765179e3f d0df77c2fcce4727 caffd1a3c8117f5f
    9a270ae96f9f09f8 535ae97edc993d70 d35093f954d6b5e0 9c4e437b4f268a11 d8e9be0cd4701f3c 627fbdc99a159482
    """.split()
)
# The classes that cannot be, and why: a pattern for the name of a module in the encoder or decoder, and what it does.
_REASONS = {
    f"{_AUTOENCODERS}kl_allegro.AutoencoderKLAllegro": ("*temp_convs.0", "looks ahead"),
    f"{_AUTOENCODERS}kl_cogvideox.AutoencoderKLCogVideoX": (
        "*norm1",
        "takes its statistics over as many frames as the length of the clip leaves in a batch",
    ),
    f"{_AUTOENCODERS}kl_cosmos.AutoencoderKLCosmos": ("*temp_attentions.0", "attends to all frames before"),
    f"{_AUTOENCODERS}kl_hunyuan_video.AutoencoderKLHunyuanVideo": ("*norm1", "takes its statistics over all frames"),
    f"{_AUTOENCODERS}kl_hunyuanimage_refiner.AutoencoderKLHunyuanImageRefiner": (
        "*attentions.0",
        "attends to all frames",
    ),
    f"{_AUTOENCODERS}kl_hunyuanvideo15.AutoencoderKLHunyuanVideo15": ("*attentions.0", "attends to all frames before"),
    _MINIMAX: ("transformer_blocks.0", "attends to frames ahead"),
    f"{_AUTOENCODERS}kl_mochi.AutoencoderKLMochi": ("*attentions.0", "attends to all frames before"),
    f"{_AUTOENCODERS}kl_qwenimage21.AutoencoderKLQwenImage21": ("conv_in", "is of single images"),
}
