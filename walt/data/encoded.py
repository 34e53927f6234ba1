"""Folders of data encoded once by a frozen network: latents of clips, features of captions.

Each has an index in JSON and numbers in .raw files, read through memory maps. The index names the network's weights
(`walt.checkpoint.fingerprint`) and the data: with others, the folder is refused when opened and made anew when encoded.
It appears under its name when it is complete.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from walt.atomic import latest_complete, read_document
from walt.errors import WaltError

VERSION = 1
INDEX = "index.json"
DTYPES = ("float16", "float32")


def read_index(folder: Path, kind: str) -> dict[str, Any]:
    return read_document(folder / INDEX, "a folder of encoded data", kind, VERSION)


def holds(folder: Path, kind: str, plan: dict[str, Any]) -> bool:
    """Whether the folder exists and was made to this plan; WaltError if something else is in its place."""
    folder = latest_complete(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    index = read_index(folder, kind)
    return all(index.get(name) == value for name, value in plan.items())


def map_numbers(path: Path, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Map the file's numbers as [shape], read-only; WaltError unless it has just as many."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}")
    expected = int(np.prod(shape)) * np.dtype(dtype).itemsize
    held = path.stat().st_size if path.is_file() else 0
    if held != expected:
        raise WaltError(f"{path} is broken: it holds {held} bytes, its index speaks of {expected}")
    return np.memmap(path, dtype, mode="r", shape=shape) if expected else np.zeros(shape, dtype)
