"""The shapes of the model (paper sections 2 and 3 of the appendix tables), not powers of two.

FLOPs count a multiply-add as two, of the direct algorithm. Bytes are the least a perfect kernel moves: inputs read
once, outputs written once. ``CASES`` keep two CPU cores busy; ``GPU_CASES`` are a GPU's share of a training batch, the
most important ones first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from walt_kernels.adaln_lora import op as adaln
from walt_kernels.causal_conv3d import op as conv
from walt_kernels.testing import random
from walt_kernels.window_attention import op as window_attention

Inputs = dict[str, Any]
MODES = ("forward", "forward+backward")
GPU_MODES = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One shape of one op. ``flops`` and ``elements`` (values moved) are for the forward pass; the factors give
    forward + backward.
    """

    op: str
    name: str
    inputs: Callable[[torch.dtype], Inputs]
    flops: float
    elements: float
    flops_factor: float
    elements_factor: float
    terms: int  # of the longest sum: its rounding in float32 grows with their square root
    small: Callable[[], Case]  # the same kind, cut down: what the preflight calls
    quick: bool = True
    modes: tuple[str, ...] = MODES

    def work(self, mode: str, dtype: torch.dtype) -> tuple[float, float]:
        """FLOPs and bytes of one call."""
        times = {"forward": (1.0, 1.0), "backward": (self.flops_factor - 1, self.elements_factor - 1)}
        flops, elements = times.get(mode, (self.flops_factor, self.elements_factor))
        return self.flops * flops, self.elements * elements * dtype.itemsize


def attention(
    name: str,
    shape: tuple[int, ...],
    window: tuple[int, int, int],
    images: int = 0,
    quick: bool = True,
    plain: bool = False,
) -> Case:
    """Packed q, k, v with a bias table and QK norm, or without both; ``shape`` is [B, T, H, W, heads, dim].

    The last ``images`` samples are stacks of images: they need no attention, and their FLOPs are not counted. They move
    v to out, the gradient of out to that of v, and zeros to those of q and k.
    """
    B, T, H, W, heads, dim = shape
    t, h, w = window

    def inputs(dtype: torch.dtype) -> Inputs:
        qkv = random(B, T, H, W, 3, heads, dim, dtype=dtype, grad=False)
        q, k, v = (x.requires_grad_() for x in qkv.unbind(4))
        if plain:
            return {"q": q, "k": k, "v": v, "window": window}
        table = random(heads, 2 * t - 1, 2 * h - 1, 2 * w - 1)
        norms = {"q_norm": random(dim), "k_norm": random(dim, seed=1)}
        flags = {"image": torch.arange(B) >= B - images} if images else {}
        return {"q": q, "k": k, "v": v, "window": window, "bias_table": table, **norms, **flags}

    per_sample, per_window = T * H * W, t * h * w
    width = heads * dim
    return Case(
        "window_attention",
        name,
        inputs,
        window_attention.flops((B - images, *shape[1:]), window),
        (4.0 * (B - images) + 2.0 * images) * per_sample * width,
        1 + window_attention.BACKWARD,
        3.0,
        per_window,
        lambda: attention("small", (1 + bool(images), t, h, w, 2, dim), window, int(bool(images)), plain=plain),
        quick,
    )


