"""Tiles of the Triton kernels of causal_conv3d by kernel, dtype and shape class, never by frames or pixels.

M and N are the rows and columns of a product and K is what is summed: pixels, output channels and channels forward;
pixels, channels and output channels for the data's gradient; output channels, channels and pixels for the weight's.
"""

from __future__ import annotations

import torch

from .._triton import Table, Tile

FEW = 16  # channels: with fewer, a block holds the channels of several taps


def precision(dtype: torch.dtype) -> str:
    return "float32" if dtype is torch.float32 else "16-bit"


def columns(count: int) -> str:
    return "few columns" if count <= 16 else "narrow" if count <= 64 else "wide"


def forward_key(dtype: torch.dtype, channels: int, out_channels: int) -> tuple[str, str, str]:
    return "forward", precision(dtype), "short sum" if channels < FEW else columns(out_channels)


def data_key(dtype: torch.dtype, out_channels: int, channels: int, edge: bool) -> tuple[str, str, str]:
    """``edge``: strips of few pixels."""
    if edge:
        return "data", precision(dtype), "edge"
    return "data", precision(dtype), "short sum" if out_channels < FEW else columns(channels)


def tile(m: int, n: int, k: int, warps: int, stages: int) -> Tile:
    return Tile({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, warps, stages)


_sums: Table = {
    ("16-bit", "wide"): {
        "any": tile(128, 128, 32, 8, 4),
        "sm_90": tile(128, 128, 64, 8, 3),
        "sm_100": tile(128, 128, 64, 8, 3),
        "gfx942": tile(128, 128, 32, 8, 2),
    },
    ("16-bit", "narrow"): {
        "any": tile(128, 64, 32, 4, 4),
        "sm_90": tile(128, 64, 64, 4, 4),
        "gfx942": tile(128, 64, 32, 4, 2),
    },
    ("16-bit", "few columns"): {"any": tile(128, 16, 64, 4, 4), "gfx942": tile(128, 16, 64, 4, 2)},
    ("float32", "wide"): {"any": tile(64, 64, 16, 8, 2)},
    ("float32", "narrow"): {"any": tile(64, 64, 16, 8, 2)},
    ("float32", "few columns"): {"any": tile(64, 16, 16, 4, 2)},
}
PIXELS: Table = {
    **{(kernel, *key): tiles for kernel in ("forward", "data") for key, tiles in _sums.items()},
    ("forward", "16-bit", "short sum"): {"any": tile(128, 64, 32, 4, 2)},
    ("forward", "float32", "short sum"): {"any": tile(64, 32, 16, 4, 2)},
    ("data", "16-bit", "short sum"): {"any": tile(128, 64, 16, 4, 2)},
    ("data", "float32", "short sum"): {"any": tile(64, 32, 16, 4, 2)},
    ("data", "16-bit", "edge"): {"any": tile(64, 64, 64, 4, 3), "gfx942": tile(64, 64, 32, 4, 2)},
    ("data", "float32", "edge"): {"any": tile(64, 32, 16, 4, 2)},
}


def weight_key(dtype: torch.dtype, channels: int, out_channels: int) -> tuple[str, str, str]:
    if channels < FEW:
        shape = "few channels"
    else:
        shape = "narrow" if min(channels, out_channels) <= 64 else "wide"
    return "weight", precision(dtype), shape


WEIGHT: Table = {
    ("weight", "16-bit", "wide"): {
        "any": tile(128, 128, 32, 8, 4),
        "sm_90": tile(128, 128, 64, 8, 3),
        "sm_100": tile(128, 128, 64, 8, 3),
        "gfx942": tile(128, 128, 32, 8, 2),
    },
    ("weight", "16-bit", "narrow"): {
        "any": tile(64, 64, 64, 4, 4),
        "gfx942": tile(64, 64, 32, 4, 2),
    },
    ("weight", "16-bit", "few channels"): {"any": tile(64, 64, 32, 4, 2)},
    ("weight", "float32", "wide"): {"any": tile(64, 64, 16, 8, 2)},
    ("weight", "float32", "narrow"): {"any": tile(64, 64, 16, 8, 2)},
    ("weight", "float32", "few channels"): {"any": tile(64, 32, 16, 4, 2)},
}
FINISH: Table = {
    ("finish",): {"any": Tile({"BLOCK": 256})},
    ("bias",): {"any": Tile({"BLOCK_N": 64, "BLOCK_K": 64})},
}


def patch_key(dtype: torch.dtype, out_channels: int) -> tuple[str, str, str]:
    return "patch", precision(dtype), columns(out_channels)


def patch(h: int, w: int, n: int, k: int, warps: int, stages: int) -> Tile:
    return Tile({"BLOCK_H": h, "BLOCK_W": w, "BLOCK_N": n, "BLOCK_K": k}, warps, stages)


# A row of a box is 128 bytes: what TMA swizzles at most.
PATCH: Table = {
    ("patch", "16-bit", "wide"): {"any": patch(8, 16, 128, 64, 8, 4)},
    ("patch", "16-bit", "narrow"): {"any": patch(8, 16, 64, 64, 4, 4)},
    ("patch", "16-bit", "few columns"): {"any": patch(8, 16, 16, 64, 4, 4)},
    ("patch", "float32", "wide"): {"any": patch(8, 8, 64, 16, 8, 2)},
    ("patch", "float32", "narrow"): {"any": patch(8, 8, 64, 16, 8, 2)},
    ("patch", "float32", "few columns"): {"any": patch(8, 8, 16, 16, 4, 2)},
}
