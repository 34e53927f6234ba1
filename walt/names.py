"""Names of files and classes: when two are the same."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection
from pathlib import PurePosixPath


def normal(name: str) -> str:
    """The composed form of Unicode (NFC), in which names are compared: macOS writes the accent of an é on its own."""
    return unicodedata.normalize("NFC", name)


def normal_path(name: str) -> str:
    """The same for a file named relative to its folder, with "/" or "\\" as separator."""
    return normal(str(PurePosixPath(name.strip().replace("\\", "/"))))


def look_alike(names: Collection[str], others: Collection[str]) -> str:
    """ "A is not B" for two names, one of each, with the same letters and digits; "" if there are none."""
    twins = {_letters(other): other for other in others}
    for name in sorted(names):
        other = twins.get(_letters(name), name)
        if other != name:
            return f"{name!a} is not {other!a}"
    return ""


def _letters(name: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isalnum()) or name
