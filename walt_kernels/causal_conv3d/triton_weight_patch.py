# mypy: disable-error-code="no-untyped-def"
"""The gradient of the weight with TMA loads, in Triton: a step of the sum takes a patch of pixels as boxes of memory.

The gradient's box is rows of pixels one after another, x's the same pixels shifted by a tap, with zeros outside of the
frame. For what ``triton_patch`` takes, where patches of whole rows (or of a part of one) fill the frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import _triton
from . import triton_patch
from .triton_geometry import Frame, convolution
from .triton_order import add_parts
from .triton_tiles import WEIGHT_PATCH, weight_patch_key
from .triton_transposed import transposed


@triton.jit
def conv_weight_patch_kernel(
    grad, x, partials,
    batch, frames, sources, frame, channels, out_channels, row_apart, parts, filters, conv,
    TIME: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M output channels by BLOCK_N channels of TAPS (1 or 2) taps of one row, for one part of the pixels.

    ``grad`` are boxes of [B * frames * height * width, C_out] and ``x`` boxes of frames as ``box_of`` makes them;
    ``partials`` is [parts, C_out, KT, KH, KW, C], ``filters`` the elements of one part.
    """
    GROUPS: tl.constexpr = (conv.KW + TAPS - 1) // TAPS
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(out_channels, BLOCK_M), tl.cdiv(channels, BLOCK_N)
    m, program = program % tiles_m * BLOCK_M, program // tiles_m
    n, program = program % tiles_n * BLOCK_N, program // tiles_n
    v, program = program % GROUPS * TAPS, program // GROUPS
    u, program = program % conv.KH, program // conv.KH
    part, back = program % parts, program // parts  # the last tap in time sees the most frames: longest sums first
    j = conv.KT - 1 - back

    t_first = 0
    if TIME == "zeros":  # frames that see only what is before the first are left out
        t_first = tl.minimum(tl.cdiv(back, conv.ST), frames)
    tiles_w = frame.width // BLOCK_W
    tiles_frame = frame.height // BLOCK_H * tiles_w
    steps = batch * (frames - t_first) * tiles_frame
    steps_part = tl.cdiv(steps, parts)
    row_shift = (u - frame.top) >> (conv.SH - 1)
    at = ((u - frame.top) & (conv.SH - 1)) * row_apart + n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc1 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(part * steps_part, tl.minimum((part + 1) * steps_part, steps)):
        number, tile = step // tiles_frame, step % tiles_frame
        b, t = number // (frames - t_first), number % (frames - t_first) + t_first
        source = b * sources + tl.maximum(t * conv.ST - back, 0)
        row, column = tile // tiles_w * BLOCK_H, tile % tiles_w * BLOCK_W
        sent = grad.load([((b * frames + t) * frame.height + row) * frame.width + column, m]).T
        # With a stride of 2, the shift's last bit tells odd columns from even ones; with 1 there is no such bit.
        shift = v - frame.left
        here, place = column + (shift >> (conv.SW - 1)), at + (shift & (conv.SW - 1)) * channels
        pixels = x.load([source, row + row_shift, here, place]).reshape(BLOCK_K, BLOCK_N)
        acc = tl.dot(sent, pixels, acc, input_precision="ieee")
        if TAPS > 1:
            shift = v + 1 - frame.left
            here, place = column + (shift >> (conv.SW - 1)), at + (shift & (conv.SW - 1)) * channels
            pixels = x.load([source, row + row_shift, here, place]).reshape(BLOCK_K, BLOCK_N)
            acc1 = tl.dot(sent, pixels, acc1, input_precision="ieee")

    o, c = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    mask = (o < out_channels)[:, None] & (c < channels)[None, :]
    partials += part.to(tl.int64) * filters + ((j * conv.KH + u) * conv.KW + v) * channels
    offsets = o[:, None] * (channels * (conv.KT * conv.KH * conv.KW)) + c[None, :]
    tl.store(partials + offsets, acc, mask=mask)
    if TAPS > 1:
        tl.store(partials + offsets + channels, acc1, mask=mask & (v + 1 < conv.KW))


