"""Writing that fails: training outlives its log, previews and checkpoints; every command says it in one line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import sys
import threading
import types

import pytest
import torch
from command_line import fails
from on_ranks import fit, regression
from tiny_runs import SHORT, TOKENIZER, TRANSFORMER, moving
from tiny_runs import fit as fit_stage

from walt import atomic, checkpoint
from walt.checkpoint import read_tensors
from walt.cli import main
from walt.commands.info import Info
from walt.data.video import write_mp4
from walt.errors import WaltError
from walt.train.log import read_log

CODES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)


@contextlib.contextmanager
def no_file_longer_than(size: int):
    """What a disk does that is full: a write is cut short, the next one fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def at_steps(first: int, last: int, fault):
    """A loss, with the context `fault()` around the steps from `first` to `last` - 1."""
    step = [0]
    with contextlib.ExitStack() as stack:

        def loss(model, rows):
            step[0] += 1
            if step[0] == first:
                stack.enter_context(fault())
            if step[0] == last:
                stack.close()
            return regression(model, rows)

        yield loss


@contextlib.contextmanager
def no_checkpoints():
    with pytest.MonkeyPatch.context() as patch:

        def full(path, _tensors):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(checkpoint, "write_tensors", full)
        yield


class TestTraining:
    @pytest.mark.parametrize("room", [0, 10])
    def test_a_log_that_is_full_for_a_while(self, tmp_path, capsys, room):
        """`room` bytes of the next row are written: the row is whole in the end, and so are those after it."""
        log = tmp_path / "a.jsonl"
        with at_steps(3, 6, lambda: no_file_longer_than(log.stat().st_size + room)) as loss:
            fit(tmp_path / "a", 8, loss=loss, save_every=99, tensorboard=False).run()
        said = capsys.readouterr().err
        assert said.count(f"cannot write {log}: File too large; training goes on, and the rows are written when") == 1
        fit(tmp_path / "whole", 8, tensorboard=False).run()
        rows = [read_log(tmp_path / f"{name}.jsonl") for name in ("a", "whole")]
        assert [row["step"] for row in rows[0]] == list(range(1, 9))
        assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]

    def test_a_log_that_stays_full(self, tmp_path, capsys):
        log = tmp_path / "a.jsonl"

        @contextlib.contextmanager
        def full():
            log.unlink()
            log.symlink_to("/dev/full")
            yield

        with at_steps(2, 99, full) as loss:
            trainer = fit(tmp_path / "a", 5, loss=loss, tensorboard=False)
            trainer.run()
        assert trainer.finished
        assert fit(tmp_path / "a", 5).resume()
        said = capsys.readouterr().err
        assert said.count("; training goes on") == 1
        assert f"cannot write {log}: No space left on device; the last 4 rows are lost" in said

    def test_a_log_that_cannot_be_begun(self, tmp_path):
        (tmp_path / "a.jsonl").mkdir()
        trainer = fit(tmp_path / "a", 2, tensorboard=False)
        with pytest.raises(WaltError, match=r"cannot write .*/a.jsonl: Is a directory"):
            trainer.run()
        assert trainer.step == 0  # told at once

    def test_a_checkpoint_in_between(self, tmp_path, capsys):
        with at_steps(4, 6, no_checkpoints) as loss:
            fit(tmp_path / "a", 8, loss=loss, save_every=2, keep=2).run()
        message = f"cannot write {tmp_path / 'a'}: No space left on device; it still holds step 2, and training goes on"
        assert capsys.readouterr().err.count(message) == 1
        folders = [path for path in tmp_path.iterdir() if path.is_dir() and "tensorboard" not in path.name]
        steps = {path.name: json.loads((path / "state.json").read_text())["step"] for path in folders}
        assert steps == {"a": 8, "a.step000000006": 6}
        fit(tmp_path / "whole", 8).run()
        for name in ("model", "ema", "optimizer"):
            ours, theirs = (read_tensors(tmp_path / folder / f"{name}.safetensors") for folder in ("a", "whole"))
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    def test_the_first_checkpoint(self, tmp_path, capsys):
        with at_steps(1, 4, no_checkpoints) as loss:
            fit(tmp_path / "a", 5, loss=loss, save_every=2).run()
        assert "; it holds no checkpoint yet, and training goes on" in capsys.readouterr().err
        assert json.loads((tmp_path / "a" / "state.json").read_text())["step"] == 5

    def test_the_last_checkpoint(self, tmp_path):
        with (
            at_steps(5, 99, no_checkpoints) as loss,
            pytest.raises(WaltError, match=r"cannot write .*/a: No space left on device; it still holds step 4$"),
        ):
            fit(tmp_path / "a", 5, loss=loss, save_every=2).run()
        again = fit(tmp_path / "a", 5)
        assert again.resume()
        again.run()
        assert again.step == 5

    def test_a_diverged_run(self, tmp_path):
        with at_steps(3, 99, no_checkpoints) as fault:

            def loss(model, rows):
                value, values = fault(model, rows)
                return value * (float("nan") if trainer.step == 3 else 1.0), values

            trainer = fit(tmp_path / "a", 6, loss=loss, save_every=2)
            message = r"became nan at step 4 .*; cannot write .*/a: No space left on device; it still holds step 2$"
            with pytest.raises(WaltError, match=message):
                trainer.run()

    def test_previews(self, tmp_path, capsys):
        def preview(_module, step):
            with no_file_longer_than(0):
                write_mp4(tmp_path / f"{step}.mp4", moving(0, 5))

        fit(tmp_path / "a", 4, preview=preview, preview_every=2).run()
        said = capsys.readouterr().err
        for step in (2, 4):
            assert f"cannot write {tmp_path / f'{step}.mp4'}: File too large; training goes on" in said
        assert [path.name for path in tmp_path.glob("*.mp4")] == []

    @pytest.mark.parametrize("where", ["made", "add_scalar", "close"])
    def test_tensorboard(self, tmp_path, monkeypatch, capsys, where):
        def fault(name):
            if name == where:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        class Summary:
            def __init__(self, *_, **__):
                fault("made")

            def add_scalar(self, *_):
                fault("add_scalar")

            def close(self):
                fault("close")

        module = types.ModuleType("torch.utils.tensorboard")
        module.SummaryWriter = Summary
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
        trainer = fit(tmp_path / "a", 3)
        trainer.run()
        assert trainer.finished
        assert len(read_log(tmp_path / "a.jsonl")) == 3
        message = f"cannot write {tmp_path / 'a.tensorboard'}: No space left on device; training goes on without it"
        assert capsys.readouterr().err.count(message) == 1


