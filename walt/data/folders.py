"""Which files of a folder are data, and which are passed over, by reason."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from walt.atomic import no_folder, reading
from walt.errors import LISTED, WaltError, some
from walt.names import normal

# What other software leaves in a folder, beside names that begin with a dot; in lower case.
LEFT = {"__macosx", "__pycache__", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "lost+found"}
LEFT |= {"system volume information", "thumbs.db", "desktop.ini"}


class PassedOver:
    """Names of files and folders that are not used, by reason."""

    def __init__(self, names: dict[str, list[str]] | None = None) -> None:
        self.names = names or {}

    def add(self, reason: str, name: str) -> None:
        self.names.setdefault(reason, []).append(name)

    def __len__(self) -> int:
        return sum(map(len, self.names.values()))

    def lines(self) -> Iterator[str]:
        """A line for each reason, with its count and up to ten names; reasons after the tenth share a line."""
        reasons = sorted(self.names.items(), key=lambda item: -len(item[1]))
        if len(reasons) > LISTED:
            rest = [name for _, names in reasons[LISTED - 1 :] for name in names]
            reasons[LISTED - 1 :] = [(f"{len(reasons) - LISTED + 1} other reasons", rest)]
        for reason, names in reasons:
            yield f"passed over, {reason}: {len(names)} ({some(names)})"


def find_files(source: Path, suffixes: Collection[str], ignore: Collection[Path] = ()) -> tuple[list[str], PassedOver]:
    """Names of the files under `source` with one of the endings, relative to it and sorted, and what is passed over.

    Links are followed. A folder that links lead to from several places, or from inside itself, is read once: where it
    is, or else at the first link. What is in `ignore` is not mentioned. WaltError if `source` is not a folder that can
    be read.
    """
    with reading(source):
        if not source.is_dir():
            raise no_folder(source)
    names, passed = [], PassedOver()
    ignored = {os.path.realpath(path) for path in ignore}
    seen = {str(parent) for parent in Path(os.path.realpath(source)).parents}
    folders: list[Path] = [source]
    links: list[Path] = []  # they wait until all else is read
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        if (real := os.path.realpath(folder)) in seen:
            passed.add("folder that is read already", _name(folder, source))
            continue
        seen.add(real)
        try:
            paths = sorted(folder.iterdir())
        except OSError as error:
            if folder == source:
                raise WaltError(f"cannot read {source}: {error.strerror or error}") from error
            passed.add(f"folder that cannot be read: {error.strerror or error}", _name(folder, source))
            continue
        for path in paths:
            if os.path.join(real, path.name) in ignored:
                continue
            reason = _reason(path, suffixes)
            if reason:
                passed.add(reason, _name(path, source))
            elif not path.is_dir():
                names.append(_name(path, source))
            elif path.is_symlink():
                links.append(path)
            else:
                folders.append(path)
    return sorted(names, key=lambda name: (normal(name), name)), passed


def changes(before: Mapping[str, object], now: Mapping[str, object], noun: str = "file") -> Iterator[str]:
    """How {name: content} differs: "2 files more: c.mp4, d.mp4", "1 file fewer: b.mp4", "1 file changed: a.mp4"."""
    kept = before.keys() & now.keys()
    named = {"more": now.keys() - kept, "fewer": before.keys() - kept}
    named["changed"] = {name for name in kept if before[name] != now[name]}
    for how, names in named.items():
        if names:
            yield f"{len(names)} {noun}{'s' * (len(names) > 1)} {how}: {some(names)}"


def class_of(name: str) -> str | None:
    """The folder that a file lies in; None for a file of the source folder itself."""
    return normal(Path(name).parent.name) if "/" in name else None


def _name(path: Path, source: Path) -> str:
    return path.relative_to(source).as_posix()


def _reason(path: Path, suffixes: Collection[str]) -> str:
    """Why neither a file of data nor a folder, or ""."""
    if path.name.startswith(".") or path.name.casefold() in LEFT:
        return "hidden or left by other software"
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return "link that cannot be followed" if os.path.islink(path) else f"cannot be read: {error.strerror or error}"
    if stat.S_ISDIR(mode):
        return ""
    if path.suffix.lower() not in suffixes:
        return "unknown ending"
    return "" if stat.S_ISREG(mode) else "neither file nor folder"
