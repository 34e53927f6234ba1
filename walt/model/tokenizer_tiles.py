"""Encoding and decoding of frames too large for memory: overlapping tiles, each streamed in time, blended linearly.

Approximate: the tokenizer's norms pool over a frame and its convolutions pad a frame's border, and both then act on a
tile. Where one tile covers the frame, the result is that of `encode_chunks` or `decode_chunks`, which is `encode` or
`decode` to the rounding of the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise, product

import torch
from torch import Tensor

from walt.model.config import SPACE_FACTOR
from walt.model.tokenizer import Tokenizer

__all__ = ["decode_tiled", "encode_tiled"]


@torch.no_grad()
def encode_tiled(
    tokenizer: Tokenizer,
    video: Tensor,
    *,
    tile: tuple[int, int] = (256, 256),
    overlap: int = 64,
    latent_frames: int = 1,
) -> Tensor:
    """`tokenizer.encode(video)` in the memory that one tile of `latent_frames` latent frames takes; no gradients.

    Args:
        video: [B, 3, 1+4k, H, W] in [-1, 1], as for `encode`.
        tile: height and width of a tile in pixels, multiples of 8; a side longer than the frame's is cut to it.
        overlap: the least number of pixels that neighbours share, a multiple of 8 below both sides of `tile`.
        latent_frames: how many are coded at a time. Only the memory depends on it, and rounding.
    """
    tokenizer.check_video(video)
    shape = tokenizer.config.latent_shape(*video.shape[2:])
    _check(tile, overlap, latent_frames)
    factor = tokenizer.config.time_factor

    def code(part: Tensor) -> Iterator[Tensor]:
        # 1 + 4 (n - 1) frames, then 4n at a time: every chunk ends with a latent frame.
        return tokenizer.encode_chunks(_chunks(part, 1 + factor * (latent_frames - 1), factor * latent_frames))

    return _blend(video, code, shape, tile, overlap, SPACE_FACTOR, 1)


@torch.no_grad()
def decode_tiled(
    tokenizer: Tokenizer,
    latent: Tensor,
    *,
    tile: tuple[int, int] = (256, 256),
    overlap: int = 64,
    latent_frames: int = 1,
) -> Tensor:
    """`tokenizer.decode(latent)` as `encode_tiled` encodes; tile and overlap count pixels of the video here, too."""
    tokenizer.check_latent(latent)
    shape = tokenizer.config.video_shape(*latent.shape[2:])
    _check(tile, overlap, latent_frames)

    def code(part: Tensor) -> Iterator[Tensor]:
        return tokenizer.decode_chunks(_chunks(part, latent_frames, latent_frames))

    return _blend(latent, code, shape, tile, overlap, 1, SPACE_FACTOR)


def _check(tile: tuple[int, int], overlap: int, latent_frames: int) -> None:
    if len(tile) != 2 or any(side < SPACE_FACTOR or side % SPACE_FACTOR for side in tile):
        raise ValueError(f"tile: got {tile!r}; expected a height and a width that are multiples of {SPACE_FACTOR}")
    if overlap % SPACE_FACTOR or not 0 <= overlap < min(tile):
        expected = f"a multiple of {SPACE_FACTOR} from 0, below both sides of the tile {tuple(tile)}"
        raise ValueError(f"overlap: got {overlap!r}; expected {expected}")
    if latent_frames < 1:
        raise ValueError(f"latent_frames: got {latent_frames!r}; expected an int >= 1")


def _chunks(part: Tensor, first: int, step: int) -> Iterator[Tensor]:
    yield part[:, :, :first]
    for start in range(first, part.shape[2], step):
        yield part[:, :, start : start + step]


def _blend(
    whole: Tensor,
    code: Callable[[Tensor], Iterator[Tensor]],
    shape: tuple[int, int, int, int],
    tile: tuple[int, int],
    overlap: int,
    scale_in: int,
    scale_out: int,
) -> Tensor:
    """Code the tiles of `whole` [B, C, T, H, W] and add them up with their weights; the result is [B, *shape].

    The scales are the pixels of `whole` and of the result along a side of a latent site.
    """
    axes = zip(whole.shape[3:], tile, strict=True)
    rows, columns = (_tiles(size // scale_in, side, overlap, scale_in, scale_out) for size, side in axes)
    result = None
    for (y, target_y, weight_y), (x, target_x, weight_x) in product(rows, columns):
        weight = torch.outer(weight_y, weight_x)
        frame = 0
        for piece in code(whole[..., y, x]):
            if result is None:  # half precision is too coarse to add up in
                dtype, exact = piece.dtype, torch.promote_types(piece.dtype, torch.float32)
                result = torch.zeros(len(whole), *shape, dtype=exact, device=piece.device)
            end = frame + piece.shape[2]
            result[:, :, frame:end, target_y, target_x] += piece * weight.to(result)
            frame = end
    assert result is not None
    return result.to(dtype)


def _tiles(size: int, side: int, overlap: int, scale_in: int, scale_out: int) -> list[tuple[slice, slice, Tensor]]:
    """Where the tiles of an axis of `size` sites are in the input and in the output, and their weights there.

    `side` and `overlap` are in pixels.
    """
    side = min(side // SPACE_FACTOR, size)
    starts = tile_starts(size, side, overlap // SPACE_FACTOR)
    weights = tile_weights([scale_out * start for start in starts], scale_out * side)
    sources, targets = (
        [slice(scale * start, scale * (start + side)) for start in starts] for scale in (scale_in, scale_out)
    )
    return list(zip(sources, targets, weights, strict=True))


def tile_starts(size: int, side: int, overlap: int) -> list[int]:
    """Where the fewest tiles of `side` start that cover `size` sharing at least `overlap`: spread evenly."""
    if side >= size:
        return [0]
    steps = -(-(size - side) // (side - overlap))
    return [i * (size - side) // steps for i in range(steps + 1)]


def tile_weights(starts: list[int], side: int) -> list[Tensor]:
    """The weights float64 [side] of each tile along an axis. At every place those of all tiles sum to exactly 1.

    Tile i takes over from the one before on a linear ramp across their overlap; its weight is its own ramp less the
    next tile's. Ramps are multiples of 2^-12, so that products of two weights are exact in float32 and sum exactly.
    """
    place = torch.arange(starts[-1] + side, dtype=torch.float64) + 0.5
    ramps = [torch.ones_like(place)]
    for before, start in pairwise(starts):
        shared = before + side - start
        ramp = ((place - start) / max(shared, 0.5)).clamp(0, 1)  # a step where nothing is shared
        ramps.append((ramp * 4096).round() / 4096)
    ramps.append(torch.zeros_like(place))
    return [(own - after)[start : start + side] for (own, after), start in zip(pairwise(ramps), starts, strict=True)]
