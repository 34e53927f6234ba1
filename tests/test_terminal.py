"""A terminal, file or pipe that takes nothing: training and sampling go on; what only prints ends with one line."""

from __future__ import annotations

import contextlib
import os
import sys

import pytest
from tiny_runs import SHORT, TOKENIZER

from walt.cli import main
from walt.commands import doctor
from walt.commands.evaluate import Evaluate
from walt.commands.train import Train

OVERRIDES = [f"--{text}" for text in (*TOKENIZER, *SHORT)]


@contextlib.contextmanager
def full(buffering: int):
    with contextlib.suppress(OSError), open("/dev/full", "w", buffering=buffering) as stream:
        yield stream


@contextlib.contextmanager
def gone(buffering: int):
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(OSError), os.fdopen(writer, "w", buffering=buffering) as stream:
        yield stream


@contextlib.contextmanager
def absent(_buffering: int):
    """What Python has for a stream that was closed before it began, as by >&-."""
    yield None


@contextlib.contextmanager
def closed(_buffering: int):
    with open(os.devnull, "w") as stream:
        pass
    yield stream


BUFFERINGS = (-1, 1)  # Python's, and with each line, so that already print() fails


@pytest.mark.parametrize("fault", [full, gone, absent, closed])
@pytest.mark.parametrize("names", [("stdout",), ("stderr",), ("stdout", "stderr")], ids="+".join)
@pytest.mark.parametrize("buffering", BUFFERINGS)
def test_a_training_goes_on(films, tmp_path, capsys, monkeypatch, fault, names, buffering):
    with fault(buffering) as stream, monkeypatch.context() as patch:
        for name in names:
            patch.setattr(sys, name, stream)
        assert main(["train", "tokenizer", "--data", str(films), "--out", str(tmp_path), *OVERRIDES]) == 0
        if fault in (full, gone):
            stream.flush()  # what was left in its buffer is given up, or Python would try again at its end
    assert (tmp_path / "tokenizer" / "config.json").is_file()
    assert (f"{tmp_path / 'tokenizer'}: 2 steps" in capsys.readouterr().out) == ("stdout" not in names)


@pytest.mark.parametrize("buffering", BUFFERINGS)
@pytest.mark.parametrize(
    "arguments", [["info"], ["doctor"], ["evaluate", "--from", "x", "--data", "y"], ["--help"], ["info", "--help"]]
)
def test_what_only_prints(arguments, buffering, capsys, monkeypatch):
    """A full disk is an error; a reader who has gone has read enough; and nothing was wanted of a closed stream."""
    monkeypatch.setattr(Evaluate, "run", lambda _: print("FVD 12"))
    monkeypatch.setattr(doctor, "diagnose", lambda _: ["compilers: g++"])  # asking takes seconds

    def code(fault) -> int:
        with fault(buffering) as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            try:
                return main(arguments)
            finally:
                if fault in (full, gone):
                    stream.flush()

    assert code(full) == 2
    assert capsys.readouterr().err == "walt: error: cannot write the standard output: No space left on device\n"
    for fault in (gone, absent):
        assert code(fault) == 0
        assert capsys.readouterr().err == ""


def test_errors_without_a_standard_error(capsys, monkeypatch):
    """The exit code tells; the line does not come out elsewhere."""
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["info", "nowhere"]) == 2
    assert main(["dance"]) == 2
    assert capsys.readouterr().out == ""


def test_a_stream_that_takes_more_later(capsys, monkeypatch):
    """As a disk that is full for a while."""

    class Disk:
        full, text = True, ""

        def write(self, text: str) -> None:
            if self.full:
                raise OSError(28, "No space left on device")
            self.text += text

        def flush(self) -> None:
            pass

    disk = Disk()

    def say(_) -> None:
        print("lost")
        disk.full = False
        print("written")

    monkeypatch.setattr(sys, "stdout", disk)
    monkeypatch.setattr(Train, "run", say)
    assert main(["train", "tokenizer", "--data", "x", "--out", "y"]) == 0
    assert disk.text.strip() == "written"


def test_a_stream_that_has_write_alone(monkeypatch):
    """Which is all that print asks for."""
    parts: list[str] = []

    class Stream:
        def write(self, text: str) -> None:
            parts.append(text)

    monkeypatch.setattr(sys, "stdout", Stream())
    assert main(["info", "minimal"]) == 0
    assert "tokenizer" in "".join(parts)
