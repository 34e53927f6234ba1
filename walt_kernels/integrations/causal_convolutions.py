"""Causal convolutions of other libraries by `causal_conv3d`: no padded copy, no concatenation with a cache.

Each forward pass here is written from the behaviour of the class that it serves, caches included: what is in a cache,
and in which form, stays as it was, so that a call of ours and one of the original may follow each other. A call that
`causal_conv3d` cannot take (tensors of several dtypes outside autocast, say) goes to the original.
"""

from __future__ import annotations

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

    ``padding`` of the frame is (left, right, top, bottom), as F.pad has it, by ``mode``. None where the op cannot take
    the call, or a hook on ``conv`` would be passed over: it is then the original's.
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
    if x.dim() != 5 or 0 in x.shape[1:] or not (hasattr(conv, "original_forward") or _plain(conv)):
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


# WAN, QWEN-IMAGE: zeros, of which a cache takes the place


def _wan(self: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    *padding, front, _ = self._padding
    before = None if cache_x is None or not front else cache_x.to(x.device)
    missing = front if before is None else front - before.shape[2]
    y = _convolve(self, x, front=missing, before=before, time_padding="zeros", padding=padding)
    return self.original_forward(x, cache_x) if y is None else y


def _wan_image(self: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """An nn.Conv2d over the one frame of x."""
    if cache_x is not None or not _takes(self, x, None) or x.shape[2] != 1:
        return self.original_forward(x, cache_x)
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


# Padded with one F.pad: HUNYUAN, KVAE, MAGVIT2


def _hunyuan(self: Any, hidden_states: Tensor) -> Tensor:
    *padding, front, _ = self.time_causal_padding
    mode = self.pad_mode
    y = _convolve(self.conv, hidden_states, front=front, time_padding=_TIME.get(mode, ""), padding=padding, mode=mode)
    return self.original_forward(hidden_states) if y is None else y


def _magvit2(self: Any, x: Tensor) -> Tensor:
    *padding, front, _ = self.time_causal_padding
    mode = self.pad_mode if self.time_pad < x.shape[2] else "constant"
    y = _convolve(self.conv, x, front=front, time_padding=_TIME.get(mode, ""), padding=padding, mode=mode)
    return self.original_forward(x) if y is None else y


def _kvae(self: Any, input: Tensor) -> Tensor:
    padding = (self.width_pad, self.width_pad, self.height_pad, self.height_pad)
    y = _convolve(self.conv, input, front=self.time_pad, padding=padding, mode="replicate")
    return self.original_forward(input) if y is None else y


# The first frame in front: COSMOS, LTX, COGVIDEOX


def _cosmos(self: Any, hidden_states: Tensor) -> Tensor:
    y = _convolve(self, hidden_states, front=self.temporal_pad, padding=self.spatial_pad, mode=self.pad_mode)
    return self.original_forward(hidden_states) if y is None else y


def _cosmos_tokenizer(self: Any, x: Tensor) -> Tensor:
    y = _convolve(self.conv3d, x, front=self.time_pad, padding=self.spatial_pad, mode=self.pad_mode)
    return self.original_forward(x) if y is None else y


def _ltx(self: Any, hidden_states: Tensor) -> Tensor:
    y = _of_first_frame(self, hidden_states) if self.is_causal else None
    return self.original_forward(hidden_states) if y is None else y


def _ltx2(self: Any, hidden_states: Tensor, causal: bool = True) -> Tensor:
    y = _of_first_frame(self, hidden_states) if causal else None
    return self.original_forward(hidden_states, causal) if y is None else y


def _of_first_frame(self: Any, x: Tensor) -> Tensor | None:
    conv = self.conv
    return _convolve(conv, x, front=self.kernel_size[0] - 1, padding=_twice(conv.padding), mode=conv.padding_mode)


def _cogvideox(self: Any, inputs: Tensor, conv_cache: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    if self.pad_mode == "replicate":
        y = _convolve(self.conv, inputs, front=self.time_pad, padding=self.time_causal_padding[:4], mode="replicate")
        return self.original_forward(inputs, conv_cache) if y is None else (y, None)
    frames = self.time_kernel_size - 1
    before = conv_cache if frames else None
    front = frames if before is None else 0
    y = _convolve(self.conv, inputs, front=front, before=before, padding=_twice(self.conv.padding))
    if y is None:
        return self.original_forward(inputs, conv_cache)
    return y, _tail(inputs, before, frames) if frames else inputs.clone()


# MINIMAX


def _minimax(self: Any, hidden_states: Tensor) -> Tensor:
    y = _convolve(
        self,
        hidden_states,
        front=self.temporal_padding,
        time_padding="zeros",
        padding=(self.spatial_padding,) * 4,
        mode=self.spatial_padding_mode,
    )
    return self.original_forward(hidden_states) if y is None else y


# The past in an attribute: EASYANIMATE, VIDTOK


def _easyanimate(self: Any, hidden_states: Tensor) -> Tensor:
    frames, before = self.temporal_padding, self.prev_features
    front = frames if before is None else 0
    if before is not None and self.t_stride == 2:
        before = before[:, :, -(frames - 1) :]
    padding = _twice(self.padding)
    y = _convolve(self, hidden_states, front=front, before=before, padding=padding, mode=self.padding_mode)
    if y is None:
        return self.original_forward(hidden_states)
    self.prev_features = _tail(hidden_states, before, frames)
    return y


def _vidtok(self: Any, x: Tensor) -> Tensor:
    frames = self.time_pad
    before = None if self.is_first_chunk else _last(self.causal_cache, frames)
    front = frames if before is None else 0
    y = _convolve(self.conv, x, front=front, before=before, padding=self.spatial_padding[:4], mode=self.pad_mode)
    if y is None:
        return self.original_forward(x)
    # The original keeps all frames that it has seen, and reads these.
    self.causal_cache = _tail(x, before, frames, self.cache_offset)
    return y


# The past in a dictionary, as padded frames: KVAE, KANDINSKY


def _kvae_cached(self: Any, input: Tensor, cache: dict[str, Any]) -> Tensor:
    padding = (self.height_pad, self.height_pad, self.width_pad, self.width_pad)
    y = _with_dictionary(self, input, cache, self.stride[0], padding, "replicate")
    return self.original_forward(input, cache) if y is None else y


def _kandinsky(self: Any, hidden_states: Tensor, cache: dict[str, Any]) -> Tensor:
    padding = (self.width_pad, self.width_pad, self.height_pad, self.height_pad)
    y = _with_dictionary(self, hidden_states, cache, self.time_stride, padding, "constant", whole=True)
    return self.original_forward(hidden_states, cache) if y is None else y


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


def _refuses(
    inner: str = "", mode: str = "", modes: Any = _SPACE, pads: bool = False
) -> Callable[[nn.Module], str | None]:
    """Why an instance is left: ``inner`` is the attribute of its convolution, which may be one that ``pads`` the frame;
    ``mode`` the attribute (of the convolution, if that is what pads) with the name of the padding."""

    def reason(module: nn.Module) -> str | None:
        conv: Any = getattr(module, inner) if inner else module
        if inner and not _plain(conv):
            return f"its {inner} is a {type(conv).__name__} of another kind, or has hooks"
        path = class_path(type(conv))
        if path in _SPLITTING and fingerprint(type(conv).forward) != _SPLITTING[path][0]:
            return f"its {inner} is of a release that was not checked (fingerprint {fingerprint(type(conv).forward)})"
        if isinstance(conv.padding, str) or any(conv.padding[: 1 if pads else 3]):
            return f"its convolution pads time at both ends, or pads twice (padding is {conv.padding!r})"
        name = getattr(conv if pads else module, mode) if mode else None
        if mode and name not in modes:
            return f"it pads by {name!r}, causal_conv3d does not"
        return None

    return reason


def _refuses_ltx(module: nn.Module) -> str | None:
    return _refuses("conv", "padding_mode", pads=True)(module) if module.is_causal else "it is not causal"


def _refuses_easyanimate(module: nn.Module) -> str | None:
    if not module.temporal_padding:
        return "it keeps all of its input for the next chunk, though its kernel has one frame"
    return _refuses(mode="padding_mode", pads=True)(module)


def _adapter(path: str, forward: Any, known: str, refuses: Any, *methods: str) -> Adapter:
    return Adapter(path, "causal_conv3d", forward, frozenset({known}), refuses, ("forward", *methods))


def _diffusers(path: str, *options: Any) -> Adapter:
    return _adapter(_DIFFUSERS + path, *options)


_SELF, _INNER = _refuses(), _refuses("conv")
_ONE_PAD, _PAD_MODE = _refuses("conv", "pad_mode", _TIME), _refuses("conv", "pad_mode")
_INNER_PADS = _refuses("conv", "padding_mode", pads=True)

ADAPTERS = (
    _diffusers("kl_wan.WanCausalConv3d", _wan, "3437b1ebe51ce66f", _SELF),
    _diffusers("kl_qwenimage.QwenImageCausalConv3d", _wan, "3437b1ebe51ce66f", _SELF),
    _diffusers("kl_qwenimage21.QwenImage21CausalConv3d", _wan_image, "4c57f75781ff0340", _SELF),
    _diffusers("kl_hunyuan_video.HunyuanVideoCausalConv3d", _hunyuan, "f316722b61526a08", _ONE_PAD),
    _diffusers("kl_hunyuanimage_refiner.HunyuanImageRefinerCausalConv3d", _hunyuan, "f316722b61526a08", _ONE_PAD),
    _diffusers("kl_hunyuanvideo15.HunyuanVideo15CausalConv3d", _hunyuan, "f316722b61526a08", _ONE_PAD),
    _diffusers("kl_kvae_video.KVAECausalConv3d", _kvae, "b73cced5866ec494", _INNER),
    _diffusers("kl_cosmos.CosmosCausalConv3d", _cosmos, "7f96ed6765e8f44a", _refuses(mode="pad_mode")),
    _diffusers("kl_ltx.LTXVideoCausalConv3d", _ltx, "9a270ae96f9f09f8", _refuses_ltx),
    _diffusers("kl_ltx2.LTX2VideoCausalConv3d", _ltx2, "9c4e437b4f268a11", _INNER_PADS),
    _diffusers(
        "kl_cogvideox.CogVideoXCausalConv3d",
        _cogvideox,
        "0dcd94e336892ec0",
        _INNER_PADS,
        "fake_context_parallel_forward",
    ),
    _diffusers(
        "kl_minimax_h3.MiniMaxH3VideoCausalConv3d", _minimax, "896f58f3a60456f1", _refuses(mode="spatial_padding_mode")
    ),
    _diffusers(
        "kl_magvit.EasyAnimateCausalConv3d", _easyanimate, "3e818593622faa82", _refuses_easyanimate, "_clear_conv_cache"
    ),
    _diffusers("vidtok.VidTokCausalConv3d", _vidtok, "d04e233f93418862", _PAD_MODE),
    _diffusers("kl_kvae_video.KVAECachedCausalConv3d", _kvae_cached, "132a26352b2bee11", _INNER),
    _diffusers("kandinsky6_sr.Kandinsky6SRCausalConv3d", _kandinsky, "a89f5300aa793606", _INNER),
    _adapter("magvit2_pytorch.magvit2_pytorch.CausalConv3d", _magvit2, "921a0694ec53bed1", _ONE_PAD),
    _adapter(
        "cosmos_tokenizer.modules.layers3d.CausalConv3d",
        _cosmos_tokenizer,
        "6c51ecc393807f94",
        _refuses("conv3d", "pad_mode"),
        "_replication_pad",
    ),
)
