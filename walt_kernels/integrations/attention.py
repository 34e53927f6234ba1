"""Swin's window attention in other libraries, by `window_attention`: no scores and no bias of all pairs in memory.

Their tables of relative positions are ``[(2h-1)(2w-1), heads]``, with a window in time ``[(2t-1)(2h-1)(2w-1), heads]``;
ours ``[heads, 2t-1, 2h-1, 2w-1]`` is a view of the same numbers, through which gradients flow into their parameter.
Where a class is handed windows that are cut out already, every window is a sample of its own.
A call with a mask (shifted windows), with dropout at work, or of which somebody wants the weights is the original's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..window_attention import window_attention
from .adapter import Adapter, class_path, fingerprint, is_bare

FAMILY = ("WindowAttention", "SwinSelfAttention")

_COSINE = "its scores are cosines with a learned scale, and its bias comes from an MLP"
LEFT = {
    "transformers.models.swinv2.modeling_swinv2.Swinv2SelfAttention": _COSINE,
    "transformers.models.swin2sr.modeling_swin2sr.Swin2SRSelfAttention": _COSINE,
    "timm.models.swin_transformer_v2.WindowAttention": _COSINE,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": _COSINE,
}

DIMS = range(8, 257)  # of a head, that window_attention takes
_SKIPPED = (nn.Dropout, nn.Softmax)  # between the two products, whose place the op takes
_OTHER_SCORES = ("is_causal", "position_bias", "softcap")  # what transformers' attention functions take beside a mask


def _three(window: Sequence[int]) -> tuple[int, int, int]:
    """(t, h, w) for a window that has no time, too."""
    t, h, w = (1, *window) if len(window) == 2 else window
    return t, h, w


def _attend(q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int, int], table: Tensor, scale: float) -> Tensor:
    """[B, T, H, W, C] of the queries, keys and values -> [B, T, H, W, C]; ``table`` is in their layout."""
    heads = table.shape[1]
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    bias = table.t().unflatten(1, [2 * size - 1 for size in window])
    bias = bias.to(torch.promote_types(q.dtype, bias.dtype))
    return window_attention(q, k, v, window=window, bias_table=bias, scale=scale).flatten(-2)


def _one_window(x: Tensor, window: Sequence[int], *skipped: nn.Module) -> bool:
    """Whether every sample [B, N, C] is a whole window, and nothing but the op's own softmax would be skipped."""
    if x.dim() != 3 or 0 in x.shape or x.shape[1] != math.prod(window):
        return False
    if not all(type(module) in _SKIPPED and is_bare(module) for module in skipped):
        return False
    return not any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in skipped)


