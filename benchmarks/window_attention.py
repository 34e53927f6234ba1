"""Window attention: its cases, and what users run today for it, SDPA with a materialised bias or FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from walt_kernels.testing import random
from walt_kernels.window_attention.op import BACKWARD, flops
from walt_kernels.window_attention.reference import bias_of

from .case import Case, Inputs, Target
from .contender import Contender

Window = tuple[int, int, int]
Attend = Callable[..., Tensor]  # q, k, v [B * windows, heads, tokens, dim], the window, the table, the flags

CPU_KERNELS: dict[str, SDPBackend | None] = {"": None}
GPU_KERNELS = {
    " efficient": SDPBackend.EFFICIENT_ATTENTION,
    " cuDNN": SDPBackend.CUDNN_ATTENTION,
    " flash": SDPBackend.FLASH_ATTENTION,
    " math": SDPBackend.MATH,
}


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


def _normed(q: Tensor, k: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> tuple[Tensor, Tensor]:
    if q_norm is None or k_norm is None:
        return q, k
    q, k = (F.layer_norm(x, x.shape[-1:], eps=1e-6) * norm.to(x.dtype) for x, norm in ((q, q_norm), (k, k_norm)))
    return q, k


def _bias(table: Tensor, window: Window, image: Tensor | None, like: Tensor) -> Tensor:
    """[1, heads, N, N], or [windows, heads, N, N] with each sample's own mask folded in.

    Of four dimensions: on a CPU, SDPA takes several times as long with a mask of three.
    """
    bias = bias_of(table, window, window).to(like.dtype)
    if image is None:
        return bias[None]
    alone = torch.full_like(bias[0], float("-inf")).fill_diagonal_(0)
    masks = torch.where(image[:, None, None], alone, torch.zeros((), dtype=bias.dtype, device=bias.device))
    return (bias + masks[:, None]).repeat_interleave(len(like) // len(image), 0)


def _sdpa(kernel: SDPBackend | None = None) -> Attend:
    """With the kernel that PyTorch chooses, or with one of its kernels."""

    def attend(q: Tensor, k: Tensor, v: Tensor, window: Window, table: Tensor | None, image: Tensor | None) -> Tensor:
        bias = None if table is None else _bias(table, window, image, q)
        with nullcontext() if kernel is None else sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    return attend


def _gathered(window: Window, table: Tensor) -> Callable[..., Tensor]:
    """The bias of a pair of tokens, looked up in the table by their offset."""
    t, h, w = window

    def bias(head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        dt, dh, dw = i // (h * w) - j // (h * w), i // w % h - j // w % h, i % w - j % w
        return table[head, dt + t - 1, dh + h - 1, dw + w - 1]

    return bias


def _expanded(window: Window, table: Tensor) -> Callable[..., Tensor]:
    """The bias of a pair of tokens from all N x N of them, made once."""
    full = bias_of(table, window, window)
    return lambda head, i, j: full[head, i, j]


def _flex(compiled: Callable[..., Any], bias_by: Callable[[Window, Tensor], Callable[..., Tensor]]) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, window: Window, table: Tensor | None, image: Tensor | None) -> Tensor:
        if table is None:
            return compiled(q, k, v)
        windows = len(q) // len(image) if image is not None else 1
        bias = bias_by(window, table)

        def score(score: Tensor, b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            score = score + bias(head, i, j)
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
        bias_table: Tensor | None = None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        parts = (_partition(x, window) for x in (*_normed(q, k, q_norm, k_norm), v))
        return _merge(attend(*parts, window, bias_table, image), tuple(v.shape), window)

    return op


def _views(attend: Attend) -> Callable[..., Tensor]:
    """The op around ``attend`` where a window is a frame."""

    def op(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: Window,
        bias_table: Tensor | None = None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
    ) -> Tensor:
        parts = (_frames(x) for x in (*_normed(q, k, q_norm, k_norm), v))
        return attend(*parts, window, bias_table, None).transpose(1, 2).reshape(v.shape)

    return op


def _videos_only(attend: Attend) -> Callable[..., Tensor]:
    """What the careful user writes: attention on the samples that need it (here the first ones), v for the others."""

    def op(
        q: Tensor, k: Tensor, v: Tensor, window: Window, bias_table: Tensor, image: Tensor, **norms: Tensor
    ) -> Tensor:
        videos = int((~image).sum())
        some = (x[:videos] for x in (q, k, v))
        return torch.cat([_windowed(attend)(*some, window, bias_table, **norms), v[videos:]])

    return op


def baselines(inputs: dict[str, Any]) -> dict[str, Contender]:
    """Functions of the same keyword arguments as the op. On a GPU, each of PyTorch's attention kernels."""
    on_cpu = inputs["q"].device.type == "cpu"
    refused = "FlexAttention has no backward pass on a CPU" if on_cpu else ""
    layouts = {"partition": _windowed}
    if "image" in inputs:
        layouts["videos only, partition"] = _videos_only
    elif inputs["window"] == (1, *inputs["q"].shape[2:4]):
        layouts["views"] = _views
    found = {
        f"{layout} + SDPA{label}": Contender(wrap(_sdpa(kernel)))
        for label, kernel in (CPU_KERNELS if on_cpu else GPU_KERNELS).items()
        for layout, wrap in layouts.items()
    }
    biases = {"": _gathered, ", expanded bias": _expanded} if "bias_table" in inputs else {"": _gathered}
    if "bias_table" in inputs and not on_cpu:  # on an H200 it ran with none, and took a minute to find that out
        biases = {}
    for label, bias in biases.items():
        flex = _windowed(_flex(torch.compile(flex_attention, dynamic=False), bias))
        found[f"FlexAttention{label}"] = Contender(flex, compiled=True, forward_only=refused)
    return found


