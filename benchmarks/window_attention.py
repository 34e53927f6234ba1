"""What users run today for biased window attention: SDPA with a materialised bias, or FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from walt_kernels.window_attention.reference import bias_of

from .contender import Contender

Window = tuple[int, int, int]
Attend = Callable[..., Tensor]  # q, k, v [B * windows, heads, tokens, dim], the window, the table, the flags


def _partition(x: Tensor, window: Window) -> Tensor:
    """[B, T, H, W, heads, dim] -> [B * windows, heads, tokens, dim]"""
    B, T, H, W, heads, dim = x.shape
    t, h, w = window
    x = x.reshape(B, T // t, t, H // h, h, W // w, w, heads, dim)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6, 8).reshape(-1, heads, t * h * w, dim)


def _merge(x: Tensor, shape: tuple[int, ...], window: Window) -> Tensor:
    B, T, H, W, heads, dim = shape
    t, h, w = window
    x = x.reshape(B, T // t, H // h, W // w, heads, t, h, w, dim)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4, 8).reshape(shape)


def _frames(x: Tensor) -> Tensor:
    """The partition where a window is a frame: a view, no copy."""
    return x.flatten(2, 3).flatten(0, 1).transpose(1, 2)


def _normed(q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (F.layer_norm(x, x.shape[-1:], eps=1e-6) * norm.to(x.dtype) for x, norm in ((q, q_norm), (k, k_norm)))
    return q, k


def _sdpa(q: Tensor, k: Tensor, v: Tensor, window: Window, table: Tensor, image: Tensor | None) -> Tensor:
    bias = bias_of(table, window, window).to(q.dtype)
    if image is not None:  # each sample's own mask, folded into the bias of each of its windows
        alone = torch.full_like(bias[0], float("-inf")).fill_diagonal_(0)
        masks = torch.where(image[:, None, None], alone, torch.zeros((), dtype=bias.dtype, device=bias.device))
        bias = (bias + masks[:, None]).repeat_interleave(len(q) // len(image), 0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _flex(compiled: Callable[..., Any]) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, window: Window, table: Tensor, image: Tensor | None) -> Tensor:
        t, h, w = window
        windows = len(q) // len(image) if image is not None else 1

        def score(score: Tensor, b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            dt, dh, dw = i // (h * w) - j // (h * w), i // w % h - j // w % h, i % w - j % w
            score = score + table[head, dt + t - 1, dh + h - 1, dw + w - 1]
            return score if image is None else torch.where(image[b // windows] & (i != j), float("-inf"), score)

        return compiled(q, k, v, score_mod=score)

    return attend


def _windowed(attend: Attend) -> Callable[..., Tensor]:
    """The op around ``attend``, with a copy that partitions the tokens."""

    def op(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: Window,
        bias_table: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        image: Tensor | None = None,
    ) -> Tensor:
        parts = (_partition(x, window) for x in (*_normed(q, k, q_norm, k_norm), v))
        return _merge(attend(*parts, window, bias_table, image), tuple(v.shape), window)

    return op


def _views(q: Tensor, k: Tensor, v: Tensor, window: Window, bias_table: Tensor, **norms: Tensor) -> Tensor:
    parts = (_frames(x) for x in (*_normed(q, k, **norms), v))
    return _sdpa(*parts, window, bias_table, None).transpose(1, 2).reshape(v.shape)


def _videos_only(
    q: Tensor, k: Tensor, v: Tensor, window: Window, bias_table: Tensor, image: Tensor, **norms: Tensor
) -> Tensor:
    """What the careful user writes: attention on the samples that need it (here the first ones), v for the others."""
    videos = int((~image).sum())
    some = (x[:videos] for x in (q, k, v))
    return torch.cat([_windowed(_sdpa)(*some, window, bias_table, **norms), v[videos:]])


def baselines(inputs: dict[str, Any]) -> dict[str, Contender]:
    """Functions of the same keyword arguments as the op."""
    on_cpu = inputs["q"].device.type == "cpu"
    refused = "FlexAttention has no backward pass on a CPU" if on_cpu else ""
    flex = _windowed(_flex(torch.compile(flex_attention, dynamic=False)))
    found = {"partition + SDPA": Contender(_windowed(_sdpa))}
    if "image" in inputs:
        found["partition + SDPA, videos only"] = Contender(_videos_only)
    elif inputs["window"] == (1, *inputs["q"].shape[2:4]):
        found["views + SDPA"] = Contender(_views)
    return {**found, "FlexAttention": Contender(flex, compiled=True, forward_only=refused)}
