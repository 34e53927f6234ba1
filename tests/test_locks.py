"""walt.locks: one training at a time in a folder; others are told whose it is; a killed one leaves nothing behind."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
import subprocess
import sys
import threading

import pytest
from command_line import fails
from tiny_runs import SHORT, TOKENIZER, TRANSFORMER, fit

import walt.demo.release
from walt.cli import main
from walt.errors import WaltError
from walt.locks import locked
from walt.train import run

pytest.importorskip("av", reason="PyAV is not installed")

ME = f"process {os.getpid()} on {socket.gethostname()}"
HOLD = (
    "import sys; from walt.locks import locked\nwith locked(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
)


def training(films, out, stage: str = "tokenizer") -> list[str]:
    overrides = [f"--{text}" for text in (*TOKENIZER, *TRANSFORMER, *SHORT)]
    return ["train", stage, "--data", str(films), "--out", str(out), *overrides]


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_training_is_refused_and_writes_nothing(films, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    with locked(out):
        assert fails(capsys, *training(films, out)).endswith(
            f"{out} is in use by {ME}; wait until it ends, or name another folder"
        )
        assert f"is in use by {ME}" in fails(capsys, "demo", "--out", out)
        monkeypatch.setattr(walt.demo.release, "FrameFeatures", object)
        assert f"is in use by {ME}" in fails(capsys, "demo", "--release", out)
        assert names(out) == ["lock"]
    assert not out.exists()


def test_a_link_to_the_folder_is_the_folder(films, tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with locked(tmp_path / "run"):
        assert f"link is in use by {ME}" in fails(capsys, *training(films, tmp_path / "link"))


def test_another_stage_is_refused_too(films, tmp_path, capsys):
    """It reads the tokenizer that is being trained."""
    fit("tokenizer", films, tmp_path)
    with locked(tmp_path):
        assert f"is in use by {ME}" in fails(capsys, *training(films, tmp_path, "base"))


def test_what_does_not_train_is_not_kept_out(films, tmp_path):
    fit("tokenizer", films, tmp_path)
    fit("base", films, tmp_path)
    source = ("--from", str(tmp_path))
    with locked(tmp_path):
        assert main(["sample", *source, "--steps", "1", "--out", str(tmp_path / "a.mp4")]) == 0
        video = ("--video", str(films / "up/0.mp4"))
        assert main(["encode", *source, *video, "--out", str(tmp_path / "a.safetensors")]) == 0
        before = set(names(tmp_path))
        assert main(["evaluate", *source, "--data", str(films)]) == 0
    assert {"a.mp4", "a.safetensors"} <= before
    assert set(names(tmp_path)) <= before | {"lock"}


def test_a_killed_run_leaves_no_lock(films, tmp_path, capsys):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    try:
        assert holder.stdout.readline() == "held\n"
        line = fails(capsys, *training(films, tmp_path))
        assert f"is in use by process {holder.pid} on {socket.gethostname()};" in line
    finally:
        holder.kill()
        holder.wait(30)
    assert names(tmp_path) == ["lock"]
    assert main(training(films, tmp_path)) == 0
    assert "lock" not in names(tmp_path)
    assert main(training(films, tmp_path)) == 0


def test_waiting(tmp_path):
    """One who waits gets a lock of its own, though the first one's file is removed."""
    said: list[str] = []
    waiting, held, release = threading.Event(), threading.Event(), threading.Event()

    def second():
        with locked(tmp_path, wait=True, say=lambda line: (said.append(line), waiting.set())):
            held.set()
            release.wait(30)

    thread = threading.Thread(target=second)
    with locked(tmp_path):
        thread.start()
        assert waiting.wait(30)
    assert held.wait(30)
    with pytest.raises(WaltError, match=rf"is in use by {ME}"), locked(tmp_path):
        pass
    release.set()
    thread.join(30)
    assert said == [f"waiting for {ME}, which is at work in {tmp_path}"]
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    said: list[str] = []
    with locked(tmp_path / "run", say=said.append):
        (tmp_path / "run" / "file").write_text("")
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path / 'run'} has no locks ({os.strerror(code)}); ")


def test_a_full_disk_does_not_unlock(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with locked(tmp_path), pytest.raises(WaltError, match=r"is in use by another process;"), locked(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WaltError, match=r"cannot write .*file/run: Not a directory"), locked(tmp_path / "file" / "run"):
        pass


def test_only_the_main_rank_takes_it(tmp_path, monkeypatch):
    with run.alone(tmp_path):
        assert names(tmp_path) == ["lock"]
        monkeypatch.setattr(run, "is_rank0", lambda: False)
        with run.alone(tmp_path):
            pass
        assert names(tmp_path) == ["lock"]
