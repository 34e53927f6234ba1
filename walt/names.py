"""Names of files and classes: which of them are the same, and how a message shows them."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from pathlib import PurePosixPath

LISTED = 10  # names in a message


def normal(name: str) -> str:
    """The composed form of Unicode (NFC), in which names are compared: macOS writes the accent of an é on its own."""
    return unicodedata.normalize("NFC", name)


def normal_path(name: str) -> str:
    """The same for a file named relative to its folder, with "/" or "\\" between the parts."""
    return normal(str(PurePosixPath(name.strip().replace("\\", "/"))))


def some(names: Collection[str], most: int = LISTED) -> str:
    """The first names in their order, and how many more there are; what cannot be seen in a name is escaped."""
    shown = [name if name.isprintable() else ascii(name) for name in sorted(names)[:most]]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def look_alike(names: Collection[str], others: Collection[str]) -> str:
    """Two names, one of each, with the same letters and digits, all else escaped; "" if there are none."""
    twins = {_letters(other): other for other in others}
    for name in sorted(names):
        other = twins.get(_letters(name), name)
        if other != name:
            return f"{name!a} is not {other!a}"
    return ""


def _letters(name: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isalnum()) or name
