"""The log of a training run: a JSONL file with a row for each logged step, and TensorBoard beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from walt.errors import WaltError
from walt.files import replacing


class RunLog:
    """Writes rows to `path` and their numbers to `<path less suffix>.tensorboard`.

    tensorboard: None, if it is installed; True, or WaltError; False, never.
    """

    def __init__(self, path: Path, tensorboard: bool | None = None) -> None:
        self.path = path
        self._summary = _summary_writer() if tensorboard is not False else None
        if tensorboard and self._summary is None:
            raise WaltError('tensorboard is not installed; install it with: pip install "walt-kernels[train]"')
        self._events: Any = None

    def rewind(self, step: int) -> None:
        """Drop the rows of later steps than `step`, from which the run goes on."""
        rows = [row for row in read_log(self.path) if row["step"] <= step]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if self._summary is not None:
            self.close()
            self._events = self._summary(str(self.path.with_suffix(".tensorboard")), purge_step=step + 1)

    def write(self, row: Mapping[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._events is not None:
            for name, value in row.items():
                if name != "step":
                    self._events.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None


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