def convolution(
    name: str,
    shape: tuple[int, ...],
    out_channels: int,
    kernel: tuple[int, int, int] = (3, 3, 3),
    stride: tuple[int, int, int] = (1, 1, 1),
    quick: bool = True,
) -> Case:
    """channels_last_3d, zero padding; ``shape`` is [B, C, T, H, W]."""
    B, C, T, H, W = shape

    def inputs(dtype: torch.dtype) -> Inputs:
        x = random(*shape, dtype=dtype, grad=False).to(memory_format=torch.channels_last_3d).requires_grad_()
        weight = random(out_channels, C, *kernel, dtype=dtype, scale=(C * kernel[0] * kernel[1] * kernel[2]) ** -0.5)
        return {"x": x, "weight": weight, "bias": random(out_channels, dtype=dtype), "stride": stride}

    y = (B, out_channels, *(-(-size // s) for size, s in zip(shape[2:], stride, strict=True)))
    taps = kernel[0] * kernel[1] * kernel[2]
    moved = B * C * T * H * W + taps * C * out_channels + math.prod(y)
    return Case(
        "causal_conv3d",
        name,
        inputs,
        conv.flops(y, (out_channels, C, *kernel)),
        moved,
        1 + conv.BACKWARD,
        3.0,
        taps * C,
        lambda: convolution("small", (1, min(C, 64), min(T, 2), 8, 8), min(out_channels, 64), kernel, stride),
        quick,
    )


def modulation(name: str, B: int, N: int, D: int, quick: bool = True) -> Case:
    """residual + gate + LayerNorm + scale and shift between two sub-blocks, from a chunked 6 D table."""

    def inputs(dtype: torch.dtype) -> Inputs:
        gate, shift, scale = (c.requires_grad_() for c in random(B, 6 * D, dtype=dtype, grad=False).chunk(6, 1)[2:5])
        x, branch = (random(B, N, D, dtype=dtype, seed=s) for s in (0, 1))
        return {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale}

    def small() -> Case:
        return modulation("small", B, -(-N // 8), D)

    # Forward reads x and branch and writes x_new and h; backward reads four tensors and writes two.
    return Case("adaln_residual_modulate", name, inputs, 10.0 * B * N * D, 4.0 * B * N * D, 3.0, 2.5, D, small, quick)


def lora(name: str, B: int, D: int, layers: int, rank: int, quick: bool = True) -> Case:
    """The modulation of all layers at once."""
    K = 6 * D

    def inputs(dtype: torch.dtype) -> Inputs:
        down, up = random(layers, rank, D, dtype=dtype, scale=D**-0.5), random(layers, K, rank, dtype=dtype)
        return {"cond": random(B, D, dtype=dtype), "base": random(B, K, dtype=dtype), "down": down, "up": up}

    def small() -> Case:
        return lora("small", B, D, -(-layers // 8), rank)

    flops = adaln.lora_flops((B, D), (B, K), (layers, rank, D))
    moved = layers * rank * (D + K) + layers * B * K
    return Case("adaln_lora", name, inputs, flops, moved, 1 + adaln.BACKWARD, 3.0, D, small, quick)


def training(name: str, batch: int, frames: int, size: int, quick: bool = True) -> Case:
    """A whole step of walt's tiny preset: forward, loss, backward, clipping, AdamW. ``training_step.py`` builds it.

    Its FLOPs are counted there, and its bytes are nobody's bound; ``flops`` only weighs it against its small version.
    """
    pixels = batch * frames * size * size
    inputs = {"stage": name, "batch": batch, "frames": frames, "size": size}

    def small() -> Case:
        return training(name, -(-batch // 4), frames, size if batch > 1 else size // 2)

    return Case("training_step", name, lambda _: inputs, pixels, 0.0, 1.0, 1.0, pixels, small, quick, ("step",))


CASES = [
    attention("L spatial 1x16x16", (1, 5, 16, 16, 16, 64), (1, 16, 16)),
    attention("L spatiotemporal 5x8x8", (1, 5, 16, 16, 16, 64), (5, 8, 8)),
    attention("L 5x8x8, half the batch images", (2, 5, 16, 16, 16, 64), (5, 8, 8), images=1, quick=False),
    attention("XL spatial 1x16x16", (1, 5, 16, 16, 16, 72), (1, 16, 16), quick=False),
    attention("XL spatiotemporal 5x8x8", (1, 5, 16, 16, 16, 72), (5, 8, 8), quick=False),
    convolution("C 64, 17x64x64", (1, 64, 17, 64, 64), 64),
    convolution("C 128, 17x32x32", (1, 128, 17, 32, 32), 128),
    convolution("C 256, 9x16x16", (1, 256, 9, 16, 16), 256),
    convolution("C 512, 5x16x16", (1, 512, 5, 16, 16), 512, quick=False),
    convolution("stem 3 to 128, 17x64x64", (1, 3, 17, 64, 64), 128, quick=False),
    convolution("head 128 to 3, 17x64x64", (1, 128, 17, 64, 64), 3, quick=False),
    convolution("down 128, 17x32x32", (1, 128, 17, 32, 32), 128, (4, 4, 4), (2, 2, 2), quick=False),
    convolution("1x1x1 128 to 256, 17x32x32", (1, 128, 17, 32, 32), 256, (1, 1, 1), quick=False),
    modulation("L block, 2 x 1280 x 1024", 2, 1280, 1024),
    modulation("XL block, 2 x 1280 x 1152", 2, 1280, 1152, quick=False),
    lora("24 layers, rank 2", 4, 1024, 24, 2),
    lora("24 layers, rank 256", 4, 1024, 24, 256, quick=False),
    training("tokenizer tiny", 1, 5, 64),
    training("base tiny", 16, 5, 8),
]

GPU_CASES = [
    modulation("L block, 16 x 1280 x 1024", 16, 1280, 1024),
    attention("L spatiotemporal 5x8x8", (16, 5, 16, 16, 16, 64), (5, 8, 8)),
    convolution("C 128, 17x128x128", (1, 128, 17, 128, 128), 128),
    attention("L spatial 1x16x16", (16, 5, 16, 16, 16, 64), (1, 16, 16)),
    attention("L 5x8x8, half the batch images", (16, 5, 16, 16, 16, 64), (5, 8, 8), images=8),
    convolution("C 256, 17x64x64", (1, 256, 17, 64, 64), 256),
    attention("L 5x8x8, no table, no norm", (16, 5, 16, 16, 16, 64), (5, 8, 8), plain=True),
    convolution("C 512, 4 x 5x16x16", (4, 512, 5, 16, 16), 512),
    attention("XL spatiotemporal 5x8x8", (16, 5, 16, 16, 16, 72), (5, 8, 8), quick=False),
    lora("24 layers, rank 2", 16, 1024, 24, 2, quick=False),
    modulation("XL block, 16 x 1280 x 1152", 16, 1280, 1152, quick=False),
    attention("XL spatial 1x16x16", (16, 5, 16, 16, 16, 72), (1, 16, 16), quick=False),
    lora("24 layers, rank 256", 16, 1024, 24, 256, quick=False),
    convolution("stem 3 to 128, 17x128x128", (1, 3, 17, 128, 128), 128, quick=False),
    convolution("head 128 to 3, 17x128x128", (1, 128, 17, 128, 128), 3, quick=False),
    convolution("down 128, 17x64x64", (1, 128, 17, 64, 64), 128, (4, 4, 4), (2, 2, 2), quick=False),
    attention("base-3B spatiotemporal 5x8x8, dim 88", (8, 5, 16, 16, 16, 88), (5, 8, 8), quick=False),
    attention("super-resolution 5x8x8, dim 128", (4, 5, 32, 32, 8, 128), (5, 8, 8), quick=False),
]
GPU_CASES = [dataclasses.replace(case, modes=GPU_MODES) for case in GPU_CASES]

# A case and the same with one size doubled: cost must grow in step with the work. The first is what the others double.
SCALING = [
    {
        "base": attention("scaling", (1, 5, 16, 16, 8, 64), (5, 8, 8)),
        "frames": attention("scaling", (1, 10, 16, 16, 8, 64), (5, 8, 8)),
        "channels": attention("scaling", (1, 5, 16, 16, 16, 64), (5, 8, 8)),
        "batch": attention("scaling", (2, 5, 16, 16, 8, 64), (5, 8, 8)),
    },
    {
        "base": convolution("scaling", (1, 64, 8, 32, 32), 64),
        "frames": convolution("scaling", (1, 64, 16, 32, 32), 64),
        "channels": convolution("scaling", (1, 128, 8, 32, 32), 128),
        "batch": convolution("scaling", (2, 64, 8, 32, 32), 64),
    },
    {
        "base": modulation("scaling", 2, 1280, 1024),
        "frames": modulation("scaling", 2, 2560, 1024),
        "channels": modulation("scaling", 2, 1280, 2048),
        "batch": modulation("scaling", 4, 1280, 1024),
    },
    {
        "base": lora("scaling", 4, 512, 24, 64),
        "channels": lora("scaling", 4, 1024, 24, 64),
        "batch": lora("scaling", 8, 512, 24, 64),
        "layers": lora("scaling", 4, 512, 48, 64),
    },
]


def chosen(op: str | None, name: str | None, quick: bool, device: str = "cpu") -> list[Case]:
    """The cases that the command line asks for."""
    cases = CASES if device == "cpu" else GPU_CASES
    return [case for case in cases if op in (None, case.op) and (name or "") in case.name and (case.quick or not quick)]
