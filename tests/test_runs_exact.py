"""`walt train`, to the bit or to rounding: resumed as uninterrupted, microbatches as one batch, two ranks as one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import SHORT, TOKENIZER, TRANSFORMER, fit, make
from torch import distributed

from walt.checkpoint import read_tensors
from walt.commands.train import train_stage
from walt.pretrained import load_tokenizer
from walt.train import tokenizer as tokenizer_training
from walt.train.log import read_log
from walt.train.losses import DiscriminatorLoss
from walt.train.objective import TIMES

pytest.importorskip("av", reason="PyAV is not installed")

ADVERSARY = ("losses.adversarial=0.1", "losses.r1_every=2", "training.seed=3")


@pytest.fixture(scope="module")
def tokenizer(films, tmp_path_factory):
    """A folder with a trained tokenizer and data, for `begun`."""
    out = tmp_path_factory.mktemp("tokenizer")
    fit("tokenizer", films, out)
    return out


def begun(tokenizer: Path, out: Path) -> Path:
    """A new folder with the tokenizer and the data."""
    out.mkdir(parents=True)
    for name in ("tokenizer", "data-16x16"):
        (out / name).symlink_to(tokenizer / name)
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert {"model.safetensors", "ema.safetensors", "optimizer.safetensors"} <= {file.name for file in files}
    return {f"{file.stem}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(first: Path, second: Path) -> None:
    """The same bits: weights, averages, optimizers, and losses in the log."""
    a, b = tensors(first), tensors(second)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    logs = [read_log(folder.with_suffix(".jsonl")) for folder in (first, second)]
    timed = {"seconds", "frames_s", *TIMES}
    losses = [[{k: v for k, v in row.items() if k not in timed} for row in log] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) > 1


def assert_close(first: Path, second: Path, tolerance: float = 1e-6) -> None:
    for name in ("model", "ema"):
        a, b = (read_tensors(folder / f"{name}.safetensors") for folder in (first, second))
        for key in a:
            torch.testing.assert_close(b[key], a[key], atol=tolerance, rtol=tolerance, msg=f"{name}: {key}")


class Stop(Exception):
    pass


def stopping(monkeypatch, module, name: str, call: int) -> None:
    """A kill: an exception out of a function at its n-th call."""
    made = getattr(module, name)
    count = 0

    def counted(*arguments, **options):
        nonlocal count
        count += 1
        if count == call:
            raise Stop
        return made(*arguments, **options)

    monkeypatch.setattr(module, name, counted)


class TestResume:
    STEPS = ("training.steps=5", "training.save_every=2")

    def test_tokenizer_with_an_adversary(self, films, tmp_path, monkeypatch):
        fit("tokenizer", films, tmp_path / "whole", *ADVERSARY, *self.STEPS)
        with monkeypatch.context() as patch:
            stopping(patch, DiscriminatorLoss, "__call__", 4)  # in step 4, after the checkpoint of step 2
            with pytest.raises(Stop):
                fit("tokenizer", films, tmp_path / "cut", *ADVERSARY, *self.STEPS)
        state = json.loads((tmp_path / "cut" / "tokenizer" / "state.json").read_text())
        assert state["step"] == 2
        assert fit("tokenizer", films, tmp_path / "cut", *ADVERSARY, *self.STEPS).step == 5
        assert_same(tmp_path / "whole" / "tokenizer", tmp_path / "cut" / "tokenizer")

    def test_base(self, films, tokenizer, tmp_path, monkeypatch):
        options = (*self.STEPS, "data.text=bytes", "transformer.frame_condition=true", "training.preview_every=1")
        whole, cut = begun(tokenizer, tmp_path / "whole"), begun(tokenizer, tmp_path / "cut")
        fit("base", films, whole, *options)
        from walt.model.diffusion import Diffusion

        with monkeypatch.context() as patch:
            stopping(patch, Diffusion, "loss", 4)
            with pytest.raises(Stop):
                fit("base", films, cut, *options)
        assert fit("base", films, cut, *options).step == 5
        assert_same(whole / "transformer", cut / "transformer")

    def test_killed_before_the_statistics(self, films, tmp_path, monkeypatch):
        fit("tokenizer", films, tmp_path / "whole")
        with monkeypatch.context() as patch:
            stopping(patch, tokenizer_training, "set_statistics", 1)
            with pytest.raises(Stop):
                fit("tokenizer", films, tmp_path / "cut")
        fit("tokenizer", films, tmp_path / "cut")
        assert_same(tmp_path / "whole" / "tokenizer", tmp_path / "cut" / "tokenizer")

    def test_new_settings(self, films, tmp_path):
        fit("tokenizer", films, tmp_path)
        before = load_tokenizer(tmp_path / "tokenizer").latent_std
        trainer = fit("tokenizer", films, tmp_path, "training.steps=4", "training.lr=1e-2", new_settings=True)
        assert trainer.step == 4
        assert "lr: 0.01" in (tmp_path / "tokenizer.yaml").read_text()
        assert [row["step"] for row in read_log(tmp_path / "tokenizer.jsonl")] == [1, 2, 3, 4]
        after = load_tokenizer(tmp_path / "tokenizer").latent_std
        assert not torch.equal(before, after)


class TestParts:
    """`training.accumulate` changes rounding alone. Decorrelation is of the rows at hand, so it is left out."""

    def test_tokenizer_with_an_adversary(self, films, tmp_path):
        options = (*ADVERSARY, "losses.decorrelation=0", "training.steps=3")
        for parts in (1, 2):
            fit("tokenizer", films, tmp_path / str(parts), *options, f"training.accumulate={parts}")
        assert_close(tmp_path / "1" / "tokenizer", tmp_path / "2" / "tokenizer")
        first, second = (load_file(tmp_path / str(i) / "tokenizer" / "discriminator.safetensors") for i in (1, 2))
        for name in first:
            torch.testing.assert_close(second[name], first[name], atol=1e-6, rtol=1e-5, msg=name)

    def test_base(self, films, tokenizer, tmp_path):
        for parts in (1, 2, 4):
            out = begun(tokenizer, tmp_path / str(parts))
            fit("base", films, out, "data.text=bytes", f"training.accumulate={parts}", "training.steps=3")
        for parts in (2, 4):
            assert_close(tmp_path / "1" / "transformer", tmp_path / str(parts) / "transformer")


def on_two_ranks(stage: str, films: Path, out: Path, *options: str) -> str:
    """`walt train` under torchrun, with the settings of `make` -> what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "walt"]
    command += ["train", stage, "--data", str(films), "--out", str(out)]
    for override in (*TOKENIZER, *TRANSFORMER, *SHORT, *options):
        command.append(f"--{override}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_with_an_adversary(films, tmp_path):
    """The discriminator of each rank finds the reconstructions of its own samples."""
    options = (*ADVERSARY, "losses.decorrelation=0")
    fit("tokenizer", films, tmp_path / "one", *options)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "data-16x16").symlink_to(tmp_path / "one" / "data-16x16")
    on_two_ranks("tokenizer", films, tmp_path / "two", *options)
    assert_close(tmp_path / "one" / "tokenizer", tmp_path / "two" / "tokenizer")
    first, second = (load_file(tmp_path / n / "tokenizer" / "discriminator.safetensors") for n in ("one", "two"))
    for name in first:
        torch.testing.assert_close(second[name], first[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes(films, tokenizer, tmp_path):
    """torchrun prepares, encodes and trains as one process does, into the same layout."""
    one, two = begun(tokenizer, tmp_path / "one"), begun(tokenizer, tmp_path / "two")
    options = ("data.text=bytes", "transformer.frame_condition=true")
    (two / "data-16x16").unlink()  # the ranks prepare it
    train_stage(make("base", films, one, *options))
    assert on_two_ranks("base", films, two, *options).count("4 videos with 4 shots") == 1  # the main rank alone speaks
    assert_close(one / "transformer", two / "transformer")
    names = [sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.name != "lock") for out in (one, two)]
    assert names[0] == [name for name in names[1] if not name.startswith("data-16x16/")]
    shutil.rmtree(two / "data-16x16")
