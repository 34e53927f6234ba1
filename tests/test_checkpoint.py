"""walt.checkpoint and walt.atomic: checkpoints whole or absent, whatever happens; one-line errors for bad ones."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from on_ranks import adversaries, fit, train_forever
from safetensors.torch import save_file
from torch import nn

from walt import atomic, checkpoint
from walt.atomic import atomic_folder, atomic_write, latest_complete, write_json
from walt.checkpoint import load_description, load_weights, read_tensors, save_checkpoint
from walt.errors import WaltError

# Saving


def no_space(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    trainer = fit(tmp_path / "a", 20)
    trainer.save()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    original = checkpoint.write_tensors

    def full_on_the_second_file(path, tensors):
        if path.name == "ema.safetensors":
            path.write_bytes(b"half")
            no_space()
        original(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full_on_the_second_file)
    with pytest.raises(WaltError, match=r"cannot write .*/a: No space left on device"):
        trainer.save()
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert fit(tmp_path / "a", 20).resume()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k tmpfs {disk} 2>/dev/null") != 0:
        pytest.skip("this environment cannot mount a tmpfs")
    try:
        big = {"model": {"weight": torch.zeros(100_000)}}
        save_checkpoint(disk / "a", "line", {}, {"model": {"weight": torch.zeros(10)}})
        with pytest.raises(WaltError, match=r"cannot write .*/a: .*No space left on device"):
            save_checkpoint(disk / "a", "line", {}, big)
        assert sorted(path.name for path in disk.iterdir()) == ["a"]
        assert len(read_tensors(disk / "a" / "model.safetensors")["weight"]) == 10
        with pytest.raises(WaltError, match=r"No space left on device"):
            write_json(disk / "b.json", {"text": "x" * 100_000})
        assert sorted(path.name for path in disk.iterdir()) == ["a"]
    finally:
        os.system(f"umount {disk}")


@pytest.mark.parametrize(("first", "second"), [(0, 4), (2, 3), (1, 2), (3, 2)])
def test_shards_that_leave_rows_out_or_overlap(tmp_path, first, second):
    """Two shards of two rows each, of a tensor of 5 rows in all."""
    for i, row in enumerate((first, second), 1):
        rows = {"rows": json.dumps({"x": (row, 5)})}
        save_file({"x": torch.zeros(2, 3)}, tmp_path / f"a-0000{i}-of-00002.safetensors", rows)
    with pytest.raises(WaltError, match="the shards do not make up 'x'"):
        read_tensors(tmp_path / "a.safetensors")


def test_shards_that_end_early(tmp_path):
    for i in (0, 1):
        rows = {"rows": json.dumps({"x": (2 * i, 5)})}
        save_file({"x": torch.zeros(2, 3)}, tmp_path / f"a-0000{i + 1}-of-00002.safetensors", rows)
    with pytest.raises(WaltError, match="the shards do not make up 'x'"):
        read_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("rows", ["[]", "3", '{"x": 1}', '{"x": ["a", 2]}', '{"x": [0, "b"]}', "{"])
def test_shards_with_foreign_metadata(tmp_path, rows):
    save_file({"x": torch.zeros(2, 3)}, tmp_path / "a.safetensors", {"rows": rows})
    with pytest.raises(WaltError, match=r"a\.safetensors is broken"):
        read_tensors(tmp_path / "a.safetensors")


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    save_checkpoint(tmp_path / "a", "line", {"number": 1}, {})
    (tmp_path / "a").rename(tmp_path / "a.old")  # where a kill can strike: the old one moved, the new one not yet there
    assert latest_complete(tmp_path / "a") == tmp_path / "a.old"
    assert load_description(tmp_path / "a", "line")[1]["number"] == 1
    save_checkpoint(tmp_path / "a", "line", {"number": 2}, {})
    assert load_description(tmp_path / "a", "line")[1]["number"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_a_failing_writer_leaves_nothing(tmp_path):
    def half_a_file():
        with atomic_write(tmp_path / "x.json") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    def half_a_folder():
        with atomic_folder(tmp_path / "y") as temporary:
            (temporary / "file").write_text("half")
            raise KeyboardInterrupt

    for write in (half_a_file, half_a_folder):
        with pytest.raises(KeyboardInterrupt):
            write()
    assert list(tmp_path.iterdir()) == []


# Loading


@pytest.fixture
def saved(tmp_path) -> Path:
    save_checkpoint(tmp_path / "a", "line", {}, {"model": nn.Linear(3, 1).state_dict()})
    return tmp_path / "a"


def test_missing_checkpoint(tmp_path):
    with pytest.raises(WaltError, match=r"no such checkpoint: .*nowhere"):
        load_description(tmp_path / "nowhere", "line")


def test_foreign_checkpoints(saved):
    with pytest.raises(WaltError, match="holds a line, expected a tokenizer"):
        load_description(saved, "tokenizer")
    config = saved / "config.json"
    config.write_text('{"architectures": ["Other"]}')
    with pytest.raises(WaltError, match=r'config\.json is not that of a checkpoint: its "format" is None'):
        load_description(saved, "line")
    config.write_text('{"format": "walt-checkpoint", "version": 99, "kind": "line"}')
    with pytest.raises(WaltError, match="has version 99; this walt reads version 2;"):
        load_description(saved, "line")
    config.write_text('{"format": ')
    with pytest.raises(WaltError, match=r"config\.json is not JSON"):
        load_description(saved, "line")
    config.write_text("[]")
    with pytest.raises(WaltError, match="holds a list, expected an object"):
        load_description(saved, "line")
    config.unlink()
    with pytest.raises(WaltError, match=r"is not a checkpoint: it has no config\.json"):
        load_description(saved, "line")


class Trap:
    """Unpickling this would leave a mark."""

    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


def test_broken_weights_and_no_unpickling(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[:-3], whole[: len(whole) // 2], os.urandom(200), pickle.dumps(Trap())):
        path.write_bytes(content)
        with pytest.raises(WaltError, match=r"model\.safetensors is broken: "):
            read_tensors(path)
    torch.save({"weight": Trap()}, path)
    with pytest.raises(WaltError, match=r"model\.safetensors is broken: "):
        read_tensors(path)
    assert not (tmp_path / "unpickled").exists()
    path.unlink()
    with pytest.raises(WaltError, match=r"is not a complete checkpoint: model\.safetensors is missing"):
        read_tensors(path)


def test_weights_of_another_model(saved):
    path = saved / "model.safetensors"
    tensors = read_tensors(path)
    with pytest.raises(WaltError, match=r"'weight' has shape \[1, 3\], expected \[1, 4\]"):
        load_weights(nn.Linear(4, 1), tensors, path)
    with pytest.raises(WaltError, match=r"has 'bias', which the model does not"):
        load_weights(nn.Linear(3, 1, bias=False), tensors, path)
    with pytest.raises(WaltError, match=r"lacks '0.weight'"):
        load_weights(nn.Sequential(nn.Linear(3, 1)), tensors, path)


def test_a_broken_trainer_state_is_one_error(tmp_path):
    fit(tmp_path / "a", 3).run()
    path = tmp_path / "a" / "state.json"
    whole = json.loads(path.read_text())
    for key, value, message in (("step", None, "'step'"), ("training", {"depth": 3}, "depth")):
        state = {**whole, key: value}
        if value is None:
            del state[key]
        path.write_text(json.dumps(state))
        with pytest.raises(WaltError, match=f"a is broken: .*{message}"):
            fit(tmp_path / "a", 3).resume()
    path.write_text(json.dumps(whole))
    save_file({"77.step": torch.zeros(())}, tmp_path / "a" / "optimizer.safetensors")
    with pytest.raises(WaltError, match=r"optimizer\.safetensors does not fit .* '77.step'"):
        fit(tmp_path / "a", 3).resume()


def test_a_checkpoint_of_the_first_version_is_converted_as_its_refusal_says(tmp_path):
    """Written as walt 0.1 wrote it: fewer settings, parameter groups in state.json, states of generators."""
    trainer = fit(tmp_path / "new", 6, save_every=3, keep=2)
    trainer.run()
    old = tmp_path / "old"
    (tmp_path / "new.step000000003").rename(old)
    state = json.loads((old / "state.json").read_text())
    names = ("steps", "lr", "warmup", "weight_decay", "betas", "clip_norm", "ema_decay", "save_every", "log_every")
    state["training"] = {name: state["training"][name] for name in (*names, "seed")}
    state["parameter_groups"] = [{"lr": 0.1, "params": [0, 1]}]
    (old / "state.json").write_text(json.dumps(state))
    save_file({"generator": torch.zeros(16, dtype=torch.uint8)}, old / "random.safetensors")
    config = old / "config.json"
    document = json.loads(config.read_text())
    config.write_text(json.dumps({**document, "version": 1}))
    message = 'has version 1; this walt reads version 2; in version 1 weights are the same: set "version" to 2 there'
    for read in (lambda: load_description(old, "net"), lambda: fit(old, 6).resume()):
        with pytest.raises(WaltError, match=rf"old/config\.json {message}"):
            read()
    config.write_text(config.read_text().replace('"version": 1', '"version": 2'))
    again = fit(old, 6)
    assert again.resume()
    again.run()
    for name in ("model", "ema", "optimizer"):
        first, second = (read_tensors(folder / f"{name}.safetensors") for folder in (tmp_path / "new", old))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_kept_checkpoints(tmp_path):
    trainer = fit(tmp_path / "a", 9, save_every=2, keep=3)
    trainer.run()
    trainer.save()  # of the same step: replaces
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert names == ["a", "a.step000000006", "a.step000000008"]
    steps = [json.loads((tmp_path / name / "state.json").read_text())["step"] for name in names]
    assert steps == [9, 6, 8]
    again = fit(tmp_path / "a", 12, save_every=3, keep=1)
    again.resume(new_settings=True)
    again.run()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["a"]


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    """What a power cut needs: fsync of each file and of the folder, then the renames, then fsync of their parent."""
    done = []
    rename, flush = Path.rename, atomic.flush
    monkeypatch.setattr(atomic, "flush", lambda path: (done.append(("flush", path.name)), flush(path)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (done.append(("rename", self.name)), rename(self, to))[1])
    for _ in range(2):
        done.clear()
        save_checkpoint(tmp_path / "a", "line", {}, {"model": {"weight": torch.zeros(3)}}, {"step": 1})
    written = [name for what, name in done[: done.index(("rename", "a"))]]
    assert sorted(written) == [".a.new", "config.json", "model.safetensors", "state.json"]
    assert written[-1] == ".a.new"
    assert done[len(written) :] == [("rename", "a"), ("rename", ".a.new"), ("flush", tmp_path.name)]


def test_a_kill_at_any_moment_leaves_a_checkpoint(tmp_path):
    context = multiprocessing.get_context("forkserver")  # forks from a process that has imported torch, and no more
    context.set_forkserver_preload(["walt.train.trainer", "walt.model.transformer", "torch._dynamo"])
    steps = [0]

    def saved():
        """When the checkpoint was written; None where there is none, or it is just being replaced."""
        with contextlib.suppress(FileNotFoundError):
            found = checkpoint.checkpoint_folder(tmp_path / "a")
            return found and (found / "config.json").stat().st_mtime_ns

    for i in range(5):
        before, started = saved(), context.Event()
        process = context.Process(target=train_forever, args=(str(tmp_path / "a"), started))
        process.start()
        assert started.wait(60)
        while i % 2 == 0 and saved() in (None, before):  # however busy the machine is, three runs save something
            assert process.is_alive()
        time.sleep(random.uniform(0.05, 0.4))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        trainer = adversaries(tmp_path / "a", steps=10**9, save_every=1, keep=2)
        assert trainer.resume()
        assert all(bool(tensor.isfinite().all()) for tensor in trainer.model.state_dict().values())
        steps.append(trainer.step)
    assert steps == sorted(steps)
    assert len(set(steps)) > 2  # kills did strike runs that were saving