@pytest.fixture(scope="module")
def model(films, tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "run"
    fit_stage("tokenizer", films, out)
    fit_stage("base", films, out, "transformer.frame_condition=true")
    fit_stage("sr1", films, out, "data.height=32", "data.width=32", "transformer.patch=2")
    write_mp4(out / "clip.mp4", moving(0, 5, 16, 16))
    assert (
        main(["encode", "--from", str(out), "--video", str(out / "clip.mp4"), "--out", str(out / "l.safetensors")]) == 0
    )
    return out


OVERRIDES = [f"--{text}" for text in (*TOKENIZER, *TRANSFORMER, *SHORT)]
QUICK = ["--from", "MODEL", "--steps", "1"]
COMMANDS = {  # and what cannot be written
    "prepare": (["prepare", "--data", "FILMS", "--out", "OUT/prepared", "--size", "16"], "OUT/prepared"),
    "train tokenizer": (["train", "tokenizer", "--data", "FILMS", "--out", "OUT/run", *OVERRIDES], "OUT/run/"),
    "train base": (["train", "base", "--data", "FILMS", "--out", "MODEL", *OVERRIDES, "--data.frames=1"], "MODEL/"),
    "sample mp4": (["sample", *QUICK, "--out", "OUT/a.mp4"], "OUT/a.mp4"),
    "sample gif": (["sample", *QUICK, "--out", "OUT/a.gif"], "OUT/a.gif"),
    "sample png": (["sample", *QUICK, "--images", "--out", "OUT/a.png"], "OUT/a.png"),
    "extend": (["extend", *QUICK, "--video", "MODEL/clip.mp4", "--frames", "9", "--out", "OUT/a.mp4"], "OUT/a.mp4"),
    "upscale": (["upscale", *QUICK, "--video", "MODEL/clip.mp4", "--out", "OUT/a.gif"], "OUT/a.gif"),
    "encode": (["encode", *QUICK[:2], "--video", "MODEL/clip.mp4", "--out", "OUT/a.safetensors"], "OUT/a.safetensors"),
    "decode": (["decode", *QUICK[:2], "--latents", "MODEL/l.safetensors", "--out", "OUT/a.mp4"], "OUT/a.mp4"),
    "decode tiles": (
        ["decode", *QUICK[:2], "--latents", "MODEL/l.safetensors", "--tile", "8", "--out", "OUT/a.mp4"],
        "OUT/a.mp4",
    ),
}


class TestCommands:
    @pytest.fixture
    def filled(self, films, model, tmp_path):
        def fill(text: str) -> str:
            return text.replace("FILMS", str(films)).replace("MODEL", str(model)).replace("OUT", str(tmp_path))

        return fill

    @pytest.mark.parametrize("name", COMMANDS)
    def test_a_full_disk(self, name, filled, tmp_path, capsys):
        words, path = COMMANDS[name]
        with no_file_longer_than(0):
            line = fails(capsys, *map(filled, words))
        assert f"cannot write {filled(path)}" in line
        assert "File too large" in line
        assert [found.name for found in tmp_path.glob("a.*")] == []

    @pytest.mark.parametrize("data", ["MODEL/clip.mp4", "FILMS"])
    def test_numbers_are_printed_before_they_are_written(self, filled, tmp_path, capsys, data):
        words = ["evaluate", *QUICK[:2], "--data", data, "--json", "OUT/a.json"]
        with no_file_longer_than(0):
            assert main([*map(filled, words)]) == 2
        said = capsys.readouterr()
        assert "PSNR" in said.out
        assert said.err.endswith(f"walt: error: cannot write {tmp_path / 'a.json'}: File too large\n")

    @pytest.mark.parametrize("code", CODES)
    def test_other_reasons(self, code, filled, capsys, monkeypatch):
        def fsync(_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(atomic.os, "fsync", fsync)
        words, path = COMMANDS["sample mp4"]
        assert fails(capsys, *map(filled, words)).endswith(f"cannot write {filled(path)}: {os.strerror(code)}")

    def test_what_no_one_else_catches(self, capsys, monkeypatch):
        def broken(_):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), "some/file")

        monkeypatch.setattr(Info, "run", broken)
        assert fails(capsys, "info").endswith("error: [Errno 30] Read-only file system: 'some/file'")

    def test_in_a_thread(self, capsys, monkeypatch):
        def broken(_):
            thread = threading.Thread(target=os.stat, args=("no/such/file",))
            thread.start()
            thread.join()

        monkeypatch.setattr(Info, "run", broken)
        hook = threading.excepthook
        assert main(["info"]) == 0
        assert capsys.readouterr().err == "walt: [Errno 2] No such file or directory: 'no/such/file'\n"
        assert threading.excepthook is hook
