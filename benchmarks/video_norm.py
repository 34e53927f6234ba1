"""Norms of video autoencoders: their cases, and what users run today, a norm and a SiLU, frame by frame or at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from walt_kernels.testing import random

from .case import Case, Inputs, Target
from .contender import Contender

ON_CHIP = 2**17  # values of a frame that one multiprocessor of a GPU, or a core's second cache, can hold: read once
PIXEL: dict[str, Any] = {"over": "pixel", "center": False}  # Wan's norm


def _modulated(
    y: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    """scale and shift: [B, C, T]"""
    if scale is not None and shift is not None:
        y = y * (1 + scale[..., None, None]) + shift[..., None, None]
    return F.silu(y) if activation else y


def of_frames(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, **rest: Any) -> Tensor:
    """Frames as a batch of images."""
    y = F.group_norm(x.transpose(1, 2).flatten(0, 1), groups, weight, bias, eps)
    return _modulated(y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2), **rest)


def of_clip(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, **rest: Any) -> Tensor:
    return _modulated(F.group_norm(x, groups, weight, bias, eps), **rest)


def of_pixel(x: Tensor, weight: Tensor, **rest: Any) -> Tensor:
    """As Wan's autoencoder computes it, in 16 bits by way of float32."""
    y = F.normalize(x.float(), dim=1).to(x.dtype) * x.shape[1] ** 0.5 * weight[:, None, None, None]
    return _modulated(y, **rest)


