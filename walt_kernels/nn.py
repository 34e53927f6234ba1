"""Modules over the ops: `CausalConv3d`, `WindowAttention` and `AdaLNLoRA`.

Parameters only; what is computed, and which backend computes it, is the business of the ops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adaln_lora import adaln_lora
from .causal_conv3d import causal_conv3d
from .causal_conv3d.api import Padding, triple
from .window_attention import window_attention

__all__ = ["AdaLNLoRA", "CausalConv3d", "WindowAttention"]


class CausalConv3d(nn.Module):
    """3D convolution that looks at the present and the past, never at the future.

    `weight` [out_channels, in_channels / groups, kt, kh, kw] and `bias` [out_channels] have the names, shapes and
    initial distribution of `torch.nn.Conv3d`, so a state dict of the one loads into the other.
    The arguments are those of `walt_kernels.causal_conv3d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        padding: Padding = "same",
        time_padding: str = "zeros",
        space_padding: str = "zeros",
        groups: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels < 1 or groups < 1 or channels % groups:
                raise ValueError(f"{name}: got {channels} with groups={groups}; expected a positive multiple of groups")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = triple("kernel_size", kernel_size)
        self.stride = triple("stride", stride)
        self.dilation = triple("dilation", dilation)
        self.padding, self.time_padding, self.space_padding = padding, time_padding, space_padding
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size, device=device, dtype=dtype)
        )
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(fan_in), as `nn.Conv3d` does."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def time_span(self) -> int:
        """Frames of the past that one output frame sees: the length of `history`."""
        return (self.kernel_size[0] - 1) * self.dilation[0]

    def forward(self, x: Tensor, history: Tensor | None = None) -> Tensor:
        """x [B, in_channels, T, H, W], history [B, in_channels, time_span, H, W] -> [B, out_channels, T', H', W']."""
        return causal_conv3d(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            dilation=self.dilation,
            padding=self.padding,
            time_padding=self.time_padding,
            space_padding=self.space_padding,
            history=history,
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}, padding={self.padding!r}, time_padding={self.time_padding!r}, "
            f"space_padding={self.space_padding!r}, groups={self.groups}, bias={self.bias is not None}"
        )


class WindowAttention(nn.Module):
    """Multi-head attention inside windows: packed projection, `window_attention`, output projection.

    With `bias_table`, score(i, j) of a head gets a learned number that depends on the offset i - j only (Swin's form;
    zeros at first). With `qk_norm`, queries and keys are layer-normalised over the head dimension (ViT-22B).
    With `context_width`, every window also attends to the tokens of `context`.
    """

    q_norm: nn.Parameter | None
    k_norm: nn.Parameter | None
    bias_table: nn.Parameter | None

    def __init__(
        self,
        width: int,
        heads: int,
        window: int | Sequence[int],
        *,
        qk_norm: bool = True,
        bias_table: bool = True,
        context_width: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or width < 1 or width % heads:
            raise ValueError(f"width: got {width} with heads={heads}; expected a positive multiple of heads")
        if context_width is not None and context_width < 1:
            raise ValueError(f"context_width: got {context_width}; expected a positive int or None")
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.width, self.heads, self.dim = width, heads, width // heads
        self.window = triple("window", window)
        self.qkv = nn.Linear(width, 3 * width, **kind)
        self.proj = nn.Linear(width, width, **kind)
        self.context_kv = nn.Linear(context_width, 2 * width, **kind) if context_width is not None else None
        offsets = [2 * n - 1 for n in self.window]
        self.q_norm = nn.Parameter(torch.ones(self.dim, **kind)) if qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(self.dim, **kind)) if qk_norm else None
        self.bias_table = nn.Parameter(torch.zeros(heads, *offsets, **kind)) if bias_table else None

    def forward(
        self,
        x: Tensor,
        image: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """x [B, T, H, W, width], image bool [B] or [B, T], context [B, L, context_width], context_mask bool [B, L].

        Returns [B, T, H, W, width]. Tokens of an image frame attend to themselves alone.
        """
        if (context is None) != (self.context_kv is None):
            raise ValueError(
                "context: got None; expected a tensor, since the module was made with context_width"
                if context is None
                else "context: got a tensor; expected None, since the module was made without context_width"
            )
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.dim)).unbind(-3)
        context_k = context_v = None
        if context is not None and self.context_kv is not None:
            context_k, context_v = self.context_kv(context).unflatten(-1, (2, self.heads, self.dim)).unbind(-3)
        out = window_attention(
            q,
            k,
            v,
            window=self.window,
            bias_table=self.bias_table,
            image=image,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            context_k=context_k,
            context_v=context_v,
            context_mask=context_mask,
        )
        return self.proj(out.flatten(-2))

    def extra_repr(self) -> str:
        return (
            f"{self.width}, heads={self.heads}, window={self.window}, qk_norm={self.q_norm is not None}, "
            f"bias_table={self.bias_table is not None}"
        )


class AdaLNLoRA(nn.Module):
    """Modulation of all layers from one condition (W.A.L.T, AdaLN-LoRA).

    A_i = base(silu(cond)) + up_i down_i cond, i = 1 .. layers; `base` is shared by the layers, the pair of rank `rank`
    is each layer's own. `up` is zero at first: every layer starts from the shared modulation.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        rank: int,
        chunks: int = 6,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("layers", layers), ("rank", rank), ("chunks", chunks)):
            if value < 1:
                raise ValueError(f"{name}: got {value}; expected a positive int")
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.width, self.layers, self.rank, self.chunks = width, layers, rank, chunks
        self.base = nn.Linear(width, chunks * width, **kind)
        self.down = nn.Parameter(torch.empty(layers, rank, width, **kind))
        self.up = nn.Parameter(torch.zeros(layers, chunks * width, rank, **kind))
        nn.init.normal_(self.down, std=width**-0.5)

    def forward(self, cond: Tensor) -> Tensor:
        """cond [..., width] -> [layers, ..., chunks * width]; the leading dims may be (batch,) or (batch, frames)."""
        base = self.base(F.silu(cond))
        out = adaln_lora(cond.reshape(-1, self.width), base.reshape(-1, base.shape[-1]), self.down, self.up)
        return out.reshape(self.layers, *base.shape)

    def extra_repr(self) -> str:
        return f"{self.width}, layers={self.layers}, rank={self.rank}, chunks={self.chunks}"
