"""Norms of video autoencoders on video_norm, and norm and SiLU as one pass where a block applies one to the other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._checks import DTYPES
from .._library import autocast_enabled
from ..video_norm import video_norm
from .adapter import Adapter, class_path, fingerprint, is_bare, own_forward

# What norms compute, by class path: (norm, x, activation) -> y, or None where video_norm does not take this call.
_Norm = Callable[[nn.Module, Tensor, "str | None"], "Tensor | None"]


def _video_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any) -> Tensor | None:
    """video_norm of x [B, C, T, H, W] or, as a video of one frame, [B, C, H, W]; None where it takes no such thing."""
    if x.dim() == 4:
        y = _video_norm(x.unsqueeze(2), weight, bias, **options)
        return None if y is None else y.squeeze(2)
    rows = [row for row in (weight, bias) if row is not None]
    dtypes = {row.dtype for row in rows} or {x.dtype}
    wide = dtypes == {torch.float32} and x.dtype in (torch.float16, torch.bfloat16)
    fits = x.dim() == 5 and 0 not in x.shape[1:] and x.dtype in DTYPES and (wide or dtypes == {x.dtype})
    fits = fits and all(row.shape == x.shape[1:2] and row.device == x.device for row in rows)
    return video_norm(x, weight, bias, **options) if fits else None


def _in(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that PyTorch's norms compute in: under autocast on CUDA, not on CPU, float32."""
    wide = x.is_cuda and autocast_enabled("cuda") and x.dtype is not torch.float64
    return torch.float32 if wide else x.dtype


def _rms(norm: Any, x: Tensor, activation: str | None) -> Tensor | None:
    """gamma * sqrt(C) * x / max(|x|, 1e-12) + bias, |x| over channels: RMS with an epsilon that zeros alone see."""
    gamma, bias = norm.gamma, getattr(norm, "bias", None)
    bias = bias if isinstance(bias, Tensor) else None
    if (
        not getattr(norm, "channel_first", True)
        or gamma.dim() != x.dim() - 1
        or not {x.dtype, gamma.dtype} <= {*DTYPES}
    ):
        return None
    weight, bias = (None if row is None else row.flatten() for row in (gamma, bias))
    x, weight, bias = _in(torch.promote_types(x.dtype, gamma.dtype), x, weight, bias)
    return _video_norm(x, weight, bias, over="pixel", center=False, eps=1e-24 / x.shape[1], activation=activation)


def _group(norm: Any, x: Tensor, activation: str | None, over: str = "clip") -> Tensor | None:
    if _is_slower(x, activation):
        return None
    return _group_norm(norm, x, activation, over)


def _is_slower(x: Tensor, activation: str | None) -> bool:
    """Whether PyTorch's group norm is faster: in float32 with no SiLU after it, ours has 0.6 to 0.9 of its speed."""
    return x.device.type == "cpu" and x.element_size() > 2 and activation is None


def _group_norm(norm: Any, x: Tensor, activation: str | None, over: str) -> Tensor | None:
    x, weight, bias = _autocast(norm, x)
    return _video_norm(x, weight, bias, over=over, groups=norm.num_groups, eps=norm.eps, activation=activation)


def _autocast(norm: Any, x: Tensor) -> tuple[Any, ...]:
    dtype = _autocast_dtype(x)
    return (x, norm.weight, norm.bias) if dtype == x.dtype else _in(dtype, x, norm.weight, norm.bias)


def _frame_group(norm: Any, x: Tensor, activation: str | None) -> Tensor | None:
    return _group_norm(norm, x, activation, "frame") if x.dim() == 5 else None


def _inner(inner: nn.Module, x: Tensor, activation: str | None, over: str) -> Tensor | None:
    """Of a class that calls a group norm."""
    fits = type(inner) is nn.GroupNorm and is_bare(inner) and x.dim() == 5
    return _group_norm(inner, x, activation, over) if fits else None