def patch_of(grad: Tensor, pixels: int) -> tuple[int, int] | None:
    """Rows and columns of patches of that many pixels which follow one another in memory, if they fill a frame."""
    height, width = grad.shape[3:]
    rows = max(1, pixels // width)
    columns = min(width, pixels)
    if rows * columns != pixels or height % rows or width % columns:
        return None
    return rows, columns


def takes(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], space: str, groups: int
) -> bool:
    key = weight_patch_key(x.dtype, weight.shape[0], weight.shape[1], weight.shape[4])
    pixels = _triton.pick(WEIGHT_PATCH, key, x.device).blocks["BLOCK_K"]
    plain = all(triton_patch.takes(each, x, weight, stride, dilation, space, groups) for each in (x, grad))
    return plain and patch_of(grad, pixels) is not None


def parts_of(tiles: int, steps: int, tile: _triton.Tile, filters: int, processors: int) -> int:
    """Into how many parts the sum is cut, so that the last round of programs keeps all processors busy.

    A processor holds programs of 8 warps in all, which share its 4.5 TFLOP/s. A part more is written and read as
    float32, at 3 TB/s, and each part of a tile takes as long as 4 steps of the sum to begin and to end.
    """
    together = max(1, 8 // tile.warps)
    step = 2 * math.prod(tile.blocks.values()) * together / 4.5e12

    def cost(parts: int) -> float:
        rounds = triton.cdiv(tiles * parts, together * processors)
        return rounds * (triton.cdiv(steps, parts) + 4) * step + parts * filters * 8 / 3e12

    return min(range(1, max(2, min(64, steps))), key=cost)


def write(
    grad: Tensor, x: Tensor, grad_weight: Tensor, stride: Sequence[int], sides: Sequence[int], time_padding: str
) -> None:
    """Writes the gradient of the weight; ``sides`` are the padding's top and left."""
    batch, out_channels, frames, height, width = grad.shape
    channels, kernel = x.shape[1], grad_weight.shape[2:]
    x = triton_patch.in_boxes(x)
    if not (grad.is_contiguous(memory_format=torch.channels_last_3d) and triton_patch.boxes(grad)):
        grad = transposed(grad)

    def run(tile: _triton.Tile) -> None:
        block_m, block_n, block_k, taps = (tile.blocks[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "TAPS"))
        block_h, block_w = patch_of(grad, block_k) or (1, block_k)
        tiles = triton.cdiv(out_channels, block_m) * triton.cdiv(channels, block_n)
        tiles *= kernel[0] * kernel[1] * triton.cdiv(kernel[2], taps)
        steps = batch * frames * (height // block_h) * (width // block_w)
        parts = parts_of(tiles, steps, tile, grad_weight.numel(), _triton.target(x.device).processors)
        partials = _triton.empty((parts, out_channels, *kernel, channels), torch.float32, x.device)
        rows = TensorDescriptor(
            grad, [batch * frames * height * width, out_channels], [out_channels, 1], [block_k, block_m]
        )
        _triton.launch(
            conv_weight_patch_kernel,
            (tiles * parts,),
            tile,
            grad=rows,
            x=triton_patch.box_of(x, stride, [1, block_h, block_w, block_n]),
            partials=partials,
            batch=batch,
            frames=frames,
            sources=x.shape[2],
            frame=Frame(height, width, *sides),
            channels=channels,
            out_channels=out_channels,
            row_apart=x.stride(3),
            parts=parts,
            filters=grad_weight.numel(),
            conv=convolution(kernel, stride),
            TIME=time_padding,
            BLOCK_H=block_h,
            BLOCK_W=block_w,
        )
        add_parts(partials, grad_weight)

    run(_triton.pick(WEIGHT_PATCH, weight_patch_key(x.dtype, out_channels, channels, kernel[2]), x.device, run))
