"""What a command writes to its terminal, or to the file or pipe in its place, which may be full or closed."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO, cast

from walt.errors import WaltError


def one_line(error: BaseException | str | None) -> str:
    return " ".join(str(error).split())


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Within, an OSError of a thread (TensorBoard's) is a line, and what stderr cannot take stops nothing."""
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if issubclass(failed.exc_type, OSError):
            print(f"walt: {one_line(failed.exc_value)}", file=sys.stderr)
        else:
            before(failed)

    threading.excepthook = hook
    try:
        with contextlib.redirect_stderr(cast(TextIO, _Forgiving(sys.stderr))):
            yield
    finally:
        threading.excepthook = before


class _Forgiving:
    """stderr, where progress bars go, may be a file on a full disk: there is no one left to tell."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._forgiven():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._forgiven():
            self._stream.flush()

    @contextlib.contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # the reader has gone, and has the run end
            raise
        except OSError:
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def flush_output() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        give_up_output()
        raise WaltError(f"cannot write the standard output: {error.strerror or error}") from error


def give_up_output() -> None:
    """What stdout still holds goes nowhere, or Python would try again at its end and print a traceback."""
    with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
