"""Calls that reach every Triton kernel of video_norm and every entry of its tile tables, for ``_aot``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .._aot import Call

SPILLS = {"video_norm_statistics_kernel": 16}

# batch, channels, frames, rows and columns, options; x is channels_last_3d unless the name says otherwise.
FRAME: dict[str, Any] = {"groups": 32, "activation": "silu", "modulated": True}
CLIP: dict[str, Any] = {"over": "clip", "groups": 32, "activation": "silu"}
PIXEL: dict[str, Any] = {"over": "pixel", "center": False, "eps": 1e-24, "activation": "silu", "bias": False}
CASES: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    "frame 128": (2, 128, 17, 128, FRAME),
    "frame 256": (2, 256, 9, 32, FRAME),
    "frame 512": (2, 512, 5, 16, FRAME),
    "frame 512, few pixels": (2, 512, 5, 8, FRAME),
    "frame 128, contiguous": (2, 128, 17, 128, FRAME),
    "frame 512, contiguous": (2, 512, 5, 16, FRAME),
    "frame 512, one frame": (1, 512, 1, 16, FRAME),
    "frame 96, one group": (2, 96, 5, 64, FRAME | {"groups": 1}),
    "frame 100, 90 rows": (2, 100, 8, 90, FRAME | {"groups": 4}),
    "frame 100, 90 rows, contiguous": (2, 100, 8, 90, FRAME | {"groups": 4}),
    "clip 128": (1, 128, 20, 256, CLIP),  # HunyuanVideo
    "clip 128, contiguous": (1, 128, 20, 256, CLIP),
    "clip 256, contiguous": (2, 256, 4, 60, CLIP | {"modulated": True}),  # CogVideoX
    "pixel 96": (1, 96, 5, 64, PIXEL),  # Wan
    "pixel 192": (1, 192, 5, 64, PIXEL),
    "pixel 384": (1, 384, 5, 64, PIXEL),
    "pixel 96, contiguous": (1, 96, 5, 64, PIXEL),
    "pixel 192, contiguous": (1, 192, 5, 64, PIXEL),
    "pixel 384, contiguous": (1, 384, 5, 64, PIXEL),
    "pixel 128, centred, contiguous": (1, 128, 5, 64, {"over": "pixel", "modulated": True}),
    "pixel 4096": (1, 4096, 2, 16, PIXEL),
}

# In float16 in place of bfloat16: they share code and tiles.
IN_FLOAT16 = ("frame 256", "frame 512, few pixels", "clip 128, contiguous", "pixel 192", "pixel 384, contiguous")
# Not in float32: other cases have their tiles there.
NOT_IN_FLOAT32 = ("frame 512", "frame 512, contiguous", "pixel 96")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _inputs(case: str, dtype: torch.dtype) -> dict[str, Any]:
    B, C, T, size, given = CASES[case]
    options = dict(given)
    modulated, biased = options.pop("modulated", False), options.pop("bias", True)
    format = torch.contiguous_format if "contiguous" in case else torch.channels_last_3d

    def rows(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = torch.empty((B, C, T, size, size), dtype=dtype, memory_format=format, device="meta")
    modulation = {"scale": rows(B, C), "shift": rows(B, C, T)} if modulated else {}
    return {"x": x, "weight": rows(C), "bias": rows(C) if biased else None, **modulation, **options}


def aot_calls() -> Iterator[Call]:
    for case in CASES:
        for name in ("fp16" if case in IN_FLOAT16 else "bf16", *(() if case in NOT_IN_FLOAT32 else ("fp32",))):
            yield Call(f"{case}, {name}", "video_norm", _inputs(case, DTYPES[name]))
