"""Tiles of the Triton kernels of video_norm: pixels of a frame times channels, ELEMENTS in all.

By the order in memory: "rows" of channels (channels_last_3d) or "planes" of pixels (contiguous).
"""

from __future__ import annotations

from .._triton import Table, Tile


def lanes(order: str) -> int:
    """Channels of a tile that holds a part of what statistics are taken over."""
    return 128 if order == "rows" else 16


def _elements(count: int, thread: int, stages: int = 1) -> Tile:
    """``thread``: elements of a thread, one to four of the widest loads of 16-bit numbers. ``stages``: of loops."""
    return Tile({"ELEMENTS": count}, warps=max(1, min(16, count // (32 * thread))), stages=stages)


PART: Table = {
    ("statistics", "rows"): {"any": _elements(2048, 16, 4)},
    ("statistics", "planes"): {"any": _elements(4096, 16, 3)},
    ("forward", "rows"): {"any": _elements(8192, 32)},
    ("forward", "planes"): {"any": _elements(4096, 32)},
    ("sums", "rows"): {"any": _elements(1024, 8, 4)},
    ("sums", "planes"): {"any": _elements(1024, 8, 4)},
    ("grad_x", "rows"): {"any": _elements(2048, 16, 4)},
    ("grad_x", "planes"): {"any": _elements(2048, 16, 4)},
}
# Tiles that hold all that a statistic is taken over; the backward pass has twice as much in registers.
WHOLE: Table = {
    **{("forward", 1 << i): {"any": _elements(1 << i, 32)} for i in range(10, 15)},
    **{("backward", 1 << i): {"any": _elements(1 << i, 16, 4 if i < 12 else 1)} for i in range(10, 14)},
}
SUMS: Table = {
    ("combine",): {"any": Tile({"BLOCK": 1024})},
    ("finish",): {"any": Tile({"LANES": 8}, stages=4)},
}
