"""The choice of tiles by measurement, with a timer of our own in place of a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from walt_kernels import _triton
from walt_kernels._triton import Tile

if _triton.reason is not None:
    pytest.skip(str(_triton.reason), allow_module_level=True)

import triton

from walt_kernels import _autotune

SMALL, MIDDLE, LARGE, OTHER = (Tile({"BLOCK": size}) for size in (16, 32, 64, 128))
TABLE = {
    ("forward", 8): {"any": SMALL, "sm_90": MIDDLE},
    ("forward", 16): {"any": LARGE},
    ("backward",): {"any": OTHER},
}
CPU = torch.device("cpu")


def pick(key: tuple, tried: list[Tile]) -> Tile:
    return _triton.pick(TABLE, key, CPU, lambda tile: tried.append(tile))


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Tile]]:
    """Tiles in the order in which they were timed; the larger the block, the faster."""
    ran: list[Tile] = []

    def time(run) -> float:
        run()
        return 1 / ran[-1].blocks["BLOCK"]

    monkeypatch.setattr(_autotune, "_milliseconds", time)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("WALT_KERNELS_AUTOTUNE", "1")
    _autotune._kept.cache_clear()
    yield ran
    _autotune._kept.cache_clear()


def test_the_fastest_tile_of_the_kernel_is_kept_on_disk(tried: list[Tile]) -> None:
    assert pick(("forward", 8), tried) == LARGE
    assert set(tried) == {SMALL, MIDDLE, LARGE}
    tried.clear()
    assert pick(("forward", 8), tried) == LARGE
    _autotune._kept.cache_clear()  # as in a new process
    assert pick(("forward", 8), tried) == LARGE
    assert tried == []
    (entry,) = json.loads(_autotune.cache_file().read_text()).values()
    assert entry == {"blocks": {"BLOCK": 64}, "warps": 4, "stages": 2}


def test_other_shape_classes_are_timed_anew_and_nothing_is_lost(tried: list[Tile]) -> None:
    pick(("forward", 8), tried)
    pick(("backward",), tried)
    assert tried[-1] == OTHER
    assert len(json.loads(_autotune.cache_file().read_text())) == 2


def test_only_where_it_is_asked_for(tried: list[Tile], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WALT_KERNELS_AUTOTUNE")
    assert pick(("forward", 8), tried) == SMALL
    monkeypatch.setenv("WALT_KERNELS_AUTOTUNE", "1")
    with _triton.record(_triton.TARGETS["sm_90"]):
        assert pick(("forward", 8), tried) == MIDDLE
    assert tried == []


def test_tiles_that_do_not_fit_are_passed_over(tried: list[Tile]) -> None:
    def trial(tile: Tile) -> None:
        if tile in (LARGE, MIDDLE):
            raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")
        tried.append(tile)

    assert _triton.pick(TABLE, ("forward", 8), CPU, trial) == SMALL


def test_a_damaged_file_is_told_of_and_replaced(tried: list[Tile]) -> None:
    path = _autotune.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.warns(UserWarning, match=r"tiles\.json is ignored"):
        assert pick(("forward", 8), tried) == LARGE
    assert len(json.loads(path.read_text())) == 1
