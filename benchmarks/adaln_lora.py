"""The adaln ops: their cases, and what users run today, layer_norm and elementwise operations; linears one by one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from walt_kernels.adaln_lora.op import BACKWARD, lora_flops
from walt_kernels.testing import random

from .case import Case, Inputs, Target
from .contender import Contender


def baselines(inputs: dict[str, Any]) -> dict[str, Contender]:
    """Functions of the same keyword arguments as the op."""

    def linears(cond: Tensor, base: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return torch.stack([base + F.linear(F.linear(cond, d), u) for d, u in zip(down, up, strict=True)])

    def elementwise(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x = x + gate[:, None] * branch
        return x, F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    if "down" in inputs:
        return {"linears": Contender(linears)}
    return {"layer_norm + elementwise": Contender(elementwise)}


def modulation(name: str, B: int, N: int, D: int, quick: bool = True) -> Case:
    """residual + gate + LayerNorm + scale and shift between two sub-blocks, from a chunked 6 D table."""

    def inputs(dtype: torch.dtype) -> Inputs:
        gate, shift, scale = (c.requires_grad_() for c in random(B, 6 * D, dtype=dtype, grad=False).chunk(6, 1)[2:5])
        x, branch = (random(B, N, D, dtype=dtype, seed=s) for s in (0, 1))
        return {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale}

    def small() -> Case:
        return modulation("small", B, -(-N // 8), D)

    # Forward reads x and branch and writes x_new and h; backward reads four tensors and writes two.
    return Case(
        "adaln_residual_modulate",
        name,
        inputs,
        10.0 * B * N * D,
        4.0 * B * N * D,
        3.0,
        2.5,
        D,
        small,
        quick,
        fused=True,
    )


def lora(name: str, B: int, D: int, layers: int, rank: int, quick: bool = True) -> Case:
    """The modulation of all layers at once."""
    K = 6 * D

    def inputs(dtype: torch.dtype) -> Inputs:
        down, up = random(layers, rank, D, dtype=dtype, scale=D**-0.5), random(layers, K, rank, dtype=dtype)
        return {"cond": random(B, D, dtype=dtype), "base": random(B, K, dtype=dtype), "down": down, "up": up}

    def small() -> Case:
        return lora("small", B, D, -(-layers // 8), rank)

    flops = lora_flops((B, D), (B, K), (layers, rank, D))
    moved = layers * rank * (D + K) + layers * B * K
    return Case("adaln_lora", name, inputs, flops, moved, 1 + BACKWARD, 3.0, D, small, quick)


CASES = [
    modulation("L block, 2 x 1280 x 1024", 2, 1280, 1024),
    modulation("XL block, 2 x 1280 x 1152", 2, 1280, 1152, quick=False),
    lora("24 layers, rank 2", 4, 1024, 24, 2),
    lora("24 layers, rank 256", 4, 1024, 24, 256, quick=False),
]

# The most important ones first.
GPU_CASES = [
    modulation("L block, 16 x 1280 x 1024", 16, 1280, 1024),
    lora("24 layers, rank 2", 16, 1024, 24, 2, quick=False),
    modulation("XL block, 16 x 1280 x 1152", 16, 1280, 1152, quick=False),
    lora("24 layers, rank 256", 16, 1024, 24, 256, quick=False),
]

# A case and the same with one size doubled.
SCALING = [
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

BLOCKS = ("L block", "XL block")  # at least 16k tokens

TARGETS = [
    Target("adaln_residual_modulate", "forward", BLOCKS, 0.90, "copy", 1.2, "compiled"),
    Target("adaln_residual_modulate", "backward", BLOCKS, 0.80, "copy", 1.3, "compiled"),
]
