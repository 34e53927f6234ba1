# mypy: disable-error-code="no-untyped-def"
"""Videos with channels innermost, in Triton: what TMA reads, made of tensors in any other layout."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .triton_geometry import strided, wide
from .triton_tiles import FINISH


@triton.jit
def conv_transpose_kernel(
    x, out, frames, channels, pixels, width, WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_P pixels of a frame by BLOCK_C channels; ``out`` is [B, T, H, W, C] in memory."""
    program = tl.program_id(0)
    tiles_c, tiles_p = tl.cdiv(channels, BLOCK_C), tl.cdiv(pixels, BLOCK_P)
    c = program % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    program = program // tiles_c
    pixel = program % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
    frame = (program // tiles_p).to(tl.int64)
    mask = (pixel < pixels)[:, None] & (c < channels)[None, :]
    from_x = x.at + (frame // frames * x.b + frame % frames * x.t)
    out += frame * pixels * channels
    to = pixel[:, None] * channels + c[None, :]
    h, w = pixel // width, pixel % width
    if WIDE:
        h, w, c = h.to(tl.int64), w.to(tl.int64), c.to(tl.int64)
        to = pixel[:, None].to(tl.int64) * channels + c[None, :]
    values = tl.load(from_x + ((h * x.h + w * x.w)[:, None] + c[None, :] * x.c), mask=mask, other=0.0)
    tl.store(out + to, values, mask=mask)


def transposed(x: Tensor) -> Tensor:
    """x, whose channels are innermost in memory."""
    batch, channels, frames, height, width = x.shape
    out = _triton.empty((batch, frames, height, width, channels), x.dtype, x.device)

    def run(tile: _triton.Tile) -> None:
        tiles = triton.cdiv(height * width, tile.blocks["BLOCK_P"]) * triton.cdiv(channels, tile.blocks["BLOCK_C"])
        _triton.launch(
            conv_transpose_kernel,
            (tiles * batch * frames,),
            tile,
            x=strided(x),
            out=out,
            frames=frames,
            channels=channels,
            pixels=height * width,
            width=width,
            WIDE=wide(x, out),
        )

    run(_triton.pick(FINISH, ("transposed",), x.device, run))
    return out.permute(0, 4, 1, 2, 3)
