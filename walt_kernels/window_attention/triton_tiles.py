"""Tiles of the Triton kernels of window attention, by kernel, bits of a number and width of a row."""

from __future__ import annotations

from .._triton import Table, Tile


def _tile(m: int, n: int, warps: int = 4, stages: int = 2) -> Tile:
    return Tile({"BLOCK_M": m, "BLOCK_N": n}, warps, stages)


BACKWARD = ("query_backward", "key_backward", "bias_backward")
BY_WINDOW = {"sm_90", "interpreter"}  # where queries, keys and values of rows 65 to 128 wide have one kernel

TABLE: Table = {
    # Large tiles where they do not waste half of the last one.
    ("forward", 16, 64, 64): {"any": _tile(64, 64), "sm_90": _tile(64, 64, 4, 3)},
    ("forward", 16, 64, 128): {"any": _tile(128, 64, 8), "sm_90": _tile(64, 64, 4, 3)},
    ("forward", 16, 128, 64): {"any": _tile(64, 32), "sm_90": _tile(64, 64, 4, 3), "sm_100": _tile(64, 64)},
    ("forward", 16, 128, 128): {"any": _tile(128, 32, 8), "sm_90": _tile(128, 64, 8), "sm_100": _tile(128, 64, 8)},
    ("forward", 16, 256): {"any": _tile(32, 32, 8)},
    ("query_backward", 16, 64): {"any": _tile(64, 64, 8), "sm_90": _tile(64, 64), "gfx942": _tile(64, 32)},
    **{
        ("key_backward", 16, 64, rows): {
            "any": _tile(64, 64, 8),
            "sm_90": _tile(64, 64, 4, stages),
            "gfx942": _tile(64, 32),
        }
        for rows, stages in ((64, 1), (128, 2))
    },
    ("window_backward", 16, 128): {"any": _tile(64, 64, 4, 1)},
    ("window_backward", 32, 128): {"any": _tile(16, 16, 8)},
    ("bias_backward", 16, 64): {"any": _tile(64, 64, 8), "sm_90": _tile(64, 64, 4, 3), "gfx942": _tile(64, 32)},
    **{
        (kernel, 16, 128): {
            "any": _tile(32, 64, 8),
            "sm_90": _tile(64, 64, 8),
            "sm_100": _tile(64, 64, 8),
            "gfx942": _tile(32, 32),
        }
        for kernel in BACKWARD
    },
    **{(kernel, 16, 256): {"any": _tile(32, 32, 8), "gfx942": _tile(16, 32)} for kernel in BACKWARD},
    # float32 has no tensor cores: small tiles, for registers
    **{
        (kernel, 32, width): {"any": _tile(16, 16, 8), "gfx942": _tile(16, 16)}
        for kernel in ("forward", *BACKWARD)
        for width in (64, 128, 256)
    },
}

SUMS: Table = {
    ("sum_rows",): {"any": Tile({"ROWS": 32, "COLUMNS": 64})},
    ("table",): {"any": Tile({"KEYS": 64})},
    ("context_finish",): {"any": Tile({"BLOCK": 16})},
}

PREPARE: Table = {
    ("norm", 64): {"any": Tile({"BLOCK": 64})},
    ("norm", 256): {"any": Tile({"BLOCK": 32})},
    ("bias",): {"any": Tile({"BLOCK": 32})},
}
