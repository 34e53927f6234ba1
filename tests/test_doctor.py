"""`walt doctor`: what it says of cuDNN, packages, codecs and the disk."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest

from walt.cli import main
from walt.commands.doctor import (
    OPTIONAL,
    bfloat16_line,
    codec_lines,
    cudnn_line,
    diagnose,
    existing,
    processors,
    threads_line,
)


@pytest.fixture
def quiet(monkeypatch):
    """Without the kernels' report, which takes seconds."""
    report = SimpleNamespace(returncode=0, stdout="kernels: fine", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: report)
    return report


@pytest.mark.parametrize(
    ("version", "name", "warns"),
    [
        (8902, "8.9.2", False),
        (90100, "9.1.0", False),
        (90701, "9.7.1", False),
        (90800, "9.8.0", True),
        (91002, "9.10.2", True),
        (91400, "9.14.0", True),
        (91500, "9.15.0", False),
    ],
)
def test_cudnn(version, name, warns):
    line = cudnn_line(version)
    assert f"cuDNN {name}" in line
    assert line.startswith("! ") == warns
    assert ("3D convolutions (9.8 to 9.14)" in line) == warns


def test_no_cudnn():
    assert cudnn_line(None) == "  cuDNN      none: convolutions do not use it here"


@pytest.mark.parametrize(("threads", "count", "warns"), [(2, 2, False), (1, 8, False), (2, 1, True), (64, 4, True)])
def test_threads(threads, count, warns):
    line = threads_line(threads, count)
    assert line.startswith("! " if warns else "  ")
    assert f"{threads} for {count} processor" in line
    assert (f"OMP_NUM_THREADS={count}" in line) == warns


def test_a_quota_leaves_fewer_processors(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    quota = tmp_path / "cpu.max"
    assert processors(quota) == 8  # no file
    for text, count in {"max 100000": 8, "200000 100000": 2, "50000 100000": 1, "1600000 100000": 8}.items():
        quota.write_text(text + "\n")
        assert processors(quota) == count


@pytest.mark.parametrize(
    ("products", "convolutions", "better"),
    [(2.0, 1.5, ""), (0.7, 1.5, "products"), (1.2, 0.9, "convolutions"), (0.5, 0.5, "products and convolutions")],
)
def test_bfloat16(products, convolutions, better):
    line = bfloat16_line({"products": (0.1, products), "convolutions": (0.2, convolutions)})
    assert f"products 0.1 to {products} times and convolutions 0.2 to {convolutions} times as fast as float32" in line
    assert line.startswith("! " if better else "  ")
    assert line.endswith(f"--training.precision float32 is better for {better}" if better else "on this CPU")


def test_packages(quiet, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    there = {"PIL", "vizdoom", "tensorboard"}
    known = lambda name: object() if name in there else None  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: known(name) if name in OPTIONAL else find(name))
    lines = [*diagnose(tmp_path)]
    for name, (purpose, command) in OPTIONAL.items():
        (line,) = [line for line in lines if line[2:].startswith(f"{name} ")]
        assert purpose in line
        assert line.startswith("  " if name in there else "- ")
        assert line.endswith(purpose if name in there else command)
    assert not any("codec" in line for line in lines)  # PyAV is one of those that are missing


def test_disk(quiet, monkeypatch, tmp_path):
    def room(gigabytes):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(gigabytes * 2**30)))
        return [*diagnose(tmp_path / "not" / "yet")][-1]

    assert room(200) == f"  disk       200.0 GiB free for {tmp_path / 'not' / 'yet'}"
    assert room(1.5) == f"! disk       1.5 GiB free for {tmp_path / 'not' / 'yet'}, of 10 wished for"


def test_existing(tmp_path, monkeypatch):
    assert existing(tmp_path / "a" / "b") == tmp_path
    monkeypatch.chdir(tmp_path)
    assert existing(tmp_path.relative_to(tmp_path) / "a") == tmp_path


def test_codecs(monkeypatch):
    av = pytest.importorskip("av", reason="PyAV is not installed")
    codec = av.Codec

    def poor(name, mode):
        if name in ("libx264", "av1"):
            raise av.codec.codec.UnknownCodecError(name)
        return codec(name, mode)

    monkeypatch.setattr(av, "Codec", poor)
    lines = [*codec_lines()]
    assert "! codec      this build of PyAV cannot write libx264" in lines
    assert "! codec      this build of PyAV cannot read av1" in lines


def test_kernels_that_do_not_load(quiet, tmp_path):
    quiet.returncode, quiet.stderr = 1, "Traceback\nImportError: undefined symbol\n"
    assert "! kernels    python -m walt_kernels fails: ImportError: undefined symbol" in [*diagnose(tmp_path)]


def test_the_command(capsys, tmp_path):
    began = sum(os.times()[:4])
    assert main(["doctor", "--out", str(tmp_path)]) == 0
    assert sum(os.times()[:4]) - began < 10  # seconds of work, its processes' too
    text = capsys.readouterr().out
    for word in ("walt_kernels", "cuDNN", "disk", str(tmp_path), "efficientnet"):
        assert word in text
