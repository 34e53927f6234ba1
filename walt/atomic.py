"""Files that are complete or absent, even after a kill or a power cut: written under another name, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from walt.errors import WaltError
from walt_kernels.values import plain


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """An OSError inside becomes a WaltError that names the path and the reason."""
    try:
        yield
    except OSError as error:
        raise WaltError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """`writing` for code that reads."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise WaltError(f"cannot read {path}: {why}", reason=f"cannot be read: {why}") from error


def no_folder(path: Path, hint: str = "") -> WaltError:
    """The error where a folder is expected and there is none."""
    return WaltError(f"{path} is a file; expected a folder" if path.exists() else f"no such folder: {path}{hint}")


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of path (same suffix); on success it takes path's place, on failure it is removed."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            flush(temporary)
            temporary.replace(path)
            flush(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_writable(path: str | Path) -> None:
    """WaltError if `atomic_write` cannot put a file at path. Call it before the work whose result goes there."""
    path = Path(path)
    with writing(path):
        if path.is_dir():
            raise WaltError(f"cannot write {path}: it is a folder")
        folder = path.absolute().parent
        while not folder.exists():
            folder = folder.parent
        trial = _temporary(folder / path.name)
        trial.touch()
        trial.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.stem[:50]}.{os.getpid()}{path.suffix}")  # names have a greatest length


@contextlib.contextmanager
def atomic_folder(path: str | Path, keep_as: Path | None = None) -> Iterator[Path]:
    """`atomic_write` for a folder. A kill between its renames leaves the old one as `<path>.old` (`latest_complete`).

    The folder that is replaced is removed, or moved to `keep_as`. Everything is on the disk before the first rename.
    """
    path = Path(path)
    temporary, old = staging(path), _old(path)
    try:
        with writing(path):
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                flush(file)
            flush(temporary)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)
            temporary.rename(path)
            flush(path.parent)
            if keep_as is not None and old.exists():
                shutil.rmtree(keep_as, ignore_errors=True)
                old.rename(keep_as)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def staging(path: Path) -> Path:
    """Where `atomic_folder` gathers the files of path: one name for all processes that write them together."""
    return path.with_name(f".{path.name}.new")


def latest_complete(path: str | Path) -> Path:
    """The complete folder behind path: path itself, or `<path>.old` if a kill struck between the two renames."""
    path = Path(path)
    return _old(path) if not path.exists() and _old(path).exists() else path


def _old(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def flush(path: Path) -> None:
    """fsync a file, or a folder's list of names (which Windows cannot)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, document: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2, default=plain) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    try:
        with reading(path):
            document = json.loads(Path(path).read_text())
    except ValueError as error:
        raise WaltError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise WaltError(f"{path} holds a {type(document).__name__}, expected an object")
    return document


def read_document(path: Path, what: str, kind: str, version: int, advice: str = "") -> dict[str, Any]:
    """Read the JSON file that marks its folder as `what`, such as "a checkpoint".

    WaltError unless its "format" is `kind` and its "version" is `version`; `advice` is what to do about another one.
    """
    if not path.is_file():
        raise WaltError(f"{path.parent} is not {what}: it has no {path.name}")
    document = read_json(path)
    if document.get("format") != kind:
        raise WaltError(f'{path} is not that of {what}: its "format" is {document.get("format")!r}, expected {kind!r}')
    if document.get("version") != version:
        raise WaltError(f"{path} has version {document.get('version')!r}; this walt reads version {version}{advice}")
    return document


def write_new_array(array: np.ndarray, folder: Path, name: str) -> Path:
    """Write <name>.npy, or the first of <name>.1.npy, <name>.2.npy, ... that is free, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in count():
        path = folder / (f"{name}.{number}.npy" if number else f"{name}.npy")
        with contextlib.suppress(FileExistsError):
            file = path.open("xb")
            break
    try:
        with file:
            np.save(file, array)
        flush(path)
    except BaseException:
        path.unlink()
        raise
    return path
