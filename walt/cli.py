"""The command line. A command's module, and PyTorch with it, is imported only to run it."""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from walt.errors import Interrupted, WaltError, WaltWarning, nearest_or_all, one_line
from walt.terminal import check_stdout, terminal

if TYPE_CHECKING:
    from walt.commands.options import Command

BAD_INPUT = 2
# Module and class in walt.commands, and what the command does.
COMMANDS = {
    "demo": ("demo.Demo", "show what the model in this package makes, then train one from nothing: a report"),
    "demo-data": ("data.DemoData", "write a small data set of captioned clips in class folders, rendered by ViZDoom"),
    "prepare": ("data.Prepare", "decode a folder of videos and images once, for training that starts at once"),
    "train": (
        "train.Train",
        "train a stage: the tokenizer, then the base model, then super-resolution, all with one --out",
    ),
    "sample": ("sample.Sample", "sample clips or pictures: of a class, of a sentence, from first frames"),
    "extend": ("sample.Extend", "make a video longer: go on from its last 5 frames, again and again"),
    "upscale": (
        "sample.Upscale",
        "make a video larger: twice the height and width by each super-resolution stage",
    ),
    "encode": ("latents.Encode", "video or picture to latents"),
    "decode": ("latents.Decode", "latents back to a video"),
    "evaluate": (
        "evaluate.Evaluate",
        "measure reconstructions (PSNR, SSIM) or samples (FVD and others) against real clips",
    ),
    "info": ("info.Info", "shapes, parameters, FLOPs and memory of presets and trained models; the card of tiny-doom"),
    "doctor": ("doctor.Doctor", "what of this machine would stop or slow down a run"),
}
PRINTING = ("evaluate", "info", "doctor")  # commands that fail if what they print cannot be written
RESUMED = ("demo", "prepare", "train")  # commands that resume when they are run again


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit code: 0, 2 after a user error (one line on stderr), or 128 + N after signal N."""
    with terminal(), _sigterm_interrupts(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        speaker = "walt"
        try:
            name, *options = (sys.argv[1:] if argv is None else argv) or [""]
            if name in ("", "-h", "--help"):
                print(usage())
                return _printed()
            if name not in COMMANDS:
                raise WaltError(f"unknown command {name!r}{nearest_or_all(name, COMMANDS)}")
            speaker = f"walt {name}"  # in errors about its options
            try:
                command = parse(name, options)
            except SystemExit:  # after --help
                command = None
            speaker = "walt"
            if command:
                command.run()
            return _printed() if command is None or name in PRINTING else 0
        except (WaltError, OSError) as error:
            print(f"{speaker}: error: {one_line(error)}", file=sys.stderr)
            return BAD_INPUT
        except KeyboardInterrupt as interruption:
            what = f": {interruption}" if str(interruption) else ""
            again = "; run the same command again to go on" if name in RESUMED else ""
            print(f"\nwalt: interrupted{what}{again}", file=sys.stderr)
            return 128 + getattr(interruption, "signal", signal.SIGINT)  # as shells report it


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM, which clusters send, ends a command as Ctrl-C does; training has a handler of its own."""

    def handle(number: int, _frame: FrameType | None) -> None:
        raise Interrupted("", number)

    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _printed() -> int:
    check_stdout()
    return 0


def usage() -> str:
    lines = "\n".join(f"    {name:<12}{text}" for name, (_, text) in COMMANDS.items())
    return f"""usage: walt COMMAND [OPTIONS]

W.A.L.T video diffusion: prepare data, train, sample, measure.

commands:
{lines}

walt COMMAND --help lists the options of a command."""


def parse(name: str, arguments: Sequence[str]) -> Command:
    """The command of this name with its options; SystemExit(0) after --help."""
    place, text = COMMANDS[name]
    module, _, kind = place.partition(".")
    command: type[Command] = getattr(importlib.import_module(f"walt.commands.{module}"), kind)
    return command.parse(f"walt {name}", text, arguments)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """A WaltWarning as one line, like an error; others as Python does."""
    ours = issubclass(category, WaltWarning)
    text = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(f"walt: warning: {one_line(message)}\n" if ours else text)