def _swin(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """Windows [B, N, C]; beside the output the weights, which the implementation "sdpa" has as None."""
    bias = self.relative_position_bias
    dropout = self.training and self.attention_dropout > 0
    other = self.config._attn_implementation != "sdpa" or any(name in kwargs for name in _OTHER_SCORES)
    whole = _one_window(hidden_states, bias.window_size) and is_bare(bias)
    if dropout or other or attention_mask is not None or not whole:
        return self.original_forward(hidden_states, attention_mask, **kwargs)
    window = _three(bias.window_size)
    q, k, v = (layer(hidden_states).unflatten(1, window) for layer in (self.q_proj, self.k_proj, self.v_proj))
    out = _attend(q, k, v, window, bias.relative_position_bias_table, self.scaling)
    return self.o_proj(out.flatten(1, 3)), None


def _swin_self(
    self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool | None = False
) -> Any:
    """Windows [B, N, C]; a tuple, whose second is the weights where they are asked for."""
    whole = _one_window(hidden_states, self.window_size, self.dropout)
    if output_attentions or attention_mask is not None or not whole:
        return self.original_forward(hidden_states, attention_mask, output_attentions)
    window = _three(self.window_size)
    q, k, v = (layer(hidden_states).unflatten(1, window) for layer in (self.query, self.key, self.value))
    out = _attend(q, k, v, window, self.relative_position_bias_table, self.attention_head_size**-0.5)
    return (out.flatten(1, 3),)


def _packed(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Windows [B, N, C], with one projection for queries, keys and values."""
    if mask is not None or not _one_window(x, self.window_size, self.attn_drop, self.softmax):
        return self.original_forward(x, mask)
    window = _three(self.window_size)
    q, k, v = self.qkv(x).unflatten(1, window).chunk(3, dim=-1)
    out = _attend(q, k, v, window, self.relative_position_bias_table, self.scale)
    return self.proj_drop(self.proj(out.flatten(1, 3)))


def _whole_frames(self: Any, x: Tensor) -> Tensor:
    """Frames [B, H, W, C] or video [B, T, H, W, C], padded to whole windows with tokens that are seen."""
    sizes, window = x.shape[1:-1], tuple(self.window_size)
    pairs = list(zip(sizes, window, strict=False))
    shifted = any(shift and size > extent for shift, (size, extent) in zip(self.shift_size, pairs, strict=False))
    # In three dimensions a window larger than the video shrinks, and takes its bias from other places of the table.
    shrinks = len(window) == 3 and any(size < extent for size, extent in pairs)
    dropout = self.training and (self.attention_dropout > 0 or self.dropout > 0)
    if len(sizes) != len(window) or 0 in x.shape or shifted or shrinks or dropout:
        return self.original_forward(x)
    margins = [-size % extent for size, extent in pairs]
    padded = F.pad(x, [0, 0, *(n for margin in reversed(margins) for n in (0, margin))]) if any(margins) else x
    padded = padded.unsqueeze(1) if len(window) == 2 else padded
    q, k, v = F.linear(padded, self.qkv.weight, self.qkv.bias).chunk(3, dim=-1)
    scale = (x.shape[-1] // self.num_heads) ** -0.5
    out = _attend(q, k, v, _three(window), self.relative_position_bias_table, scale)
    out = out.squeeze(1) if len(window) == 2 else out
    for axis, size in enumerate(sizes, 1):
        out = out.narrow(axis, 0, size)
    return F.linear(out, self.proj.weight, self.proj.bias)


def _refuses(width: Callable[[Any], int], *skipped: str) -> Callable[[Any], str | None]:
    """``width`` is that of all heads together; the op takes the place of the children that ``skipped`` names."""

    def reason(module: Any) -> str | None:
        for name in skipped:
            if type(child := getattr(module, name)) not in _SKIPPED:
                return f"its {name} is a {type(child).__name__}"
        return _refuses_positions(module, width(module))

    return reason


def _refuses_swin(module: Any) -> str | None:
    bias, implementation = module.relative_position_bias, module.config._attn_implementation
    if implementation != "sdpa":  # which has no weights to return
        return f"its config has attn_implementation {implementation!r}, expected 'sdpa'"
    if class_path(type(bias)) != "transformers.models.swin.modeling_swin.SwinRelativePositionBias":
        return f"its relative_position_bias is a {type(bias).__name__}"
    if fingerprint(type(bias).forward) != "e9ec9d5613eaf9f7":
        return "its relative_position_bias is of a release that was not checked"
    return _refuses_positions(bias, module.q_proj.out_features)


def _refuses_positions(module: Any, width: int) -> str | None:
    dim, window = width // module.relative_position_bias_table.shape[1], module.window_size
    if dim not in DIMS:
        return f"its heads have dim {dim}, window_attention takes {DIMS[0]} to {DIMS[-1]}"
    index = module.relative_position_index
    if not index.is_meta and not torch.equal(index.flatten(), _relative_positions(window).to(index)):
        return "its relative_position_index is not Swin's"
    return None


def _relative_positions(window: Sequence[int]) -> Tensor:
    """The row of the table for every pair of tokens (i, j), flat: that of the offset i - j."""
    axes = torch.meshgrid(*(torch.arange(size) for size in window), indexing="ij")
    index = torch.zeros((), dtype=torch.long)
    for place, size in zip(axes, window, strict=True):
        place = place.flatten()
        index = index * (2 * size - 1) + place[:, None] - place + size - 1
    return index.flatten()


def _adapter(path: str, forward: Callable[..., Any], refuses: Any, *known: str, methods: Any = ("forward",)) -> Adapter:
    return Adapter(path, "window_attention", forward, frozenset(known), refuses, methods)


def _packed_width(module: Any) -> int:
    return module.qkv.out_features // 3


_TRANSFORMERS = (
    ("clap.modeling_clap", "ClapAudioSelfAttention"),
    ("donut.modeling_donut_swin", "DonutSwinSelfAttention"),
    ("maskformer.modeling_maskformer_swin", "MaskFormerSwinSelfAttention"),
)

# Checked against transformers 5.24, MONAI 1.3.2 to 1.6.1, timm 0.9.16 to 1.0.31 and torchvision 0.17.2 to 0.29.1.
ADAPTERS = (
    _adapter("transformers.models.swin.modeling_swin.SwinAttention", _swin, _refuses_swin, "9ee0034d3ab922d4"),
    *(
        _adapter(
            f"transformers.models.{file}.{name}",
            _swin_self,
            _refuses(lambda module: module.all_head_size, "dropout"),
            "3f35b5bd7b829017",
        )
        for file, name in _TRANSFORMERS
    ),
    _adapter(
        "monai.networks.nets.swin_unetr.WindowAttention",
        _packed,
        _refuses(_packed_width, "attn_drop", "softmax"),
        "1788e8ccfe64237e",
        "1d719a2199890e87",
    ),
    _adapter(
        "timm.models.swin_transformer.WindowAttention",
        _packed,
        _refuses(_packed_width, "attn_drop", "softmax"),
        "1e61b213875d565c",
        "799c5cae6aac17a5",
        methods=("forward", "_get_rel_pos_bias"),
    ),
    _adapter(
        "torchvision.models.swin_transformer.ShiftedWindowAttention",
        _whole_frames,
        _refuses(_packed_width),
        "0df7e49580eae711",
        "036e64fd156c07dc",
        methods=(
            "forward",
            "get_relative_position_bias",
            "_get_relative_position_bias",
            "shifted_window_attention",
        ),
    ),
    _adapter(
        "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d",
        _whole_frames,
        _refuses(_packed_width),
        "b5c7ccc93d3ffb7a",
        "d9792be61d3a2609",
        methods=(
            "forward",
            "get_relative_position_bias",
            "_get_window_and_shift_size",
            "_get_relative_position_bias",
            "_compute_pad_size_3d",
            "shifted_window_attention_3d",
        ),
    ),
)
