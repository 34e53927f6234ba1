"""Causal convolutions of other libraries by `causal_conv3d`: no padded copy, no concatenation with a cache.

Each forward pass here is written from the behaviour of the class that it serves, caches included: what is in a cache,
and in which form, stays as it was, so that a call of ours and one of the original may follow each other. It returns
None for a call that `causal_conv3d` cannot take (tensors of several dtypes outside autocast, say), which then goes to
the original. Fingerprints are of diffusers 0.42.1, magvit2-pytorch 0.5.1, and Cosmos-Tokenizer 3584ae7.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import DTYPES
from .._library import autocast_enabled
from ..causal_conv3d import causal_conv3d
from ..causal_conv3d.reference import past
from .adapter import Adapter, class_path, fingerprint

FAMILY = ("CausalConv3d",)

# The names that PyTorch has for padding, and ours: of the frame; and of time, where one F.pad does both.
_SPACE = {"zeros": "zeros", "constant": "zeros", "replicate": "replicate", "reflect": "reflect"}
_TIME = {"constant": "zeros", "replicate": "first_frame"}

_DIFFUSERS = "diffusers.models.autoencoders.autoencoder_"
# Convolutions that split a large input along time, which with a stride or dilation of time changes their result:
# fingerprint of their forward, and up to how many elements of so many bytes they do not.
_SPLITTING: dict[str, tuple[str, Callable[[int], float]]] = {
    f"{_DIFFUSERS}kl_cogvideox.CogVideoXSafeConv3d": ("95b202c492344e07", lambda _: 2**30),
    f"{_DIFFUSERS}kl_kvae_video.KVAESafeConv3d": ("e9d900265d600e37", lambda itemsize: 3e9 / itemsize),
    f"{_DIFFUSERS}kandinsky6_sr.Kandinsky6SRSafeConv3d": ("0411ea2451b4f1dc", lambda _: 2e9),
}


def _convolve(
    conv: nn.Conv3d,
    x: Tensor,
    *,
    front: int,
    before: Tensor | None = None,
    time_padding: str = "first_frame",
    padding: tuple[int, int, int, int],
    mode: str = "zeros",
) -> Tensor | None:
    """The convolution over ``front`` frames of time padding, then ``before``, then x, and no other frames.

    ``padding`` of the frame is (left, right, top, bottom), as F.pad has it, by ``mode``.
    None where the op cannot take the call.
    """
    span = (conv.kernel_size[0] - 1) * conv.dilation[0]
    known = front + (0 if before is None else before.shape[2])
    if not _takes(conv, x, before) or mode not in _SPACE or front < 0 or not known <= span < known + x.shape[2]:
        return None
    left, right, top, bottom = padding
    if class_path(type(conv)) in _SPLITTING and (conv.stride[0] > 1 or conv.dilation[0] > 1):
        batch, channels, frames, height, width = x.shape
        padded = batch * channels * (known + frames) * (top + height + bottom) * (left + width + right)
        if padded > _SPLITTING[class_path(type(conv))][1](x.element_size()):
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
        padding=((top, bottom), (left, right)),
        time_padding=time_padding,
        space_padding=_SPACE[mode],
        history=history,
        groups=conv.groups,
    )


def _takes(conv: Any, x: Tensor, before: Tensor | None) -> bool:
    """Whether the tensors of a call are of one dtype that the op has, or become so by autocast, on one device."""
    if x.dim() != 5 or 0 in x.shape[1:]:
        return False
    if before is not None and (before.dtype != x.dtype or before.device != x.device):
        return False
    parameters = [conv.weight] if conv.bias is None else [conv.weight, conv.bias]
    dtypes = {x.dtype, *(parameter.dtype for parameter in parameters)}
    if any(parameter.device != x.device for parameter in parameters) or not dtypes.issubset(DTYPES):
        return False
    return len(dtypes) == 1 or (autocast_enabled(x.device.type) and torch.float64 not in dtypes)


def _plain(conv: nn.Module) -> bool:
    """Whether a call of this convolution, inside another module, is a convolution by its weight and nothing else."""
    hooks = conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks
    known = type(conv) is nn.Conv3d or class_path(type(conv)) in _SPLITTING
    return known and not hooks and "forward" not in vars(conv)


def _last(x: Tensor, frames: int) -> Tensor:
    return x[:, :, -frames:] if frames else x[:, :, :0]


def _tail(x: Tensor, before: Tensor | None, frames: int, dropped: int = 0) -> Tensor:
    """The last frames of ``before`` (x's first frame, where it is None) and x, but for those dropped at the end."""
    end = x.shape[2] - dropped
    if end < frames:
        x = torch.cat([past(x, frames, "first_frame") if before is None else before, x], dim=2)
        end = x.shape[2] - dropped
    return _last(x[:, :, :end], frames).clone()


def _twice(padding: Any) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) from the padding of an nn.Conv3d."""
    return padding[2], padding[2], padding[1], padding[1]


# Wan, Qwen-Image: zeros in front, of which a cache takes the place


def _wan(self: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor | None:
    *padding, front, _ = self._padding
    before = None if cache_x is None or not front else cache_x.to(x.device)
    missing = front if before is None else front - before.shape[2]
    return _convolve(self, x, front=missing, before=before, time_padding="zeros", padding=padding)


def _wan_image(self: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor | None:
    """An nn.Conv2d over the one frame of x."""
    if cache_x is not None or not _takes(self, x, None) or x.shape[2] != 1:
        return None
    left, right, top, bottom = self._padding
    return causal_conv3d(
        x,
        self.weight[:, :, None],
        self.bias,
        stride=(1, *self.stride),
        dilation=(1, *self.dilation),
        padding=((top, bottom), (left, right)),
        groups=self.groups,
    )


# HunyuanVideo, magvit2-pytorch, KVAE: one F.pad for time and frame


def _hunyuan(self: Any, hidden_states: Tensor) -> Tensor | None:
    *padding, front, _ = self.time_causal_padding
    mode = self.pad_mode
    return _convolve(
        self.conv, hidden_states, front=front, time_padding=_TIME.get(mode, ""), padding=padding, mode=mode
    )


def _magvit2(self: Any, x: Tensor) -> Tensor | None:
    *padding, front, _ = self.time_causal_padding
    mode = self.pad_mode if self.time_pad < x.shape[2] else "constant"
    return _convolve(self.conv, x, front=front, time_padding=_TIME.get(mode, ""), padding=padding, mode=mode)


def _kvae(self: Any, input: Tensor) -> Tensor | None:
    padding = (self.width_pad, self.width_pad, self.height_pad, self.height_pad)
    return _convolve(self.conv, input, front=self.time_pad, padding=padding, mode="replicate")


# Cosmos, LTX, CogVideoX: copies of the first frame in front


def _cosmos(self: Any, hidden_states: Tensor) -> Tensor | None:
    return _convolve(self, hidden_states, front=self.temporal_pad, padding=self.spatial_pad, mode=self.pad_mode)


def _cosmos_tokenizer(self: Any, x: Tensor) -> Tensor | None:
    return _convolve(self.conv3d, x, front=self.time_pad, padding=self.spatial_pad, mode=self.pad_mode)


def _ltx(self: Any, hidden_states: Tensor) -> Tensor | None:
    return _of_first_frame(self, hidden_states) if self.is_causal else None


def _ltx2(self: Any, hidden_states: Tensor, causal: bool = True) -> Tensor | None:
    return _of_first_frame(self, hidden_states) if causal else None


def _of_first_frame(self: Any, x: Tensor) -> Tensor | None:
    conv = self.conv
    return _convolve(conv, x, front=self.kernel_size[0] - 1, padding=_twice(conv.padding), mode=conv.padding_mode)


def _cogvideox(self: Any, inputs: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, Tensor | None] | None:
    if self.pad_mode == "replicate":
        y = _convolve(self.conv, inputs, front=self.time_pad, padding=self.time_causal_padding[:4], mode="replicate")
        return None if y is None else (y, None)
    frames = self.time_kernel_size - 1
    before = conv_cache if frames else None
    front = frames if before is None else 0
    y = _convolve(self.conv, inputs, front=front, before=before, padding=_twice(self.conv.padding))
    if y is None:
        return None
    return y, _tail(inputs, before, frames) if frames else inputs.clone()


# MiniMax-H3: zeros in front


def _minimax(self: Any, hidden_states: Tensor) -> Tensor | None:
    return _convolve(
        self,
        hidden_states,
        front=self.temporal_padding,
        time_padding="zeros",
        padding=(self.spatial_padding,) * 4,
        mode=self.spatial_padding_mode,
    )


# EasyAnimate, VidTok: the past is an attribute


def _easyanimate(self: Any, hidden_states: Tensor) -> Tensor | None:
    frames, before = self.temporal_padding, self.prev_features
    front = frames if before is None else 0
    if before is not None and self.t_stride == 2:
        before = before[:, :, -(frames - 1) :]
    padding = _twice(self.padding)
    y = _convolve(self, hidden_states, front=front, before=before, padding=padding, mode=self.padding_mode)
    if y is None:
        return None
    self.prev_features = _tail(hidden_states, before, frames)
    return y


def _vidtok(self: Any, x: Tensor) -> Tensor | None:
    frames = self.time_pad
    before = None if self.is_first_chunk else _last(self.causal_cache, frames)
    front = frames if before is None else 0
    y = _convolve(self.conv, x, front=front, before=before, padding=self.spatial_padding[:4], mode=self.pad_mode)
    if y is None:
        return None
    # The original keeps all frames that it has seen, and reads these.
    self.causal_cache = _tail(x, before, frames, self.cache_offset)
    return y


# KVAE, Kandinsky: the past is in a dictionary, with its padding of the frame


def _kvae_cached(self: Any, input: Tensor, cache: dict[str, Any]) -> Tensor | None:
    padding = (self.height_pad, self.height_pad, self.width_pad, self.width_pad)
    return _with_dictionary(self, input, cache, self.stride[0], padding, "replicate")


def _kandinsky(self: Any, hidden_states: Tensor, cache: dict[str, Any]) -> Tensor | None:
    padding = (self.width_pad, self.width_pad, self.height_pad, self.height_pad)
    return _with_dictionary(self, hidden_states, cache, self.time_stride, padding, "constant", whole=True)


def _with_dictionary(
    self: Any,
    x: Tensor,
    cache: dict[str, Any],
    stride: int,
    padding: tuple[int, int, int, int],
    mode: str,
    *,
    whole: bool = False,
) -> Tensor | None:
    """``whole``: a chunk that is shorter than what is kept of it is completed by what was kept before."""
    if x.dim() != 5:
        return None
    held, (frames, height, width) = cache["padding"], x.shape[2:]
    known = self.time_pad if held is None else held.shape[2]
    outputs = (frames + 1) // 2 if stride == 2 else frames
    if (known + frames - self.time_kernel_size) // stride + 1 != outputs:
        return None
    left, _, top, _ = padding
    before = None if held is None else held[:, :, :, top : top + height, left : left + width]
    front = known if held is None else 0
    y = _convolve(self.conv, x, front=front, before=before, padding=padding, mode=mode)
    if y is None or y.shape[3:] != x.shape[3:]:
        return None
    skipped = -known % stride
    start = skipped + stride * math.trunc((frames - skipped - self.time_kernel_size) / stride) + stride
    first = min(start, frames - 1)  # F.pad takes no tensor without frames
    kept = F.pad(x[:, :, first:], (*padding, 0, 0), mode=mode)
    if start >= 0:
        kept = kept[:, :, start - first :]
    elif whole:
        earlier = F.pad(past(x, known, "first_frame"), (*padding, 0, 0), mode=mode) if held is None else held
        kept = torch.cat([earlier[:, :, start:], F.pad(x, (*padding, 0, 0), mode=mode)], dim=2)
    cache["padding"] = kept.clone()
    return y.to(x.dtype)


def _adapter(
    path: str,
    forward: Callable[..., Any],
    known: str,
    *,
    inner: str = "",
    pads: bool = False,
    mode: str = "",
    modes: Any = _SPACE,
    methods: tuple[str, ...] = (),
    also: Callable[[Any], str | None] = lambda module: None,
) -> Adapter:
    """``inner``: the attribute of the convolution, if it is not the module itself; ``pads``: it may pad the frame.

    ``mode``: the attribute with the name of the padding (of the convolution, if that is what pads), one of ``modes``.
    ``also`` gives one more reason why an instance is left.
    """

    @functools.wraps(forward)
    def ours_or_original(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = forward(self, *args, **kwargs) if not inner or _plain(getattr(self, inner)) else None
        return self.original_forward(*args, **kwargs) if y is None else y

    def refuses(module: nn.Module) -> str | None:
        conv: Any = getattr(module, inner) if inner else module
        if inner and not _plain(conv):
            return f"its {inner} is a {type(conv).__name__} of another kind, or has hooks"
        checked, found = _SPLITTING.get(class_path(type(conv)), ("",))[0], fingerprint(type(conv).forward)
        if checked and checked != found:
            return f"its {inner} is of a release that was not checked (fingerprint {found})"
        if isinstance(conv.padding, str) or any(conv.padding[: 1 if pads else 3]):
            return f"its convolution pads time at both ends, or pads twice (padding is {conv.padding!r})"
        if mode and (name := getattr(conv if pads else module, mode)) not in modes:
            return f"it pads by {name!r}, which causal_conv3d has not"
        return also(module)

    return Adapter(path, "causal_conv3d", ours_or_original, frozenset({known}), refuses, ("forward", *methods))


def _diffusers(path: str, forward: Any, known: str, **options: Any) -> Adapter:
    return _adapter(_DIFFUSERS + path, forward, known, **options)


def _bidirectional(module: Any) -> str | None:
    return None if module.is_causal else "it is not causal"


def _of_one_frame(module: Any) -> str | None:
    return None if module.temporal_padding else "its kernel has one frame, and yet it keeps all of its input"


_ONE_PAD: dict[str, Any] = {"inner": "conv", "mode": "pad_mode", "modes": _TIME}
_INNER_PADS: dict[str, Any] = {"inner": "conv", "pads": True, "mode": "padding_mode"}

ADAPTERS = (
    _diffusers("kl_wan.WanCausalConv3d", _wan, "3437b1ebe51ce66f"),
    _diffusers("kl_qwenimage.QwenImageCausalConv3d", _wan, "3437b1ebe51ce66f"),
    _diffusers("kl_qwenimage21.QwenImage21CausalConv3d", _wan_image, "4c57f75781ff0340"),
    _diffusers("kl_hunyuan_video.HunyuanVideoCausalConv3d", _hunyuan, "f316722b61526a08", **_ONE_PAD),
    _diffusers("kl_hunyuanimage_refiner.HunyuanImageRefinerCausalConv3d", _hunyuan, "f316722b61526a08", **_ONE_PAD),
    _diffusers("kl_hunyuanvideo15.HunyuanVideo15CausalConv3d", _hunyuan, "f316722b61526a08", **_ONE_PAD),
    _diffusers("kl_kvae_video.KVAECausalConv3d", _kvae, "b73cced5866ec494", inner="conv"),
    _diffusers("kl_cosmos.CosmosCausalConv3d", _cosmos, "7f96ed6765e8f44a", mode="pad_mode"),
    _diffusers("kl_ltx.LTXVideoCausalConv3d", _ltx, "9a270ae96f9f09f8", **_INNER_PADS, also=_bidirectional),
    _diffusers("kl_ltx2.LTX2VideoCausalConv3d", _ltx2, "9c4e437b4f268a11", **_INNER_PADS),
    _diffusers(
        "kl_cogvideox.CogVideoXCausalConv3d",
        _cogvideox,
        "0dcd94e336892ec0",
        **_INNER_PADS,
        modes=("zeros",),
        methods=("fake_context_parallel_forward",),
    ),
    _diffusers("kl_minimax_h3.MiniMaxH3VideoCausalConv3d", _minimax, "896f58f3a60456f1", mode="spatial_padding_mode"),
    _diffusers(
        "kl_magvit.EasyAnimateCausalConv3d",
        _easyanimate,
        "3e818593622faa82",
        pads=True,
        mode="padding_mode",
        methods=("_clear_conv_cache",),
        also=_of_one_frame,
    ),
    _diffusers("vidtok.VidTokCausalConv3d", _vidtok, "d04e233f93418862", inner="conv", mode="pad_mode"),
    _diffusers("kl_kvae_video.KVAECachedCausalConv3d", _kvae_cached, "132a26352b2bee11", inner="conv"),
    _diffusers("kandinsky6_sr.Kandinsky6SRCausalConv3d", _kandinsky, "a89f5300aa793606", inner="conv"),
    _adapter("magvit2_pytorch.magvit2_pytorch.CausalConv3d", _magvit2, "921a0694ec53bed1", **_ONE_PAD),
    _adapter(
        "cosmos_tokenizer.modules.layers3d.CausalConv3d",
        _cosmos_tokenizer,
        "6c51ecc393807f94",
        inner="conv3d",
        mode="pad_mode",
        methods=("_replication_pad",),
    ),
)
