# mypy: disable-error-code="no-untyped-def"
"""What the Triton kernels of video_norm share: tiles of pixels and channels, sums over groups, and their arguments.

A tile is in one frame. Its channels are GROUPS whole groups, each padded to SIZE, or one piece of SIZE of a group.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .triton_tiles import PART, WHOLE, lanes

# Programs of a frame at most. Those that sum leave partial rows, which one program adds up.
PARTS = {"statistics": 128, "sums": 64, "grad_x": 256, "whole": 128}


@triton.jit
def channels_of(tile, channels, groups, GROUPS: tl.constexpr, SIZE: tl.constexpr, EXACT: tl.constexpr):
    """Group and channel of each lane of a tile, and whether there are such; ``channels`` are a group's."""
    lane = tl.arange(0, GROUPS * SIZE)
    pieces = tl.cdiv(channels, SIZE)
    first = tile // pieces * GROUPS
    group = first + lane // SIZE
    if GROUPS == 1:
        inner = tile % pieces * SIZE + lane
        return group, first * channels + inner, inner < channels
    elif EXACT:  # no group is padded: a run of channels, which is loaded in wide vectors
        c = first * channels + lane
        return group, c, c < groups * channels
    else:
        inner = lane % SIZE
        return group, group * channels + inner, (inner < channels) & (group < groups)


