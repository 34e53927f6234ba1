"""Encoding and decoding of frames too large for memory: overlapping tiles, each streamed in time, blended linearly.

Approximate: the tokenizer's norms pool over a frame and its convolutions pad a frame's border, and both then act on a
tile. Where one tile covers the frame, the result is that of `encode_chunks` or `decode_chunks`, which is `encode` or
`decode` to the rounding of the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

from walt.model.config import SPACE_FACTOR
from walt.model.tokenizer import Tokenizer

__all__ = ["Piece", "decode_pieces", "decode_tiled", "encode_pieces", "encode_tiled"]


class Piece(NamedTuple):
    """A tile of some frames of the result."""

    frame: int  # the first
    rows: slice
    columns: slice
    values: Tensor  # [B, C, t, h, w]
    weight: Tensor  # float64 [h, w]; at every place those of all tiles sum to 1


Place = tuple[slice, slice]  # rows and columns
Chunks = Callable[[slice, slice], Iterator[Tensor]]  # rows and columns of a tile -> its chunks


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
    _check_count(latent_frames)
    factor = tokenizer.config.time_factor

    def chunks(rows: slice, columns: slice) -> Iterator[Tensor]:
        # 1 + 4 (n - 1) frames, then 4n at a time: every chunk ends with a latent frame.
        return _split(video[..., rows, columns], 1 + factor * (latent_frames - 1), factor * latent_frames)

    return _blend(encode_pieces(tokenizer, chunks, video.shape[3:], tile=tile, overlap=overlap), shape)


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
    _check_count(latent_frames)

    def chunks(rows: slice, columns: slice) -> Iterator[Tensor]:
        return _split(latent[..., rows, columns], latent_frames, latent_frames)

    return _blend(decode_pieces(tokenizer, chunks, latent.shape[3:], tile=tile, overlap=overlap), shape)


@torch.no_grad()
def encode_pieces(
    tokenizer: Tokenizer, chunks: Chunks, size: Sequence[int], *, tile: tuple[int, int], overlap: int
) -> Iterator[Piece]:
    """What `encode_tiled` blends, piece by piece, for films that do not fit into memory.

    `chunks` gives those of a tile as `Tokenizer.encode_chunks` takes them; `size` is the frames' height and width.
    """
    _check_tile(tile, overlap)
    sites = [side // SPACE_FACTOR for side in size]
    for source, target, weight in _grid(sites, tile, overlap, SPACE_FACTOR, 1):
        yield from _pieces(tokenizer.encode_chunks(chunks(*source)), target, weight)


@torch.no_grad()
def decode_pieces(
    tokenizer: Tokenizer, chunks: Chunks, size: Sequence[int], *, tile: tuple[int, int], overlap: int
) -> Iterator[Piece]:
    """The same for `decode_tiled`; `size` is the height and width of the latents."""
    _check_tile(tile, overlap)
    for source, target, weight in _grid(size, tile, overlap, 1, SPACE_FACTOR):
        yield from _pieces(tokenizer.decode_chunks(chunks(*source)), target, weight)


def _check_tile(tile: tuple[int, int], overlap: int) -> None:
    if len(tile) != 2 or any(side < SPACE_FACTOR or side % SPACE_FACTOR for side in tile):
        raise ValueError(f"tile: got {tile!r}; expected a height and a width that are multiples of {SPACE_FACTOR}")
    if overlap % SPACE_FACTOR or not 0 <= overlap < min(tile):
        expected = f"a multiple of {SPACE_FACTOR} from 0, below both sides of the tile {tuple(tile)}"
        raise ValueError(f"overlap: got {overlap!r}; expected {expected}")


def _check_count(latent_frames: int) -> None:
    if latent_frames < 1:
        raise ValueError(f"latent_frames: got {latent_frames!r}; expected an int >= 1")


def _split(tensor: Tensor, first: int, step: int) -> Iterator[Tensor]:
    """Chunks of [B, C, T, h, w]: `first` frames, then `step` at a time."""
    yield tensor[:, :, :first]
    for start in range(first, tensor.shape[2], step):
        yield tensor[:, :, start : start + step]


def _pieces(coded: Iterator[Tensor], target: Place, weight: Tensor) -> Iterator[Piece]:
    frame = 0
    for values in coded:
        yield Piece(frame, *target, values, weight)
        frame += values.shape[2]


def _blend(pieces: Iterable[Piece], shape: tuple[int, int, int, int]) -> Tensor:
    """Add up the pieces, times their weights: [B, *shape]."""
    result = None
    for frame, rows, columns, values, weight in pieces:
        if result is None:  # half precision is too coarse to add up in
            dtype, exact = values.dtype, torch.promote_types(values.dtype, torch.float32)
            result = torch.zeros(len(values), *shape, dtype=exact, device=values.device)
        result[:, :, frame : frame + values.shape[2], rows, columns] += values * weight.to(result)
    assert result is not None
    return result.to(dtype)


def _grid(
    size: Sequence[int], tile: tuple[int, int], overlap: int, scale_in: int, scale_out: int
) -> Iterator[tuple[Place, Place, Tensor]]:
    """The tiles of `size` latent sites: where they are in the input and in the result, and their weight there.

    The scales are the pixels of either along a side of a latent site.
    """
    axes = (_tiles(sites, side, overlap, scale_in, scale_out) for sites, side in zip(size, tile, strict=True))
    for (y, target_y, weight_y), (x, target_x, weight_x) in product(*axes):
        yield (y, x), (target_y, target_x), torch.outer(weight_y, weight_x)


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
    return [(ramp - after)[start : start + side] for (ramp, after), start in zip(pairwise(ramps), starts, strict=True)]