def _cosmos(norm: Any, x: Tensor, activation: str | None) -> Tensor | None:
    over = "frame" if norm.num_groups == 1 else "clip"
    return None if _is_slower(x, activation) else _inner(norm.norm, x, activation, over)


def _kvae(norm: Any, x: Tensor, activation: str | None) -> Tensor | None:
    return None if _is_slower(x, activation) else _inner(norm.norm_layer, x, activation, "clip")


def _mochi(norm: Any, x: Tensor, activation: str | None) -> Tensor | None:
    return _inner(norm.norm_layer, x, activation, "frame")


def _per_channel(norm: Any, x: Tensor, activation: str | None) -> Tensor | None:
    (x,) = _in(_autocast_dtype(x), x)
    fits = norm.channel_dim == 1
    options = {"over": "pixel", "center": False, "eps": norm.eps, "activation": activation}
    return _video_norm(x, None, None, **options) if fits else None


def _vidtok(norm: Any, x: Tensor, activation: str | None) -> Tensor | None:
    inner = norm.norm
    if type(inner) is not nn.LayerNorm or not is_bare(inner):
        return None
    x, weight, bias = _autocast(inner, x)
    return _video_norm(x, weight, bias, over="pixel", eps=inner.eps, activation=activation)


def _channels_last(norm: Any, x: Tensor, activation: str | None, center: bool) -> Tensor | None:
    """x [B, T, H, W, C], a view of a video."""
    if x.dim() != 5:
        return None
    x = x.movedim(-1, 1)
    y = _video_norm(x, norm.weight, norm.bias, over="pixel", center=center, eps=norm.eps, activation=activation)
    return None if y is None else y.movedim(1, -1)


def _rms_channels_last(norm: Any, x: Tensor, activation: str | None) -> Tensor | None:
    same = norm.weight is None or norm.weight.dtype == x.dtype  # otherwise the class casts x to the weight's
    return _channels_last(norm, x, activation, center=False) if same else None


def _layer_channels_last(norm: Any, x: Tensor, activation: str | None) -> Tensor | None:
    return _channels_last(norm, x, activation, center=True) if _autocast_dtype(x) == x.dtype else None


_AUTOENCODERS = "diffusers.models.autoencoders.autoencoder_"
_RMS_FORWARD = "8a47e806d3ba6b1b"  # Wan's; the others are copies
# What a norm computes and the fingerprint of its forward; PyTorch's own need none.
_NORMS: dict[str, tuple[_Norm, str | None]] = {
    f"{_AUTOENCODERS}kandinsky6_sr.Kandinsky6VAERMSNorm": (_rms, "0c329787a73048c4"),
    f"{_AUTOENCODERS}kl_cosmos.CosmosCausalGroupNorm": (_cosmos, "a02d646f6bfc21cf"),
    f"{_AUTOENCODERS}kl_hunyuanimage_refiner.HunyuanImageRefinerRMS_norm": (_rms, _RMS_FORWARD),
    f"{_AUTOENCODERS}kl_hunyuanvideo15.HunyuanVideo15RMS_norm": (_rms, _RMS_FORWARD),
    f"{_AUTOENCODERS}kl_kvae_video.KVAECachedGroupNorm": (_kvae, "bfb23d67185edd53"),
    f"{_AUTOENCODERS}kl_ltx2.PerChannelRMSNorm": (_per_channel, "79c6194e6227dfd5"),
    f"{_AUTOENCODERS}kl_minimax_h3.MiniMaxH3VideoGroupNorm": (_frame_group, "505f42f38e4982ba"),
    f"{_AUTOENCODERS}kl_mochi.MochiChunkedGroupNorm3D": (_mochi, "483a2df088fd6bad"),
    f"{_AUTOENCODERS}kl_qwenimage.QwenImageRMS_norm": (_rms, _RMS_FORWARD),
    f"{_AUTOENCODERS}kl_qwenimage21.QwenImage21RMS_norm": (_rms, _RMS_FORWARD),
    f"{_AUTOENCODERS}kl_wan.WanRMS_norm": (_rms, _RMS_FORWARD),
    f"{_AUTOENCODERS}vidtok.VidTokLayerNorm": (_vidtok, "03acfa9fd74d11c3"),
}
# Norms that are everywhere: computed inside the blocks below alone.
_INSIDE: dict[str, tuple[_Norm, str | None]] = {
    "diffusers.models.normalization.RMSNorm": (_rms_channels_last, "3219c0258f0da097"),
    "torch.nn.modules.normalization.GroupNorm": (_group, None),
    "torch.nn.modules.normalization.LayerNorm": (_layer_channels_last, None),
}


