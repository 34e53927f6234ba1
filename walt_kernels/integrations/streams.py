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

from . import streams_ltx
from .adapter import class_path, fingerprint, own_forward

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
            alone.
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
        if not isinstance(source, Tensor) and not isinstance(source, Iterable):
            expected = "a tensor [B, C, T, H, W] or an iterable of such chunks"
            raise TypeError(f"{name} is a {type(source).__name__}, expected {expected}")
        self._chunks = iter([source] if isinstance(source, Tensor) else source)
        self._rest: list[Tensor] = []
        self._name = name
        self._shape: tuple[int, ...] | None = None
        self._dtype: torch.dtype | None = None

    def take(self, count: int) -> Tensor | None:
        """The next ``count`` frames, fewer at the end of the video, None after it."""
        while sum(chunk.shape[2] for chunk in self._rest) < count:
            try:
                chunk = self._checked(next(self._chunks))
            except StopIteration:
                break
            self._rest += [chunk] if chunk.shape[2] else []
        if not self._rest:
            return None
        frames = self._rest[0] if len(self._rest) == 1 else torch.cat(self._rest, dim=2)
        if frames.shape[2] <= count:
            self._rest = []
            return frames
        self._rest = [frames[:, :, count:]]
        return frames[:, :, :count]

    def parts(self, first: int, then: int, end: str = "taken") -> Iterator[Tensor]:
        """``first`` frames, then ``then`` at a time; fewer at the end are "taken", "left out" or "refused"."""
        count, frames = first, self.take(first)
        if frames is None:
            raise ValueError(f"{self._name} has no frames, expected 1 or more")
        while frames is not None:
            if frames.shape[2] < count and end == "refused":
                got = f"{frames.shape[2]} frames more than {first} + {then} k"
                raise ValueError(f"{self._name} ends with {got}, expected none")
            if frames.shape[2] == count or end == "taken":
                yield frames
            count, frames = then, self.take(then)

    def _checked(self, chunk: Tensor) -> Tensor:
        if not isinstance(chunk, Tensor) or chunk.dim() != 5:
            what = f"shape {tuple(chunk.shape)}" if isinstance(chunk, Tensor) else type(chunk).__name__
            raise ValueError(f"{self._name} has a chunk of {what}, expected a tensor [B, C, T, H, W]")
        shape = (*chunk.shape[:2], *chunk.shape[3:])
        self._shape = self._shape or shape
        if shape != self._shape:
            raise ValueError(f"{self._name} has a chunk of {shape} beside its frames, expected {self._shape} as before")
        self._dtype = self._dtype or chunk.dtype
        if chunk.dtype != self._dtype or not chunk.is_floating_point():
            expected = f"{self._dtype} as before" if chunk.dtype != self._dtype else "floating point"
            raise TypeError(f"{self._name} has a chunk of dtype {chunk.dtype}, expected {expected}")
        return chunk


def _stream(vae: nn.Module, source: Tensor | Iterable[Tensor], task: str) -> Iterator[Tensor]:
    if not isinstance(vae, nn.Module):
        raise TypeError(f"vae is a {type(vae).__name__}, expected an nn.Module")
    path = class_path(type(vae))
    kind, stream = type(vae).__name__, _STREAMS.get(path)
    run = None if stream is None else getattr(stream, task)
    if stream is None or run is None:
        raise ValueError(f"vae is a {kind}, {_why(vae, task)}; expected one that stream_{task} can do in parts")
    if stream.checked and fingerprint(stream.checked(vae, task)) not in _KNOWN:
        raise ValueError(f"vae is a {kind} of a release that was not checked; expected one whose {task} is known")
    if path != _MINIMAX and any(getattr(vae, f"use_{way}", False) for way in _TILED):
        raise ValueError("vae blends tiles, which gives other values than its whole frames; call vae.disable_tiling()")
    hook = getattr(vae, "_hf_hook", None)  # of the library accelerate: brings an offloaded model to its device
    if hook is not None and hasattr(hook, "pre_forward"):
        hook.pre_forward(vae)
    return run(vae, _Frames("video" if task == "encode" else "latents", source))


_TILED = ("tiling", "framewise_encoding", "framewise_decoding")


