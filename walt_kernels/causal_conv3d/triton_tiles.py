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
    if out_channels < FEW:
        return "data", precision(dtype), "short sum" if channels > 64 else "short sum, narrow"
    return "data", precision(dtype), columns(channels)


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
    ("forward", "16-bit", "short sum"): {"any": tile(128, 64, 32, 4, 2), "sm_90": tile(64, 128, 32, 4, 2)},
    ("forward", "float32", "short sum"): {"any": tile(64, 32, 16, 4, 2)},
    ("data", "16-bit", "short sum"): {"any": tile(128, 128, 32, 8, 2), "sm_90": tile(64, 128, 32, 4, 2)},
    ("data", "16-bit", "short sum, narrow"): {"any": tile(128, 64, 32, 4, 2)},
    ("data", "float32", "short sum"): {"any": tile(64, 32, 16, 4, 2)},
    ("data", "float32", "short sum, narrow"): {"any": tile(64, 32, 16, 4, 2)},
    ("data", "16-bit", "edge"): {"any": tile(64, 64, 64, 4, 3), "gfx942": tile(64, 64, 32, 4, 2)},
    ("data", "float32", "edge"): {"any": tile(64, 32, 16, 4, 2)},
}


def weight_key(dtype: torch.dtype, channels: int, out_channels: int) -> tuple[str, str, str]:
    if channels < FEW:
        shape = "few channels"
    elif out_channels < FEW:
        shape = "few out channels"
    else:
        shape = "narrow" if min(channels, out_channels) <= 64 else "wide"
    return "weight", precision(dtype), shape


WEIGHT: Table = {
    ("weight", "16-bit", "wide"): {
        "any": tile(128, 128, 32, 8, 4),
        "sm_90": tile(128, 128, 64, 4, 3),
        "sm_100": tile(128, 128, 64, 4, 3),
        "gfx942": tile(128, 128, 32, 8, 2),
    },
    ("weight", "16-bit", "narrow"): {
        "any": tile(64, 64, 64, 4, 4),
        "gfx942": tile(64, 64, 32, 4, 2),
    },
    ("weight", "16-bit", "few channels"): {"any": tile(64, 64, 32, 4, 2), "sm_90": tile(128, 32, 64, 4, 2)},
    ("weight", "16-bit", "few out channels"): {"any": tile(64, 64, 32, 4, 2), "sm_90": tile(32, 128, 64, 4, 3)},
    ("weight", "float32", "wide"): {"any": tile(64, 64, 16, 8, 2)},
    ("weight", "float32", "narrow"): {"any": tile(64, 64, 16, 8, 2)},
    ("weight", "float32", "few channels"): {"any": tile(64, 32, 16, 4, 2)},
    ("weight", "float32", "few out channels"): {"any": tile(64, 32, 16, 4, 2)},
}
FINISH: Table = {
    ("bias",): {"any": Tile({"BLOCK_N": 64, "BLOCK_K": 64}), "sm_90": Tile({"BLOCK_N": 64, "BLOCK_K": 256}, 8)},
    ("sum",): {"any": Tile({"BLOCK": 1024})},
    ("transposed",): {"any": Tile({"BLOCK_P": 64, "BLOCK_C": 64})},
}


def order_tile(parts: int, taps: int, out_channels: int, channels: int) -> Tile:
    """For one out channel's taps and some of its channels, of several parts at a time where there are many."""
    block_t = 1 << (taps - 1).bit_length()
    block_c = min(max(16, 1 << (channels - 1).bit_length()), max(16, 2048 // block_t), 256)
    if parts <= 8:
        return Tile({"BLOCK_P": 1, "BLOCK_T": block_t, "BLOCK_C": block_c})
    if taps > 1:  # more programs, which read more parts at a time
        block_c = min(block_c, 16 if out_channels < FEW else 32)
    block_p = max(1, min(32, 4096 // (block_t * block_c)))
    return Tile({"BLOCK_P": block_p, "BLOCK_T": block_t, "BLOCK_C": block_c})


def patch_key(dtype: torch.dtype, out_channels: int, many: bool) -> tuple[str, str, str]:
    """``many``: as ``triton_patch.many`` counts tiles."""
    if dtype is torch.float32:
        return "patch", "float32", "any size"
    return "patch", "16-bit", "narrow" if out_channels <= 64 else "wide" if many else "wide, few tiles"


def patch(h: int, w: int, n: int, k: int, warps: int, stages: int) -> Tile:
    return Tile({"BLOCK_H": h, "BLOCK_W": w, "BLOCK_N": n, "BLOCK_K": k}, warps, stages)


# A row of a box is 128 bytes: what TMA swizzles at most.
PATCH: Table = {
    ("patch", "16-bit", "wide"): {"any": patch(16, 16, 128, 64, 8, 4)},
    ("patch", "16-bit", "wide, few tiles"): {"any": patch(8, 16, 128, 64, 4, 3)},  # a processor holds two programs
    ("patch", "16-bit", "narrow"): {"any": patch(16, 16, 64, 64, 4, 3)},
    ("patch", "float32", "any size"): {"any": patch(8, 8, 64, 16, 8, 2)},
}


def weight_patch_key(dtype: torch.dtype, out_channels: int, channels: int, width: int) -> tuple[str, str]:
    """``width``: the kernel's. If it is even, two taps share a step of the sum."""
    if dtype is torch.float32:
        return "weight patch, float32", "any size"
    if min(channels, out_channels) <= 64:
        shape = "narrow"
    elif channels > 128:
        shape = "wide"
    else:
        shape = "128 channels, 2 taps" if width % 2 == 0 else "128 channels"
    return "weight patch, 16-bit", shape


def weight_patch(m: int, n: int, k: int, taps: int, warps: int, stages: int) -> Tile:
    """Tiles that are compared with one another (the same first key) take as many pixels, which have to fill a frame."""
    return Tile({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "TAPS": taps}, warps, stages)


WEIGHT_PATCH: Table = {
    ("weight patch, 16-bit", "wide"): {"any": weight_patch(128, 256, 64, 1, 8, 3)},
    ("weight patch, 16-bit", "128 channels"): {"any": weight_patch(128, 128, 64, 1, 4, 3)},  # two programs a processor
    ("weight patch, 16-bit", "128 channels, 2 taps"): {"any": weight_patch(128, 128, 64, 2, 8, 3)},
    ("weight patch, 16-bit", "narrow"): {"any": weight_patch(64, 64, 64, 1, 4, 4)},
    ("weight patch, float32", "any size"): {"any": weight_patch(64, 64, 16, 1, 8, 2)},
}