_ALL = _NORMS | _INSIDE


def _norm_of(norm: nn.Module) -> _Norm | None:
    return _ALL.get(class_path(type(norm)), (None, None))[0]


def _normalize(norm: nn.Module, x: Tensor, activation: nn.Module | Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """activation(norm(x)) in one pass where nothing but the two forwards would run, else by calling them."""
    compute, plain = _norm_of(norm), activation in (None, functional.silu)
    if isinstance(activation, nn.Module):
        plain = type(activation) is nn.SiLU and is_bare(activation)
    y = compute(norm, x, None if activation is None else "silu") if compute and plain and is_bare(norm) else None
    if y is not None:
        return y
    y = norm(x)
    return y if activation is None else activation(y)


def _norm_forward(self: Any, x: Tensor) -> Tensor:
    compute = _norm_of(self)
    y = None if compute is None else compute(self, x, None)
    return self.original_forward(x) if y is None else y


def _kvae_norm_forward(self: Any, x: Tensor, cache: dict[str, Any] | None = None) -> Tensor:
    y = _kvae(self, x, None)
    if y is None:
        return self.original_forward(x, cache)
    if cache is not None and cache.get("mean") is None and cache.get("var") is None:
        cache["mean"] = cache["var"] = 1
    return y


def _per_channel_forward(self: Any, x: Tensor, channel_dim: int | None = None) -> Tensor:
    y = _per_channel(self, x, None)
    return self.original_forward(x, channel_dim) if y is None else y


class _With:
    """A module as the forward of its class sees it, with some attributes of our own."""

    def __init__(self, module: nn.Module, attributes: dict[str, Any]) -> None:
        self._module, self._attributes = module, attributes

    def __getattr__(self, name: str) -> Any:
        return self._attributes[name] if name in self._attributes else getattr(self._module, name)


def _same(x: Tensor) -> Tensor:
    return x


def _with_norms(norms: tuple[str, ...], activation: str | None, plain: tuple[str, ...] = ()) -> Callable[..., Any]:
    """The class's own forward, in which the ``norms`` do the ``activation`` that follows each of them, too."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        act = None if activation is None else getattr(self, activation)
        attributes: dict[str, Any] = {} if activation is None else {activation: _same}
        for name in norms:
            attributes[name] = functools.partial(_normalize, getattr(self, name), activation=act)
        for name in plain:
            norm = getattr(self, name)
            attributes[name] = None if norm is None else functools.partial(_normalize, norm)
        return type(self).original_forward(_With(self, attributes), *args, **kwargs)

    return forward


def _unfit(norms: tuple[str, ...], activation: str | None = None) -> Callable[[nn.Module], str | None]:
    """Why the norms of a block, each followed by ``activation``, are not one pass."""

    def refuses(block: Any) -> str | None:
        if activation is not None and type(getattr(block, activation)) is not nn.SiLU:
            return f"its activation is {type(getattr(block, activation)).__name__}, not SiLU"
        if hasattr(block, "temb_proj"):
            return "its activation is that of an embedding, too"
        if getattr(block, "scale_shift_table", None) is not None:
            return "its norms are modulated before the activation"
        for norm in (getattr(block, name) for name in norms):
            path = class_path(type(norm))
            compute, known = _ALL.get(path, (None, None))
            if compute is None or (known is not None and fingerprint(own_forward(type(norm))) != known):
                return f"its norm {path} is not known"
        return None

    return refuses


def _cosmos_block(self: Any, x: Tensor) -> Tensor:
    y = self.conv1(_normalize(self.norm1, x, functional.silu))
    y = self.conv2(self.dropout(_normalize(self.norm2, y, functional.silu)))
    return y + self.conv_shortcut(x)


def _minimax_block(self: Any, x: Tensor) -> Tensor:
    y = self.conv1(_normalize(self.norm1, x, functional.silu))
    y = self.conv2(_normalize(self.norm2, y, functional.silu))
    return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + y


def _kandinsky_block(self: Any, x: Tensor, cache: dict[str, Any], zq: Tensor | None = None) -> Tensor:
    if zq is not None:
        return self.original_forward(x, cache, zq)
    y = self.conv1(_normalize(self.norm1, x, functional.silu), cache["conv1"])
    y = self.conv2(_normalize(self.norm2, y, functional.silu), cache["conv2"])
    return (self.nin_shortcut(x) if self.in_channels != self.out_channels else x) + y


def _pairs(path: str, known: str, norms: str, activation: str, plain: str = "") -> Adapter:
    names = tuple(norms.split())
    forward = _with_norms(names, activation, tuple(plain.split()))
    refuses = _unfit(names, activation)
    return Adapter(_AUTOENCODERS + path, "video_norm with SiLU", forward, frozenset({known}), refuses)


def _block(path: str, known: str, forward: Callable[..., Any]) -> Adapter:
    refuses = _unfit(("norm1", "norm2"))
    return Adapter(_AUTOENCODERS + path, "video_norm with SiLU", forward, frozenset({known}), refuses)


_FORWARDS: dict[str, Callable[..., Any]] = {
    "KVAECachedGroupNorm": _kvae_norm_forward,
    "PerChannelRMSNorm": _per_channel_forward,
}
ADAPTERS = (
    *(
        Adapter(path, "video_norm", _FORWARDS.get(path.rpartition(".")[2], _norm_forward), frozenset({known}))
        for path, (_, known) in _NORMS.items()
        if known is not None
    ),
    Adapter(
        f"{_AUTOENCODERS}kl_cogvideox.CogVideoXSpatialNorm3D",
        "video_norm",
        _with_norms((), None, ("norm_layer",)),
        frozenset({"4569ad86a97a65b6"}),
        _unfit(("norm_layer",)),
    ),
    _block("kandinsky6_sr.Kandinsky6SRResnetBlock3D", "f6cc37afdcc78122", _kandinsky_block),
    _block("kl_cosmos.CosmosResnetBlock3d", "e7cc6d16324ed375", _cosmos_block),
    _block("kl_minimax_h3.MiniMaxH3VideoResnetBlock3d", "423433b6bd0cdb07", _minimax_block),
    _pairs("kl_cogvideox.CogVideoXResnetBlock3D", "9a67d4373e37782e", "norm1 norm2", "nonlinearity"),
    _pairs("kl_cogvideox.CogVideoXEncoder3D", "d93515b2c4168557", "norm_out", "conv_act"),
    _pairs("kl_hunyuan_video.HunyuanVideoResnetBlockCausal3D", "539d90c749600658", "norm1 norm2", "nonlinearity"),
    _pairs("kl_hunyuan_video.HunyuanVideoEncoder3D", "ad072b13c641b717", "conv_norm_out", "conv_act"),
    _pairs("kl_hunyuan_video.HunyuanVideoDecoder3D", "f8b5c2e933b5279a", "conv_norm_out", "conv_act"),
    _pairs("kl_hunyuanimage_refiner.HunyuanImageRefinerResnetBlock", "6b843a854ea0dbd9", "norm1 norm2", "nonlinearity"),
    _pairs("kl_hunyuanimage_refiner.HunyuanImageRefinerEncoder3D", "66bde065e45867b3", "norm_out", "conv_act"),
    _pairs("kl_hunyuanimage_refiner.HunyuanImageRefinerDecoder3D", "c29219c1660fdc6c", "norm_out", "conv_act"),
    _pairs("kl_hunyuanvideo15.HunyuanVideo15ResnetBlock", "6b843a854ea0dbd9", "norm1 norm2", "nonlinearity"),
    _pairs("kl_hunyuanvideo15.HunyuanVideo15Encoder3D", "66bde065e45867b3", "norm_out", "conv_act"),
    _pairs("kl_hunyuanvideo15.HunyuanVideo15Decoder3D", "c29219c1660fdc6c", "norm_out", "conv_act"),
    _pairs("kl_ltx.LTXVideoResnetBlock3d", "2a4fba66b8935529", "norm1 norm2", "nonlinearity", "norm3"),
    _pairs("kl_ltx.LTXVideoEncoder3d", "9c392e4d9b458b74", "norm_out", "conv_act"),
    _pairs("kl_ltx.LTXVideoDecoder3d", "8ffac93765179e3f", "norm_out", "conv_act"),
    _pairs("kl_ltx2.LTX2VideoResnetBlock3d", "2dfcdb65a6a6dc42", "norm1 norm2", "nonlinearity", "norm3"),
    _pairs("kl_ltx2.LTX2VideoEncoder3d", "d0df77c2fcce4727", "norm_out", "conv_act"),
    _pairs("kl_ltx2.LTX2VideoDecoder3d", "caffd1a3c8117f5f", "norm_out", "conv_act"),
    _pairs("kl_magvit.EasyAnimateResidualBlock3D", "f5b0bff8f57e0200", "norm1 norm2", "nonlinearity"),
    _pairs("kl_magvit.EasyAnimateEncoder", "0e0ddf353cdc7921", "conv_norm_out", "conv_act"),
    _pairs("kl_magvit.EasyAnimateDecoder", "7a52967de6659cb8", "conv_norm_out", "conv_act"),
    _pairs("kl_mochi.MochiResnetBlock3D", "df65e7d69b3da5b5", "norm1 norm2", "nonlinearity"),
    _pairs("kl_mochi.MochiEncoder3D", "dfe5cc2716f5a788", "norm_out", "nonlinearity"),
    _pairs("kl_qwenimage.QwenImageResidualBlock", "ff184c86148cec39", "norm1 norm2", "nonlinearity"),
    _pairs("kl_qwenimage.QwenImageEncoder3d", "acf3c0c905ef9ea5", "norm_out", "nonlinearity"),
    _pairs("kl_qwenimage.QwenImageDecoder3d", "b04fe5a07bf2c7c6", "norm_out", "nonlinearity"),
    _pairs("kl_qwenimage21.QwenImage21ResidualBlock", "a474f86665843775", "norm1 norm2", "nonlinearity"),
    _pairs("kl_qwenimage21.QwenImage21Encoder3d", "5d4784c920859416", "norm_out", "nonlinearity"),
    _pairs("kl_qwenimage21.QwenImage21Decoder3d", "fcf490eb8ad0277f", "norm_out", "nonlinearity"),
    _pairs("kl_wan.WanResidualBlock", "7f6cd02e90fe5487", "norm1 norm2", "nonlinearity"),
    _pairs("kl_wan.WanEncoder3d", "41371fb2d0edfc65", "norm_out", "nonlinearity"),
    _pairs("kl_wan.WanDecoder3d", "9179052e3aea2079", "norm_out", "nonlinearity"),
    _pairs("vidtok.VidTokResnetBlock", "5413d06f3f2cef92", "norm1 norm2", "nonlinearity"),
    _pairs("vidtok.VidTokEncoder3D", "6c3f08484ed822ed", "norm_out", "nonlinearity"),
    _pairs("vidtok.VidTokDecoder3D", "3ccb128277bc47c6", "norm_out", "nonlinearity"),
)
# Parts of the names of norms like these.
FAMILY = ("RMS_norm", "VAERMSNorm", "CausalGroupNorm", "VideoGroupNorm", "CachedGroupNorm", "ChunkedGroupNorm3D")