def _why(vae: nn.Module, task: str) -> str:
    pattern, why = _REASONS.get(class_path(type(vae)), (None, ""))
    names = [name for name, _ in vae.named_modules() if fnmatch.fnmatch(name, f"{task}r.{pattern}")]
    return f"whose {names[0]} {why}" if names else "which is not known"


# Every stream below calls what the class's own encode or decode calls, with the same caches, part by part.


def _filled(coder: nn.Module) -> list[Any]:
    return [None] * sum(isinstance(module, nn.Conv3d) for module in coder.modules())


@torch.no_grad()
def _wan_encode(vae: Any, frames: _Frames) -> Iterator[Tensor]:
    cache = _filled(vae.encoder)
    for part in frames.parts(1, 4, end="left out"):
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
    for part in frames.parts(1, vae.temporal_compression_ratio if task == "encode" else 1, end="refused"):
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
        try:
            y = vae.quant_conv(coder(part)) if task == "encode" else coder(vae.post_quant_conv(part))
            kept = {module: module.prev_features for module in kept}
        finally:
            _remember(others)
        yield y


def _remember(past: dict[Any, Any]) -> None:
    for module, features in past.items():
        module.prev_features = features


def _ltx(vae: Any, frames: _Frames, task: str) -> Iterator[Tensor]:
    coder = streams_ltx.Coder(vae, task)  # says now, not at the first part, what cannot be streamed
    return _one_by_one(coder, frames.parts(1, coder.factor if task == "encode" else 1, end="refused"))


@torch.no_grad()
def _one_by_one(coder: streams_ltx.Coder, parts: Iterator[Tensor]) -> Iterator[Tensor]:
    for part in parts:
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
    checked: Callable[[Any, str], Any] | None = lambda vae, task: getattr(type(vae), f"_{task}")  # by its fingerprint


def _both(stream: Callable[..., Iterator[Tensor]], **options: Any) -> _Stream:
    return _Stream(functools.partial(stream, task="encode"), functools.partial(stream, task="decode"), **options)


def _coder(vae: Any, task: str) -> Any:
    """Where the library accelerate, if it is there, wraps the method that would be looked at."""
    return own_forward(type(vae.encoder if task == "encode" else vae.decoder))


_MINIMAX = f"{_AUTOENCODERS}kl_minimax_h3.AutoencoderKLMiniMaxH3"
_STREAMS = {
    "walt.model.tokenizer.Tokenizer": _both(_walt, checked=None),
    f"{_AUTOENCODERS}kandinsky6_sr.Kandinsky6SRVAE": _both(_kandinsky, checked=_coder),
    f"{_AUTOENCODERS}kl_kvae_video.AutoencoderKLKVAEVideo": _Stream(_kvae_encode, _kvae_decode),
    f"{_AUTOENCODERS}kl_ltx.AutoencoderKLLTXVideo": _both(_ltx),
    f"{_AUTOENCODERS}kl_ltx2.AutoencoderKLLTX2Video": _both(_ltx),
    f"{_AUTOENCODERS}kl_magvit.AutoencoderKLMagvit": _both(_easyanimate, checked=_coder),
    _MINIMAX: _Stream(encode=_minimax_encode),
    f"{_AUTOENCODERS}kl_qwenimage.AutoencoderKLQwenImage": _Stream(_wan_encode, _wan_decode),
    f"{_AUTOENCODERS}kl_wan.AutoencoderKLWan": _Stream(_wan_encode, functools.partial(_wan_decode, first_chunk=True)),
}
# Fingerprints of what is checked.
_KNOWN = {
    "f1e9e12bd4e8f722",
    "6ddeed6d5abeeda1",
    "29ab766f8e92b099",
    "2223dbbbfd3bffa8",
    "332bcc615dc34dff",
    "4578a69bb24a6912",
    "9a1b579fcb493135",
    "fb4efb44ed35e068",
    "72838a1da8100699",
    "0e0ddf353cdc7921",
    "7a52967de6659cb8",
    "332adcd232c1a5fc",
    "40751ee4720ec34d",
    "2bd39235b952e964",
    "f9d0c2a39a9fd54e",
}
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
    f"{_AUTOENCODERS}kl_mochi.AutoencoderKLMochi": ("*conv1", "keeps no frames for the next part"),
    f"{_AUTOENCODERS}kl_qwenimage21.AutoencoderKLQwenImage21": ("conv_in", "is of single images"),
}
