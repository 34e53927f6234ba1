"""Sizes and strides of a call, as the kernels of window attention take them. Looks at no data."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _triton
from .triton_tiles import TABLE

NARROW = 2**31  # offsets inside a window from here on need 64 bits

# Stride arguments of a tensor by its name; a grid tensor is [B, T, H, W, heads, dim].
_GRID, _CONTEXT = "bthwnd", "blnd"
_AXES = {
    "q": _GRID, "k": _GRID, "v": _GRID, "grad": _GRID,
    "context_k": _CONTEXT, "context_v": _CONTEXT, "image": "bt", "context_mask": "bl",
}  # fmt: skip


def split_dim(dim: int) -> tuple[int, int]:
    """Widths of the two tiles that hold a row: one power of two, or two where that pads less."""
    whole = max(16, 1 << (dim - 1).bit_length())
    half = whole // 2
    rest = max(16, 1 << max(0, dim - half - 1).bit_length())
    return (half, rest) if half >= 16 and half + rest < whole else (whole, 0)


class Geometry:
    """What all launches of a call share."""

    def __init__(self, inputs: dict[str, Any], grad: Tensor | None = None) -> None:
        q = inputs["q"]
        self.B, T, H, W, self.heads, self.dim = q.shape
        self.device, self.dtype = q.device, q.dtype
        window = inputs["window"]
        self.extent = tuple(min(a, b) for a, b in zip(window, (T, H, W), strict=True))
        self.grid = tuple(-(-a // b) for a, b in zip((T, H, W), self.extent, strict=True))
        self.per_sample = math.prod(self.grid)
        self.windows = self.B * self.per_sample
        self.N = math.prod(self.extent)
        self.image = inputs["image"]
        self.L = 0 if inputs["context_k"] is None else inputs["context_k"].shape[1]
        self.divides = all(a % b == 0 for a, b in zip((T, H, W), self.extent, strict=True))
        self.table_shape = tuple(2 * s - 1 for s in window)
        D0, D1 = split_dim(self.dim)
        self.width = D0 + D1
        _, SH, SW = self.table_shape
        wide = torch.float32
        tensors = {name: inputs[name] for name in _AXES if name != "grad"}
        for name in ("bias_table", "q_norm", "k_norm"):
            x = inputs[name]
            tensors[name] = None if x is None else x.detach().to(wide).contiguous()
        if grad is not None:
            tensors["grad"] = grad
        strided = {n: tensors[n] for n in tensors if _AXES.get(n, "")[-1:] == "d" and tensors[n] is not None}
        # Strides in units of 8 elements tell the compiler that rows are aligned, where dim = 72 hides it.
        aligned = all(s % 8 == 0 for x in strided.values() for s in x.stride()[:-1])
        unit = 8 if aligned else 1
        reach = {n: (*self.extent, 1, self.dim) if x.dim() == 6 else (self.L, 1, self.dim) for n, x in strided.items()}
        self.wide = (
            any(
                sum((size - 1) * abs(s) for size, s in zip(reach[n], x.stride()[1:], strict=True)) >= NARROW
                for n, x in strided.items()
            )
            or self.extent[0] * H * W * self.heads * self.dim >= NARROW
        )
        strides = {}
        for name, axes in _AXES.items():
            if name not in tensors:
                continue
            x = tensors[name]
            for i, axis in enumerate(axes):
                divisor = unit if name in strided and axis != "d" else 1
                strides[f"{name}_{axis}"] = 0 if x is None else x.stride(i) // divisor
        self.arguments = {
            **tensors, **strides,
            "T": T, "H": H, "W": W, "L": self.L, "heads": self.heads,
            "windows_t": self.grid[0], "windows_h": self.grid[1], "windows_w": self.grid[2],
            "scale": inputs["scale"], "norm_eps": inputs["norm_eps"],
            "N": self.N, "WT": self.extent[0], "WH": self.extent[1], "WW": self.extent[2],
            "SH": SH, "SW": SW, "CENTRE": ((window[0] - 1) * SH + window[1] - 1) * SW + window[2] - 1,
            "ENTRIES": math.prod(self.table_shape),
            "DIM": self.dim, "D0": D0, "D1": D1, "UNIT": unit, "WIDE": self.wide,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        }  # fmt: skip

    def tile(self, kernel: str) -> _triton.Tile:
        bits = 32 if self.dtype == torch.float32 else 16
        width = 64 if self.width <= 64 else 128 if self.width <= 128 else 256
        # Tokens modulo 128: does a tile of 128 rows waste half of itself at the end?
        rows = 128 if self.N > 64 and (self.N % 128 == 0 or self.N % 128 > 64) else 64
        key = (kernel, bits, width)
        return _triton.pick(TABLE, (*key, rows) if (*key, rows) in TABLE else key, self.device)

    def masked(self, block: int) -> bool:
        """Whether tiles of ``block`` tokens may hold some that are not to be seen."""
        return not self.divides or self.N % block != 0 or self.image is not None

    def launch(self, kernel: Any, programs: int, tile: _triton.Tile, **more: Any) -> None:
        """Runs ``kernel`` with those of the call's arguments, and of ``more``, that it names."""
        everything = self.arguments | more
        named = {name: everything[name] for name in kernel.arg_names if name in everything}
        _triton.launch(kernel, (programs,), tile, **named)
