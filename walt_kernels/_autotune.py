"""Times the tiles of a kernel on the GPU at hand (WALT_KERNELS_AUTOTUNE=1) and keeps the fastest on disk.

The cache, ``walt_kernels/tiles.json`` in the user's cache folder, is keyed on all that changes the code: shape class,
sources of the op's kernels and tiles, Triton's version and the GPU. Sequence lengths are no part of a shape class, so a
new clip length does not tune again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from ._triton import Table, Tile


def cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "walt_kernels" / "tiles.json"


@functools.cache
def _source_hash(folder: Path) -> str:
    sources = sorted(folder.glob("triton_*.py"))
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def _key(key: tuple[Any, ...], device: torch.device, trial: Callable[[Tile], None]) -> str:
    folder = Path(str(sys.modules[trial.__module__].__file__)).parent
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return "|".join([folder.name, *map(str, key), _source_hash(folder), triton.__version__, gpu])


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no table")
        return content
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is ignored and will be written anew: {error}", stacklevel=2)
        return {}


def _write(path: Path, content: dict[str, Any]) -> None:
    """All or nothing: another process reads the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(content, file, indent=1, sort_keys=True)
    os.replace(file.name, path)


def _milliseconds(run: Callable[[], None]) -> float:
    return float(triton.testing.do_bench(run, return_mode="median"))


@functools.cache
def _kept(path: Path) -> dict[str, Any]:
    return _read(path)


def _tile(entry: dict[str, Any]) -> Tile:
    return Tile(entry["blocks"], entry["warps"], entry["stages"])


def kept(key: tuple[Any, ...], device: torch.device, trial: Callable[[Tile], None]) -> Tile | None:
    """The tile that was found the fastest, None where none was timed."""
    found = _kept(cache_file()).get(_key(key, device, trial))
    return None if found is None else _tile(found)


def fastest(
    table: Table, key: tuple[Any, ...], chosen: Tile, device: torch.device, trial: Callable[[Tile], None]
) -> Tile:
    """Of all tiles that ``table`` lists for the kernel ``key[0]``, the one that runs ``trial`` in the least time.

    A tile that does not compile or does not fit this GPU is passed over; where none does, ``chosen`` stays.
    """
    path, name = cache_file(), _key(key, device, trial)
    found = _kept(path).get(name)
    if found is None:
        others = (tile for k, choices in table.items() if k[0] == key[0] for tile in choices.values())
        times: dict[Tile, float] = {}
        for tile in dict.fromkeys([chosen, *others]):
            try:
                times[tile] = _milliseconds(lambda tile=tile: trial(tile))  # type: ignore[misc]
            except (triton.runtime.errors.OutOfResources, triton.CompilationError):
                continue
        best = min(times, key=times.__getitem__, default=chosen)
        found = {"blocks": dict(best.blocks), "warps": best.warps, "stages": best.stages}
        _kept(path)[name] = found
        _write(path, _read(path) | {name: found})
    return _tile(found)
