"""Tiles of the Triton kernels of the adaln ops."""

from __future__ import annotations

from dataclasses import replace

from .._triton import Table, Tile

WIDEST = 4096  # rows up to here are held by one program
_ELEMENTS = 1024  # of a tile, or one row
# Elements that all programs of a multiprocessor have in hand: in the backward pass, which keeps sums, as many programs
# as fit at once; in the forward pass some turns of them, so that none is left with much more than the others.
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 32 << 10, 4 << 10
PROGRAMS_PER_PROCESSOR = 2  # of the sums over layers


def block_of(D: int) -> tuple[int, bool]:
    """Columns of a block, and whether one block holds a row of D."""
    if D > WIDEST:
        return WIDEST // 2, False
    return max(16, 1 << (D - 1).bit_length()), True


def parts_of(length: int, runs: int, block: int, elements: int, processors: int) -> int:
    """Programs for each of so many segments of ``length`` tokens."""
    programs = processors * max(1, elements // max(block, _ELEMENTS))
    return max(1, min(length, programs // max(1, runs)))


def _rows(block: int, thread: int, stages: int) -> Tile:
    """``thread``: elements of a thread; eight are 16 bytes of a 16-bit tensor, one load."""
    rows = max(1, _ELEMENTS // block)
    return Tile({"ROWS": rows}, warps=rows * block // (32 * thread), stages=stages)


def fitting(tile: Tile, length: int) -> Tile:
    """The tile without rows beyond the ``length`` tokens of a segment."""
    rows = min(tile.blocks["ROWS"], 1 << max(0, length - 1).bit_length())
    return replace(tile, blocks={**tile.blocks, "ROWS": rows})


_BLOCKS = [1 << i for i in range(4, 13)]
MODULATION: Table = {
    **{("forward", block): {"any": _rows(block, 16, 1)} for block in _BLOCKS},  # loads ahead by itself
    **{("backward", block): {"any": _rows(block, 8, 3)} for block in _BLOCKS},
    ("row_means", WIDEST // 2): {"any": Tile({}, warps=8)},
    ("finish",): {"any": Tile({"BLOCK_D": 128})},
}


def block_of_rank(rank: int) -> int:
    return 16 if rank <= 16 else 32


LORA: Table = {
    **{("hidden", r): {"any": Tile({"BLOCK_R": r, "BLOCK_D": 128})} for r in (16, 32)},
    **{("out", r): {"any": Tile({"BLOCK_R": r, "BLOCK_K": 64})} for r in (16, 32)},
    **{("hidden_backward", r): {"any": Tile({"BLOCK_R": r, "BLOCK_K": 128})} for r in (16, 32)},
    **{("up_backward", r): {"any": Tile({"BLOCK_R": r, "BLOCK_K": 64})} for r in (16, 32)},
    **{("down_backward", r): {"any": Tile({"BLOCK_R": r, "BLOCK_D": 64})} for r in (16, 32)},
    ("sum",): {"any": Tile({"BLOCK": 256})},
}