def attention(
    name: str,
    shape: tuple[int, ...],
    window: tuple[int, int, int],
    images: int = 0,
    quick: bool = True,
    table: bool = True,
    norm: bool = True,
) -> Case:
    """Packed q, k, v with or without a bias table and QK norm; ``shape`` is [B, T, H, W, heads, dim].

    The last ``images`` samples are stacks of images: they need no attention, and their FLOPs are not counted. They move
    v to out, the gradient of out to that of v, and zeros to those of q and k.
    """
    B, T, H, W, heads, dim = shape
    t, h, w = window

    def inputs(dtype: torch.dtype) -> Inputs:
        qkv = random(B, T, H, W, 3, heads, dim, dtype=dtype, grad=False)
        q, k, v = (x.requires_grad_() for x in qkv.unbind(4))
        made: Inputs = {"q": q, "k": k, "v": v, "window": window}
        if table:
            made["bias_table"] = random(heads, 2 * t - 1, 2 * h - 1, 2 * w - 1)
        if norm:
            made |= {"q_norm": random(dim), "k_norm": random(dim, seed=1)}
        if images:
            made["image"] = torch.arange(B) >= B - images
        return made

    per_sample, per_window = T * H * W, t * h * w
    width = heads * dim
    return Case(
        "window_attention",
        name,
        inputs,
        flops((B - images, *shape[1:]), window),
        (4.0 * (B - images) + 2.0 * images) * per_sample * width,
        1 + BACKWARD,
        3.0,
        per_window,
        lambda: attention(
            "small", (1 + bool(images), t, h, w, 2, dim), window, int(bool(images)), table=table, norm=norm
        ),
        quick,
    )


CASES = [
    attention("L spatial 1x16x16", (1, 5, 16, 16, 16, 64), (1, 16, 16)),
    attention("L spatiotemporal 5x8x8", (1, 5, 16, 16, 16, 64), (5, 8, 8)),
    attention("L 5x8x8, half the batch images", (2, 5, 16, 16, 16, 64), (5, 8, 8), images=1, quick=False),
    attention("XL spatial 1x16x16", (1, 5, 16, 16, 16, 72), (1, 16, 16), quick=False),
    attention("XL spatiotemporal 5x8x8", (1, 5, 16, 16, 16, 72), (5, 8, 8), quick=False),
    # Other models' windows: a table, no norm.
    attention("Swin-T, first stage, 1x7x7", (4, 1, 56, 56, 3, 32), (1, 7, 7), norm=False),
    attention("Swin-T, third stage, 1x7x7", (4, 1, 14, 14, 12, 32), (1, 7, 7), quick=False, norm=False),
    attention("Video Swin 8x7x7", (1, 8, 28, 28, 6, 32), (8, 7, 7), quick=False, norm=False),
    attention("SwinUNETR 7x7x7", (1, 14, 28, 28, 6, 32), (7, 7, 7), quick=False, norm=False),
]

# The most important ones first.
GPU_CASES = [
    attention("L spatiotemporal 5x8x8", (16, 5, 16, 16, 16, 64), (5, 8, 8)),
    attention("L spatial 1x16x16", (16, 5, 16, 16, 16, 64), (1, 16, 16)),
    attention("L 5x8x8, half the batch images", (16, 5, 16, 16, 16, 64), (5, 8, 8), images=8),
    attention("L 5x8x8, no table, no norm", (16, 5, 16, 16, 16, 64), (5, 8, 8), table=False, norm=False),
    attention("XL spatiotemporal 5x8x8", (16, 5, 16, 16, 16, 72), (5, 8, 8), quick=False),
    attention("XL spatial 1x16x16", (16, 5, 16, 16, 16, 72), (1, 16, 16), quick=False),
    attention("base-3B spatiotemporal 5x8x8, dim 88", (8, 5, 16, 16, 16, 88), (5, 8, 8), quick=False),
    attention("super-resolution 5x8x8, dim 128", (4, 5, 32, 32, 8, 128), (5, 8, 8), quick=False),
]

# A case and the same with one size doubled.
SCALING = [
    {
        "base": attention("scaling", (1, 5, 16, 16, 8, 64), (5, 8, 8)),
        "frames": attention("scaling", (1, 10, 16, 16, 8, 64), (5, 8, 8)),
        "channels": attention("scaling", (1, 5, 16, 16, 16, 64), (5, 8, 8)),
        "batch": attention("scaling", (2, 5, 16, 16, 8, 64), (5, 8, 8)),
    },
]

WINDOWS = ("L spati", "XL spati")  # spatial 1x16x16 and spatiotemporal 5x8x8: 256 and 320 tokens
HALF, WHOLE = "L 5x8x8, half", "L spatiotemporal"

TARGETS = [
    Target("window_attention", "forward", WINDOWS, 0.80, "floor", 2.0),
    Target("window_attention", "backward", WINDOWS, speedup=2.0, deterministic=True),
    Target("window_attention", "forward", (HALF,), half_of=WHOLE),
    Target("window_attention", "backward", (HALF,), half_of=WHOLE),
]