@triton.jit
def places(p, c, stride_h, stride_p, stride_c, columns):
    """Offsets of pixels and channels in a frame. Where one distance leads from each pixel to the next, there is no
    ``stride_h``."""
    if stride_h is None:
        along = p.to(tl.int64) * stride_p
    else:
        along = (p // columns).to(tl.int64) * stride_h + (p % columns).to(tl.int64) * stride_p
    return along[:, None] + c.to(tl.int64)[None, :] * stride_c


@triton.jit
def gain_and_offset(
    weight, bias, scale, shift, b, t, c, valid,
    weight_c, bias_c, scale_b, scale_c, scale_t, shift_b, shift_c, shift_t,
):  # fmt: skip
    """Modulation of a frame's normalised channels: gain = weight (1 + scale), offset = bias (1 + scale) + shift."""
    gain = tl.full(c.shape, 1.0, tl.float32)
    offset = tl.zeros(c.shape, tl.float32)
    if weight is not None:
        gain = tl.load(weight + c * weight_c, mask=valid, other=0.0).to(tl.float32)
    if bias is not None:
        offset = tl.load(bias + c * bias_c, mask=valid, other=0.0).to(tl.float32)
    if scale is not None:
        factor = 1.0 + tl.load(scale + (b * scale_b + t * scale_t + c * scale_c), mask=valid, other=0.0).to(tl.float32)
        gain *= factor
        offset *= factor
    if shift is not None:
        offset += tl.load(shift + (b * shift_b + t * shift_t + c * shift_c), mask=valid, other=0.0).to(tl.float32)
    return gain, offset


@triton.jit
def by_group(row, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """[GROUPS * SIZE] -> the sum of its group in every lane, [1, GROUPS * SIZE]"""
    sums = tl.sum(tl.reshape(row, [GROUPS, SIZE]), 1)
    return tl.reshape(tl.broadcast_to(sums[:, None], [GROUPS, SIZE]), [1, GROUPS * SIZE])


@triton.jit
def total(value, PIXEL: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Sum of a tile over the channels of each pixel, or over the pixels and the channels of each group."""
    if PIXEL:
        return tl.sum(value, 1)[:, None]
    else:
        return by_group(tl.sum(value, 0), GROUPS, SIZE)


def video(name: str, tensor: Tensor | None) -> dict[str, Any]:
    """Arguments of a video [B, C, T, H, W], whose pixels are numbered row after row, with all of its strides."""
    if tensor is None:
        return {name: None, f"{name}_h": None, **{f"{name}_{axis}": 0 for axis in "btpc"}}
    H, W = tensor.shape[3:]
    b, c, t, h, w = tensor.stride()
    scattered = H > 1 and W > 1 and h != W * w
    steps = {"b": b, "t": t, "h": h if scattered else None, "p": h if W == 1 else w, "c": c}
    return {name: tensor, "columns": W, **{f"{name}_{axis}": step for axis, step in steps.items()}}


def modulation(**given: Tensor | None) -> dict[str, Any]:
    """Arguments of weight and bias [C], scale and shift [B, C] or [B, C, T]."""
    arguments: dict[str, Any] = dict(given)
    for name, tensor in given.items():
        axes = "c" if name in ("weight", "bias") else "bct"
        strides = (0, 0, 0) if tensor is None else (*tensor.stride(), 0)
        arguments |= {f"{name}_{axis}": stride for axis, stride in zip(axes, strides, strict=False)}
    return arguments


def sizes(x: Tensor, groups: int) -> dict[str, Any]:
    """Sizes of a frame; ``channels`` are a group's, as in all kernels."""
    return {"pixels": x.shape[3] * x.shape[4], "channels": x.shape[1] // groups, "groups": groups}


def shared_by(x: Tensor, over: str, groups: int) -> dict[str, Any]:
    """How many frames have statistics in common, and how many elements each is taken over."""
    _, C, T, H, W = x.shape
    span = T if over == "clip" else 1
    return {"span": span, "count": float(C if over == "pixel" else C // groups * span * H * W)}


def order(x: Tensor) -> str:
    """Of frames of one pixel always the same: their strides do not tell."""
    return "rows" if x.stride(1) == 1 or x.shape[3] * x.shape[4] == 1 else "planes"


def _tile(tile: _triton.Tile, x: Tensor, groups: int, number: int, size: int) -> tuple[_triton.Tile, dict[str, Any]]:
    """The tile with its channels, and how many of such tiles are all channels."""
    channels = x.shape[1] // groups
    across = triton.cdiv(channels, size) * triton.cdiv(groups, number)
    return tile, {"GROUPS": number, "SIZE": size, "EXACT": channels == size, "across": across}


@functools.cache
def _unaligned(kernel: Any) -> Any:
    values = [name for name in kernel.arg_names if name not in kernel.fn.__annotations__]  # all that are no constexpr
    return triton.jit(kernel.fn, do_not_specialize_on_alignment=values)


def for_frames_of(x: Tensor, kernel: Any) -> Any:
    """The kernel as it is compiled for every video with frames of x's size.

    Strides and addresses that are multiples of 16 are loaded in wider vectors, and summed in another order. Where those
    of a frame are not, those of a video of many may be by chance: the kernel is then compiled as if it had none.
    """
    step = x.shape[1] if order(x) == "rows" else x.shape[3] * x.shape[4]
    return kernel if step % 16 == 0 else _unaligned(kernel)


def whole(kernel: str, x: Tensor, over: str, groups: int) -> tuple[_triton.Tile, dict[str, Any]] | None:
    """A tile that holds all that its statistics are taken over, None where a program has no room for it.

    By the sizes of a frame alone, so that an image is computed as the first frame of a video is.
    """
    size, number, last = triton.next_power_of_2(x.shape[1] // groups), 1, order(x) == "rows"
    smallest, *_, largest = sorted(elements for name, elements in WHOLE if name == kernel)
    sector = 64 // x.element_size()  # what memory gives at once
    if over == "pixel":
        elements = max(size, min(largest, 2048 if last else sector * size))
    elif over == "clip" and x.shape[2] > 1:
        return None
    else:
        pixels = triton.next_power_of_2(x.shape[3] * x.shape[4])
        while number < groups and (pixels * number * size < smallest or (last and number * size < sector)):
            number *= 2
        elements = pixels * number * size
        if elements > largest:
            return None
    elements = max(smallest, elements)
    tile = _triton.pick(WHOLE, (kernel, min(elements, largest)), x.device)
    return _tile(replace(tile, blocks={"ELEMENTS": elements}), x, groups, number, size)


def part(kernel: str, x: Tensor, groups: int) -> tuple[_triton.Tile, dict[str, Any]]:
    """A tile with a part of what its statistics are taken over."""
    most = lanes(order(x))
    size = min(most, triton.next_power_of_2(x.shape[1] // groups))
    number = min(most // size, triton.next_power_of_2(groups))
    return _tile(_triton.pick(PART, (kernel, order(x)), x.device), x, groups, number, size)


def pixels_of(tile: _triton.Tile, blocks: dict[str, Any]) -> int:
    """Pixels of a tile."""
    return tile.blocks["ELEMENTS"] // (blocks["GROUPS"] * blocks["SIZE"])


def split(kernel: str, pixels: int, tile: _triton.Tile, blocks: dict[str, Any]) -> dict[str, int]:
    """Programs of a frame: of some tiles each, not more than PARTS of the kernel."""
    step = pixels_of(tile, blocks)
    run = step * max(4, triton.cdiv(triton.cdiv(pixels, step), PARTS[kernel]))
    return {"run": run, "parts": triton.cdiv(pixels, run)}


def stages(pixels: int, tile: _triton.Tile, blocks: dict[str, Any]) -> int:
    """Of a loop over the tiles of a run; a frame of one tile leaves nothing to load ahead."""
    return tile.stages if pixels > pixels_of(tile, blocks) else 1
