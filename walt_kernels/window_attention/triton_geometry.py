"""Sizes and strides of a call, as the kernels of window attention take them. Looks at no data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _triton
from .triton_prepare import bias_kernel, norm_kernel
from .triton_rows import Context, Grid, Image, Layout, Mask, Scale, Table, Video, Window
from .triton_tiles import BY_WINDOW, PREPARE, TABLE

NARROW = 2**31  # offsets inside a window from here on need 64 bits

# As what the kernels take tensors.
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("q", "k", "v", "grad", "queries", "keys"), Grid),
    **dict.fromkeys(("context_k", "context_v", "context_keys"), Context),
    **dict.fromkeys(("q_norm", "k_norm"), Scale),
    "image": Image,
    "context_mask": Mask,
}


def split_dim(dim: int) -> tuple[int, int]:
    """Widths of the two tiles that hold a row: one power of two, or two where that pads less."""
    whole = max(16, 1 << (dim - 1).bit_length())
    half = whole // 2
    rest = max(16, 1 << max(0, dim - half - 1).bit_length())
    return (half, rest) if half >= 16 and half + rest < whole else (whole, 0)


def _reach(x: Tensor, sizes: tuple[int, ...]) -> int:
    """The largest offset inside a window (of a context: inside a sample) in elements."""
    return sum((size - 1) * abs(stride) for size, stride in zip(sizes, x.stride()[1:], strict=True))


class Geometry:
    """What all launches of a call share."""

    def __init__(self, inputs: Mapping[str, Any], grad: Tensor | None = None) -> None:
        q = inputs["q"]
        self.B, self.T, self.H, self.W, self.heads, self.dim = q.shape
        self.device, self.dtype, self.image = q.device, q.dtype, inputs["image"]
        sizes = (self.T, self.H, self.W)
        self.window = inputs["window"]
        self.extent = tuple(min(a, b) for a, b in zip(self.window, sizes, strict=True))
        self.grid = tuple(-(-a // b) for a, b in zip(sizes, self.extent, strict=True))
        self.per_sample = math.prod(self.grid)
        self.windows = self.B * self.per_sample
        self.N = math.prod(self.extent)
        self.divides = all(a % b == 0 for a, b in zip(sizes, self.extent, strict=True))
        context_k = inputs["context_k"]
        self.L = 0 if context_k is None else context_k.shape[1]
        halves = split_dim(self.dim)
        self.width = sum(halves)
        # Where a window is a tile or less, a program norms no row twice.
        self.normed = self.N > 64
        rows = [inputs[name] for name in ("q", "k", "v", "context_k", "context_v")] + [grad]
        rows = [x for x in rows if x is not None]
        # Strides in units of 8 elements tell the compiler that rows are aligned, where dim = 72 hides it.
        aligned = self.dim % 8 == 0 and all(s % 8 == 0 for x in rows for s in x.stride()[:-1])
        self.unit = 8 if aligned else 1
        own, context = (*self.extent, 1, self.dim), (self.L, 1, self.dim)
        reach = max(_reach(x, own if x.dim() == 6 else context) for x in rows)
        reach = max(reach, self.extent[0] * self.H * self.W * self.heads * self.dim)
        self.layout = Layout(self.dim, *halves, self.unit, reach >= NARROW)
        self.arguments: dict[str, Any] = {
            "video": Video(*sizes, self.heads, *self.grid),
            "L": self.L,
            "heads": self.heads,
            "scale": inputs["scale"],
            "norm_eps": inputs["norm_eps"],
            "window": _triton.constants(Window(self.N, *self.extent)),
            "layout": _triton.constants(self.layout),
            "NORMED": self.normed,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        }
        for name in ("q", "k", "v", "context_k", "context_v", "image", "context_mask", "q_norm", "k_norm"):
            self.add(name, inputs[name])
        self.table = inputs["bias_table"]
        self.biases: dict[tuple[int, bool], Tensor] = {}
        if grad is not None:
            self.add("grad", grad)

    def add(self, name: str, tensor: Tensor | None) -> None:
        """An argument of the launches to come, and its strides."""
        self.arguments[name] = self.strided(_KINDS[name], tensor)

    def strided(self, kind: Any, tensor: Tensor | None) -> Any:
        """A tensor, or None, and its strides. Those of rows are in units of elements, but for d's."""
        if tensor is None:
            return kind(None, *[0] * (len(kind._fields) - 1))
        unit = self.unit if kind in (Grid, Context) else 1
        *strides, last = tensor.stride()
        return kind(tensor, *[stride // unit for stride in strides], last)

    def norm(self, source: str, weight: str, name: str) -> None:
        """Adds ``name``: the normed rows of an argument, or its rows as they are, where they need none or no longer."""
        x, scale = self.arguments[source].at, self.arguments[weight].at
        if x is None or scale is None or not self.normed:
            self.add(name, x)
            return
        out = _triton.empty(x.shape, x.dtype, x.device)
        self.add(name, out)
        grid = x if x.dim() == 6 else x[:, None, None]  # a context is one frame of one row
        image = self.image if x.dim() == 6 else None
        size, stride = grid.shape, grid.stride()
        if image is None and all(stride[i] == size[i + 1] * stride[i + 1] for i in range(3)):
            grid = grid.view(1, 1, 1, -1, *size[4:])  # one row of tokens: fewer divisions
        tile = _triton.pick(PREPARE, ("norm", 64 if self.width <= 64 else 256), self.device)
        block = tile.blocks["BLOCK"]
        rows = grid.numel() // self.dim
        more = dict(zip("THW", grid.shape[1:4], strict=True))
        more |= {"x": self.strided(Grid, grid), "weight": self.arguments[weight], "image": self.strided(Image, image)}
        more |= {"out": out, "rows": rows}
        more["layout"] = _triton.constants(self.layout._replace(WIDE=rows + block > NARROW))
        self.launch(norm_kernel, -(-rows // block), tile, **more)

    def bias(self, *tiles: _triton.Tile, by_keys: bool = False) -> dict[str, Any]:
        """The bias of all pairs of a window's tokens, up to whole tiles: by (query, key) or (key, query). Made once."""
        if self.table is None:
            return {"bias": None, "PADDED": 0}
        block = max(size for tile in tiles for size in tile.blocks.values())
        padded = -(-self.N // block) * block
        if (found := self.biases.get((padded, by_keys))) is not None:
            return {"bias": found, "PADDED": padded}
        bias = self.biases[padded, by_keys] = _triton.empty(
            (self.heads, padded, padded), self.bias_dtype(), self.device
        )
        tile = _triton.pick(PREPARE, ("bias",), self.device)
        centre = {f"centre_{axis}": size - 1 for axis, size in zip("thw", self.window, strict=True)}
        table = self.strided(Table, self.table)
        result = {"bias": bias, "PADDED": padded}
        programs = self.heads * (-(-padded // tile.blocks["BLOCK"])) ** 2
        self.launch(bias_kernel, programs, tile, table=table, **centre, **result, BY_KEYS=by_keys)
        return result

    def bias_dtype(self) -> torch.dtype:
        """The table's. Of a float32 table beside 16-bit tokens half of its bytes are read, since all tiles read it.

        float16 in place of bfloat16: up to entries of 8 its error (2^-9) is no more than that of a probability which is
        rounded to bfloat16, and which it multiplies.
        """
        narrow = self.dtype != torch.float32 and self.table.dtype == torch.float32
        return torch.float16 if narrow else self.table.dtype

    def tile(self, kernel: str) -> _triton.Tile:
        bits = 32 if self.dtype == torch.float32 else 16
        width = 64 if self.width <= 64 else 128 if self.width <= 128 else 256
        # Tokens modulo 128: does a tile of 128 rows waste half of itself at the end?
        rows = 128 if self.N > 64 and (self.N % 128 == 0 or self.N % 128 > 64) else 64
        key = (kernel, bits, width)
        tile = _triton.pick(TABLE, (*key, rows) if (*key, rows) in TABLE else key, self.device)
        if self.image is not None and self.extent[0] > 31:  # flags of frames are loaded in the loop: no pipeline
            tile = _triton.Tile(tile.blocks, tile.warps, 1)
        return tile

    def by_window(self) -> bool:
        """Whether a program takes a window, with five products, and not a tile of queries or of keys, with seven."""
        target = _triton.target(self.device)
        enough = self.windows * self.heads >= target.processors
        return target.architecture in BY_WINDOW and enough and 64 < self.width <= 128 and self.L == 0

    def masked(self, block: int) -> bool:
        """Whether tiles of ``block`` tokens may hold some that are not to be seen."""
        return not self.divides or self.N % block != 0 or self.image is not None

    def launch(self, kernel: Any, programs: int, tile: _triton.Tile, **more: Any) -> None:
        """Runs ``kernel`` with those of the call's arguments, and of ``more``, that it names."""
        everything = self.arguments | more
        named = {name: everything[name] for name in kernel.arg_names if name in everything}
        _triton.launch(kernel, (programs,), tile, **named)