def frame_by_frame(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One call of ``norm`` for each frame, whose activations then stay in the cache."""

    def looped(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, **rest: Any) -> Tensor:
        def row(rows: Tensor | None, t: int) -> Tensor | None:
            return None if rows is None else rows[:, :, t : t + 1]

        frames = range(x.shape[2])
        parts = [norm(x[:, :, t : t + 1], scale=row(scale, t), shift=row(shift, t), **rest) for t in frames]
        return torch.cat(parts, 2)

    return looped


def to_format(memory_format: torch.memory_format) -> Callable[[Inputs], Inputs]:
    """A model in that format has x in it: its copy is not timed."""

    def prepared(inputs: Inputs) -> Inputs:
        x = inputs["x"].detach().contiguous(memory_format=memory_format)
        return {**inputs, "x": x.requires_grad_(inputs["x"].requires_grad)}

    return prepared


def baselines(inputs: dict[str, Any]) -> dict[str, Contender]:
    """Functions of the same keyword arguments as the op, each in both memory formats."""
    norm = {"frame": of_frames, "clip": of_clip, "pixel": of_pixel}[inputs["over"]]
    name = "normalize + silu" if norm is of_pixel else "group_norm + silu"
    ways = {name: norm} if norm is of_clip else {name: norm, f"{name}, frame by frame": frame_by_frame(norm)}
    formats = {"NDHWC": torch.channels_last_3d, "NCDHW": torch.contiguous_format}
    found = {
        f"{way} {label}": Contender(function, prepared=to_format(memory_format))
        for way, function in ways.items()
        for label, memory_format in formats.items()
    }
    compiled = {
        f"compiled {name} {label}": Contender(
            torch.compile(norm, dynamic=False), compiled=True, like=f"{name} {label}", prepared=to_format(memory_format)
        )
        for label, memory_format in formats.items()
    }
    return found | compiled


def norm(
    name: str,
    shape: tuple[int, ...],
    over: str = "frame",
    groups: int = 32,
    center: bool = True,
    adaptive: bool = False,
    memory_format: torch.memory_format = torch.channels_last_3d,
    quick: bool = True,
    fused: bool = False,
) -> Case:
    """``shape`` is x's, [B, C, T, H, W]. With weight, bias and SiLU; an ``adaptive`` one has scale and shift instead.

    The bytes of the floor: where statistics are of a pixel, or a frame fits on chip, forward reads x and writes y, and
    backward reads x and y's gradient and writes x's. Elsewhere both read everything a second time.
    """
    B, C, T, H, W = shape
    groups = 1 if over == "pixel" else groups
    options = {"over": over, "groups": groups, "center": center, "eps": 1e-24 / C if over == "pixel" else 1e-6}

    def inputs(dtype: torch.dtype) -> Inputs:
        x = random(*shape, dtype=dtype, grad=False).to(memory_format=memory_format).requires_grad_()
        weight, bias = (random(C, dtype=dtype, seed=seed) for seed in (0, 1))
        rows: Inputs = {"weight": weight, "bias": bias if center else None, "scale": None, "shift": None}
        if adaptive:
            scale, shift = random(B, 2 * C, T, dtype=dtype, scale=0.1, grad=False).chunk(2, 1)
            rows = {"weight": None, "bias": None, "scale": scale.requires_grad_(), "shift": shift.requires_grad_()}
        return {"x": x, **rows, **options, "activation": None if adaptive else "silu"}

    def small() -> Case:
        return norm("small", (1, C, min(T, 2), 8, 8), over, groups, center, adaptive, memory_format, fused=fused)

    elements = math.prod(shape)
    once = over == "pixel" or (over == "frame" and C * H * W <= ON_CHIP)
    forward, backward = (2.0, 3.0) if once else (3.0, 5.0)
    terms = C if over == "pixel" else C // groups * H * W * (T if over == "clip" else 1)
    return Case(
        "video_norm",
        name,
        inputs,
        10.0 * elements,
        forward * elements,
        3.0,
        1 + backward / forward,
        terms,
        small,
        quick,
        fused,
    )


NCDHW = torch.contiguous_format

CASES = [
    # The four levels of our L tokenizer.
    norm("L C 128, 17x128x128", (1, 128, 17, 128, 128), quick=False),
    norm("L C 256, 17x64x64", (1, 256, 17, 64, 64), quick=False),
    norm("L C 256, 9x32x32", (1, 256, 9, 32, 32)),
    norm("L C 512, 5x16x16", (1, 512, 5, 16, 16)),
    norm("L adaptive C 256, 9x32x32", (1, 256, 9, 32, 32), adaptive=True),
    # Wan 2.1's decoder of four frames of 256x256; diffusers leaves it in NCDHW.
    norm("Wan C 384, 4x64x64", (1, 384, 4, 64, 64), **PIXEL),
    norm("Wan C 192, 4x128x128", (1, 192, 4, 128, 128), **PIXEL, quick=False),
    norm("Wan C 96, 4x256x256", (1, 96, 4, 256, 256), **PIXEL, quick=False),
    norm("Wan C 384, 4x64x64, NCDHW", (1, 384, 4, 64, 64), **PIXEL, memory_format=NCDHW, quick=False),
    norm("Wan C 96, 4x256x256, NCDHW", (1, 96, 4, 256, 256), **PIXEL, memory_format=NCDHW, quick=False),
    # HunyuanVideo's decoder, cut down, and CogVideoX's encoder. The norm of CogVideoX's decoder is another one: its
    # scale and shift are of each pixel.
    norm("HunyuanVideo C 128, 5x128x128", (1, 128, 5, 128, 128), "clip", quick=False),
    norm("HunyuanVideo C 128, 5x128x128, NCDHW", (1, 128, 5, 128, 128), "clip", memory_format=NCDHW, quick=False),
    norm("CogVideoX C 256, 5x32x32", (1, 256, 5, 32, 32), "clip", memory_format=NCDHW),
]

# The most important ones first.
GPU_CASES = [
    norm("L C 128, 17x128x128", (1, 128, 17, 128, 128), fused=True),
    norm("HunyuanVideo C 128, 20x256x256", (1, 128, 20, 256, 256), "clip", memory_format=NCDHW, fused=True),
    norm("Wan C 96, 4x256x256", (1, 96, 4, 256, 256), **PIXEL, fused=True),
    norm("L C 512, 4 x 5x16x16", (4, 512, 5, 16, 16), quick=False),
    norm("L adaptive C 256, 17x64x64", (1, 256, 17, 64, 64), adaptive=True, quick=False),
    norm("Wan C 384, 4x64x64", (1, 384, 4, 64, 64), **PIXEL, quick=False),
    norm("CogVideoX C 256, 9x128x128", (1, 256, 9, 128, 128), "clip", memory_format=NCDHW, quick=False),
    norm("L C 256, 17x64x64", (1, 256, 17, 64, 64), quick=False),
]

# A case and the same with one size doubled.
SCALING = [
    {
        "base": norm("scaling", (1, 128, 4, 32, 32), **kind),
        "frames": norm("scaling", (1, 128, 8, 32, 32), **kind),
        "channels": norm("scaling", (1, 256, 4, 32, 32), **kind),
        "batch": norm("scaling", (2, 128, 4, 32, 32), **kind),
    }
    for kind in ({}, PIXEL)
]

ALL = ("L", "Wan", "HunyuanVideo", "CogVideoX")

TARGETS = [
    Target("video_norm", "forward", ALL, 0.85, "copy"),
    Target("video_norm", "backward", ALL, 0.70, "copy"),
]
