"""What a command writes to its terminal, or to the file or pipe in its place, which may be full, closed or unread."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from walt.errors import WaltError, one_line


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Within, what stdout and stderr cannot take stops nothing, and an OSError of a thread (TensorBoard's) is a line.

    A stream that was closed before Python began becomes the null device: else the next file that is opened would have
    its number, and what libraries write to that.
    """
    before = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if issubclass(failed.exc_type, OSError):
            print(f"walt: {one_line(failed.exc_value)}", file=sys.stderr)
        else:
            before(failed)

    with contextlib.ExitStack() as stack:
        threading.excepthook = hook
        stack.callback(setattr, threading, "excepthook", before)
        for redirect, stream in ((contextlib.redirect_stdout, sys.stdout), (contextlib.redirect_stderr, sys.stderr)):
            forgiving = _Forgiving(stream or stack.enter_context(open(os.devnull, "w")))
            stack.callback(forgiving.finish)
            stack.enter_context(redirect(cast(TextIO, forgiving)))
        yield


def check_output() -> None:
    """WaltError if `terminal`'s stdout did not take everything; the reader of a pipe who has gone has had enough."""
    sys.stdout.flush()
    error = getattr(sys.stdout, "error", None)
    if error is not None and not isinstance(error, BrokenPipeError):
        raise WaltError(f"cannot write the standard output: {getattr(error, 'strerror', None) or error}") from error


class _Forgiving:
    """A stream of which the first error is kept, and none is raised."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: Exception | None = None
        if isinstance(stream, io.TextIOWrapper):
            self._try(stream.reconfigure, errors="backslashreplace")  # names of files may be no text

    def _try(self, work: Callable[..., object], *arguments: object, **options: object) -> None:
        try:
            work(*arguments, **options)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self.error = self.error or error

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(getattr(self._stream, "flush", lambda: None))  # print needs write alone

    def finish(self) -> None:
        """What the stream still holds goes nowhere, or Python would try again at its end and print a traceback."""
        self.error = None
        self.flush()
        if self.error is not None:
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
