"""Captions of the files of a folder, from a CSV or JSONL file beside or outside it."""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from walt.errors import WaltError, WaltWarning
from walt.model.text import TextEncoder
from walt.names import look_alike, normal_path, some
from walt.terminal import one_line

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
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise WaltError(f"cannot read {path}: {error.strerror or error}") from error
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


def warn_of_cuts(what: str, names: Sequence[str], texts: Sequence[str], encoder: TextEncoder) -> None:
    """WaltWarning that counts the texts which the encoder cuts, if there are any, and lists the names of some.

    what: the plural that the texts go by.
    """
    cut = [name for name, count in zip(names, encoder.count(texts), strict=True) if count > encoder.length]
    if cut:
        are = "is" if len(cut) == 1 else "are"
        limit = f"the {encoder.length} {encoder.unit} that the text encoder {encoder.name!r} reads"
        which = f"{len(cut)} of {len(texts)} {what}" if len(texts) > 1 else f"the {what.removesuffix('s')}"
        line = f"{which} {are} longer than {limit} (transformer.text_length), and {are} cut"
        warnings.warn(WaltWarning(f"{line}: {some(cut, LISTED)}"), stacklevel=3)


def encode_sentences(encoder: TextEncoder, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens of the sentences and their mask, no longer than the longest one: padding costs time and changes nothing.

    WaltWarning for sentences that are cut; ValueError for what is no Unicode.
    """
    "".join(sentences).encode()  # the encoders' errors are less clear
    tokens, mask = encoder.encode(sentences)
    distinct = sorted({*sentences} - {""})
    warn_of_cuts("sentences", [_beginning(sentence) for sentence in distinct], distinct, encoder)
    used = mask.any(dim=0)
    return tokens[:, used], mask[:, used]


def _beginning(sentence: str) -> str:
    """Its first characters on one line: where a language has no spaces, a word may be the whole sentence."""
    line = one_line(sentence)
    return repr(line if len(line) <= 60 else f"{line[:57]}...")
