"""stdout and stderr of a command, which may be a full disk, a closed stream or a pipe that nobody reads."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from tqdm import tqdm

from walt.errors import WaltError, one_line


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Inside, failed writes to stdout and stderr raise nothing, and an OSError in a thread (TensorBoard's) is one line.

    A stream that was closed before Python began becomes the null device: else the next file that is opened would get
    its descriptor, and what libraries write to that.
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


def check_stdout() -> None:
    """WaltError if `terminal`'s stdout could not be written. A closed pipe is no error: its reader has had enough."""
    sys.stdout.flush()
    error = getattr(sys.stdout, "error", None)
    if error is not None and not isinstance(error, BrokenPipeError):
        raise WaltError(f"cannot write the standard output: {getattr(error, 'strerror', None) or error}") from error


def progress_bar(*arguments: Any, shown: bool = True, **options: Any) -> tqdm[Any]:
    """tqdm's; where a command's stderr is a file or pipe, in which it would be one long line, its `disable` is true."""
    in_file = isinstance(sys.stderr, _Forgiving) and not sys.stderr.isatty()
    return tqdm(*arguments, disable=in_file or not shown, **options)


class _Forgiving:
    """A stream that keeps its first error and raises none."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: Exception | None = None
        if isinstance(stream, io.TextIOWrapper):
            self._try(stream.reconfigure, errors="backslashreplace")  # file names need not be text

    def _try(self, work: Callable[..., object], *arguments: object, **options: object) -> None:
        try:
            work(*arguments, **options)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self.error = self.error or error

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(getattr(self._stream, "flush", lambda: None))  # print needs only write

    def isatty(self) -> bool:
        try:
            return bool(self._stream.isatty())
        except (AttributeError, ValueError):  # it has write alone, or is closed
            return False

    def finish(self) -> None:
        """Flush; if that fails, write to the null device, or Python would try again at exit and print a traceback."""
        self.error = None
        self.flush()
        if self.error is not None:
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
