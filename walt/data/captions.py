"""Captions of the files of a folder, from a CSV or JSONL file beside or outside it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from walt.atomic import reading
from walt.errors import WaltError, some
from walt.names import look_alike, normal_path

LISTED = 5  # names in a message


def read_captions(path: str | Path) -> dict[str, str]:
    """{file, relative to the folder, by `walt.names.normal_path`: caption}; UTF-8, with or without a byte order mark.

    CSV has a header that names the columns "file" and "caption"; a line of JSONL is {"file": ..., "caption": ...}.
    Others are allowed and ignored. WaltError names the line of a malformed row and of a file's second caption.
    """
    path = Path(path)
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    if path.suffix.lower() not in readers:
        raise WaltError(f"{path}: captions must be in a file that ends in {' or '.join(readers)}")
    try:
        with reading(path):
            text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise WaltError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    captions: dict[str, str] = {}
    for line, file, caption in readers[path.suffix.lower()](path, text):
        for name, value in (("file", file), ("caption", caption)):
            if not isinstance(value, str) or not value.strip():
                raise WaltError(f"{path}, line {line}: {name} is {value!r}, expected a text")
        name = normal_path(file)
        if name in captions:
            raise WaltError(f"{path}, line {line}: {name} has a caption already")
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise WaltError(f"{path}, line {line}: caption is {caption!r}, which is no Unicode text") from error
        captions[name] = caption.strip()
    if not captions:
        raise WaltError(f"{path} holds no caption")
    return captions


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Any, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if "file" not in header or "caption" not in header:
            raise WaltError(f"{path}, line 1: the header is {','.join(header)!r}, expected file,caption")
        for row in reader:
            if row and len(row) != len(header):
                raise WaltError(f"{path}, line {reader.line_num}: {len(row)} fields, expected {len(header)}")
            if row:
                yield reader.line_num, row[header.index("file")], row[header.index("caption")]
    except csv.Error as error:
        raise WaltError(f"{path}, line {reader.line_num}: {error}") from error


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[int, Any, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise WaltError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise WaltError(f'{path}, line {number}: a {type(row).__name__}, expected {{"file": ..., "caption": ...}}')
        yield number, row.get("file"), row.get("caption")


def check_captions(captions: Collection[str], files: Collection[str], say: Callable[[str], None]) -> None:
    """Name the captions without files and the files without captions; WaltError if no caption has its file.

    Both by `walt.names.normal_path`.
    """
    known, found = set(captions), set(files)
    alike = look_alike(known - found, found - known)
    if not known & found:
        raise WaltError(
            f"none of the {len(known)} captions names a file of the folder: they name {some(known, LISTED)};"
            f" it holds {some(found, LISTED)}{alike and f' ({alike})'}"
        )
    for what, names in (("captions without a file", known - found), ("files without a caption", found - known)):
        if names:
            say(f"{len(names)} {what}: {some(names, LISTED)}")
    if alike:
        say(alike)
