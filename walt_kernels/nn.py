"""Modules over the ops: `CausalConv3d`, `WindowAttention` and `AdaLNLoRA`.

Parameters only; what is computed, and which backend computes it, is the business of the ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._checks import choice, positive, triple
from .adaln_lora import adaln_lora
from .causal_conv3d import causal_conv3d
from .causal_conv3d.op import SPACE_PADDING, TIME_PADDING, Padding, resolve_padding
from .values import plain
from .window_attention import window_attention

__all__ = ["AdaLNLoRA", "CausalConv3d", "WindowAttention", "reset_children"]


def reset_children(module: nn.Module) -> None:
    """Give all that is inside a module the values that it started from, by `reset_parameters`, in order.

    Every module of this package and of `walt` that has parameters or buffers of its own has `reset_parameters`. It does
    what the constructor does and draws the same random numbers: first those of the modules inside, unless it is told
    recurse=False, then its own. So a module made under `torch.device("meta")` is after `to_empty` and
    `reset_parameters` as if it had been made where it is. (A module of another origin that has the method is taken to
    reset all that is inside it.) Who calls the method of every module has to begin with the
    innermost, as `Module.apply` does.
    """
    for child in module.children():
        reset = getattr(child, "reset_parameters", None)
        if reset is None:
            reset_children(child)
        else:
            reset()


class CausalConv3d(nn.Conv3d):
    """3D convolution that looks at the present and the past, never at the future.

    An `nn.Conv3d` with its arguments in its order, its names, shapes and distribution of `weight` [out_channels,
    in_channels / groups, kt, kh, kw] and `bias` [out_channels]: a state dict of the one loads into the other, and what
    asks for convolutions (adapters, initialisers, pruning) finds it. What differs:

    - padding is of the frame: "same" (also with a stride), an int, (ph, pw) or ((top, bottom), (left, right)). Time is
      always padded in front, by `time_span` frames: zeros, or with time_padding="first_frame" copies of frame 0.
    - padding_mode is "zeros", "replicate" or "reflect"; `space_padding`, the name that `walt_kernels.causal_conv3d`
      has for it, is the same.
    - A call may have a history. A layer that runs beside this one on the same input (as an adapter's first one) needs
      the same dilation, `time_padding` and `space_padding`, and must be given the history, too. peft's LoRA copies none
      of these: with others than the defaults, its merged weights compute something else than its live ones.

    Raises:
        ValueError, TypeError: an argument that does not fit; the text names it.
    """

    padding: Any  # as it was given

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = "same",
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        time_padding: str = "zeros",
        space_padding: str | None = None,
    ) -> None:
        in_channels, out_channels = positive("in_channels", in_channels), positive("out_channels", out_channels)
        groups = positive("groups", groups)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"{name} is {channels} with groups={groups}, expected a positive multiple of groups")
        if space_padding is not None:
            if padding_mode not in ("zeros", space_padding):
                raise ValueError(f"padding_mode is {padding_mode!r}, expected {space_padding!r} as space_padding")
            padding_mode = space_padding
        mode: Any = choice("padding_mode (space_padding)", padding_mode, SPACE_PADDING)
        size = triple("kernel_size", kernel_size)
        stride, dilation = triple("stride", stride), triple("dilation", dilation)
        padding = plain(padding)
        resolve_padding(padding, size[1:], dilation[1:])  # raises for what is no padding
        # torch pads nothing: the op does.
        super().__init__(in_channels, out_channels, size, stride, 0, dilation, groups, bias, mode, device, dtype)
        self.padding, self.time_padding = padding, choice("time_padding", time_padding, TIME_PADDING)

    @property
    def space_padding(self) -> str:
        return self.padding_mode

    @space_padding.setter
    def space_padding(self, mode: str) -> None:
        self.padding_mode = cast(Any, choice("space_padding", mode, SPACE_PADDING))

    @property
    def time_span(self) -> int:
        """Frames of the past that one output frame sees: the length of `history`."""
        return (self.kernel_size[0] - 1) * self.dilation[0]

    def forward(self, x: Tensor, history: Tensor | None = None) -> Tensor:
        """x [B, in_channels, T, H, W], history [B, in_channels, time_span, H, W] -> [B, out_channels, T', H', W']."""
        return self._conv_forward(x, self.weight, self.bias, history)

    def _conv_forward(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None = None
    ) -> Tensor:
        # What torch's own subclasses, and adapters, call with weights of theirs.
        return causal_conv3d(
            input,
            weight,
            bias,
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
        width, heads = positive("width", width), positive("heads", heads)
        if width % heads:
            raise ValueError(f"width is {width} with heads={heads}, expected a positive multiple of heads")
        context_width = None if context_width is None else positive("context_width", context_width)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.width, self.heads, self.dim = width, heads, width // heads
        self.window = triple("window", window)
        self.qkv = nn.Linear(width, 3 * width, **kind)
        self.proj = nn.Linear(width, width, **kind)
        self.context_kv = nn.Linear(context_width, 2 * width, **kind) if context_width is not None else None
        offsets = [2 * n - 1 for n in self.window]
        self.q_norm = nn.Parameter(torch.empty(self.dim, **kind)) if qk_norm else None
        self.k_norm = nn.Parameter(torch.empty(self.dim, **kind)) if qk_norm else None
        self.bias_table = nn.Parameter(torch.empty(heads, *offsets, **kind)) if bias_table else None
        self.reset_parameters(recurse=False)

    def reset_parameters(self, *, recurse: bool = True) -> None:
        """Norms 1, the bias table 0; the linear layers as `nn.Linear` has them. See `reset_children`."""
        if recurse:
            reset_children(self)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                nn.init.ones_(norm)
        if self.bias_table is not None:
            nn.init.zeros_(self.bias_table)

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
                "context is None, expected a tensor, since the module was made with context_width"
                if context is None
                else "context is a tensor, expected None, since the module was made without context_width"
            )
        # By reshape: in a trace, unflatten would fix the sizes for the old exporter of ONNX. Linear layers of matrices
        # make no views of their own.
        rows = x.flatten(0, -2)
        q, k, v = self.qkv(rows).reshape(*x.shape[:-1], 3, self.heads, self.dim).unbind(-3)
        context_k = context_v = None
        if context is not None and self.context_kv is not None:
            pair = self.context_kv(context).reshape(*context.shape[:-1], 2, self.heads, self.dim)
            context_k, context_v = pair.unbind(-3)
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
        return self.proj(out.reshape(rows.shape)).reshape(x.shape)

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
        width, layers = positive("width", width), positive("layers", layers)
        rank, chunks = positive("rank", rank), positive("chunks", chunks)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.width, self.layers, self.rank, self.chunks = width, layers, rank, chunks
        self.base = nn.Linear(width, chunks * width, **kind)
        self.down = nn.Parameter(torch.empty(layers, rank, width, **kind))
        self.up = nn.Parameter(torch.empty(layers, chunks * width, rank, **kind))
        self.reset_parameters(recurse=False)

    def reset_parameters(self, *, recurse: bool = True) -> None:
        """`down` normal with deviation width ** -0.5, `up` 0; `base` as `nn.Linear` has it. See `reset_children`."""
        if recurse:
            reset_children(self)
        nn.init.normal_(self.down, std=self.width**-0.5)
        nn.init.zeros_(self.up)

    def forward(self, cond: Tensor) -> Tensor:
        """cond [..., width] -> [layers, ..., chunks * width]; the leading dims may be (batch,) or (batch, frames)."""
        base = self.base(F.silu(cond))
        out = adaln_lora(cond.reshape(-1, self.width), base.reshape(-1, base.shape[-1]), self.down, self.up)
        return out.reshape(self.layers, *base.shape)

    def extra_repr(self) -> str:
        return f"{self.width}, layers={self.layers}, rank={self.rank}, chunks={self.chunks}"
