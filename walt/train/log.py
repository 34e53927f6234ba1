"""The log of a training run: a JSONL file with a row for each logged step, and TensorBoard beside it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from walt.atomic import atomic_write, writing
from walt.errors import WaltError, say


class RunLog:
    """Writes rows to `path` and their numbers to `<path less suffix>.tensorboard`.

    tensorboard: None, if it is installed; True: WaltError if it is not; False: never.

    Errors do not stop the run: rows that cannot be written are kept, with one line, and written with a later row.
    TensorBoard is given up after its first error.
    """

    def __init__(self, path: Path, tensorboard: bool | None = None) -> None:
        self.path, self.folder = path, path.with_suffix(".tensorboard")
        self._kept: list[str] = []  # rows that are not written yet
        self._summary = _summary_writer() if tensorboard is not False else None
        if tensorboard and self._summary is None:
            raise WaltError('tensorboard is not installed; install it with: pip install "walt-kernels[train]"')
        self._events: Any = None

    def rewind(self, step: int) -> None:
        """Drop the rows of later steps than `step`, from which the run goes on. WaltError if it cannot be written."""
        rows = [row for row in read_log(self.path) if row["step"] <= step]
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        make = self._summary
        if make is not None:
            self.close()
            self._events = self._record(lambda: make(str(self.folder), purge_step=step + 1))

    def write(self, row: Mapping[str, float]) -> None:
        told = bool(self._kept)
        self._kept.append(json.dumps(row) + "\n")
        error = self._write_kept()
        if error is not None and not told:
            say(f"{error}; training goes on, and the rows are written when they can be")
        if self._events is not None:
            self._record(lambda: self._add(row))

    def _write_kept(self) -> WaltError | None:
        try:
            with writing(self.path):
                _append(self.path, "".join(self._kept))
        except WaltError as error:
            return error
        self._kept.clear()
        return None

    def _add(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                self._events.add_scalar(name, value, int(row["step"]))

    def _record(self, work: Callable[[], Any]) -> Any:
        """The result of `work` with TensorBoard, which is given up after an error."""
        try:
            with writing(self.folder):
                return work()
        except WaltError as error:
            say(f"{error}; training goes on without it")
            self._events = None

    def close(self) -> None:
        if self._kept and (error := self._write_kept()) is not None:
            say(f"{error}; the last {len(self._kept)} rows are lost")
        if self._events is not None:
            self._record(self._events.close)
            self._events = None


def _append(path: Path, text: str) -> None:
    """All of the text or, with an OSError, nothing of it: half a row would hide the rows after it."""
    rest = text.encode()
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
