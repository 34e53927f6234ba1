"""Files that are either whole or absent: write under a temporary name, then rename."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from walt.errors import WaltError


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of path (same suffix); on success it takes path's place, on failure it is removed."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise WaltError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """The same for a folder. A kill between the two renames leaves the old folder as `<path>.old` (see `settled`)."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    old = _old(path)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise WaltError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def settled(path: str | Path) -> Path:
    """The complete folder behind path: path itself, or `<path>.old` if a kill struck between the two renames."""
    path = Path(path)
    return _old(path) if not path.exists() and _old(path).exists() else path


def _old(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def write_json(path: str | Path, document: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    try:
        document = json.loads(Path(path).read_text())
    except OSError as error:
        raise WaltError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise WaltError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise WaltError(f"{path} holds a {type(document).__name__}, expected an object")
    return document
