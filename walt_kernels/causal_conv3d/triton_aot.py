"""Calls that reach every Triton kernel of causal_conv3d and every entry of its tile tables, for ``_aot``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .._aot import Call

# Bytes of stack that the assembler takes although registers are left.
SPILLS = {"conv_data_kernel": 16, "conv_order_kernel": 24}

# channels, output channels, rows and columns, options; x is channels_last_3d unless the name says otherwise.
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "128 to 128": (128, 128, 64, {}),
    "64 to 64": (64, 64, 64, {}),
    "stem": (3, 64, 128, {"time_padding": "first_frame"}),
    "head": (128, 3, 128, {}),
    "head, history": (128, 3, 64, {"history": True, "space_padding": "replicate"}),
    "8 to 3": (8, 3, 64, {}),
    "256 to 256": (256, 256, 128, {}),  # tiles enough for the large ones
    "512 to 512": (512, 512, 16, {"time_padding": "first_frame"}),
    "128 to 128, first frame": (128, 128, 64, {"time_padding": "first_frame"}),
    "128 to 128, history": (128, 128, 64, {"history": True}),
    "128 to 128, reflect": (128, 128, 64, {"space_padding": "reflect"}),
    "128 to 128, replicate, history": (128, 128, 64, {"space_padding": "replicate", "history": True}),
    "128 to 256, stride": (128, 256, 64, {"stride": 2, "time_padding": "first_frame"}),
    "128 to 128, stride, contiguous": (128, 128, 64, {"kernel": 4, "stride": 2}),
    "128 to 128, contiguous": (128, 128, 64, {}),
    "stem, contiguous": (3, 64, 128, {}),
    "depthwise": (256, 256, 32, {"groups": 256}),
    "128 to 128, one by one": (128, 128, 64, {"kernel": 1}),
    "8 to 512, one by one": (8, 512, 16, {"kernel": 1}),
    "128 to 128, replicate": (128, 128, 64, {"space_padding": "replicate"}),
    "128 to 16, reflect": (128, 16, 64, {"space_padding": "reflect"}),
    "128 to 16": (128, 16, 64, {}),
    "64 to 64, history": (64, 64, 64, {"history": True}),
    "128 to 128, over 2^31": (128, 128, 2048, {}),
}
# In float16 in place of bfloat16: they share code and tiles.
IN_FLOAT16 = (
    *("head", "8 to 3", "64 to 64, history", "128 to 16"),
    *("128 to 128, contiguous", "128 to 128, replicate"),
)
# In float32 too.
IN_FLOAT32 = (
    *("128 to 128", "256 to 256", "stem", "head", "8 to 3"),
    *("64 to 64, history", "128 to 128, contiguous", "128 to 128, replicate"),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _inputs(case: str, dtype: torch.dtype) -> dict[str, Any]:
    channels, out_channels, size, options = CASES[case]
    options = dict(options)
    kernel, groups = options.pop("kernel", 3), options.get("groups", 1)
    format = torch.contiguous_format if "contiguous" in case else torch.channels_last_3d

    def frames(number: int) -> torch.Tensor:
        return torch.empty((2, channels, number, size, size), dtype=dtype, memory_format=format, device="meta")

    weight = torch.empty((out_channels, channels // groups, kernel, kernel, kernel), dtype=dtype, device="meta")
    history = frames(2) if options.pop("history", False) else None
    bias = torch.empty(out_channels, dtype=dtype, device="meta")
    return {"x": frames(5), "weight": weight, "bias": bias, "history": history, **options}


def aot_calls() -> Iterator[Call]:
    for case in CASES:
        for name in ("fp16" if case in IN_FLOAT16 else "bf16", *(("fp32",) if case in IN_FLOAT32 else ())):
            yield Call(f"{case}, {name}", "causal_conv3d", _inputs(case, DTYPES[name]))
