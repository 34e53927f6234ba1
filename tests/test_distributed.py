"""walt.distributed and the trainer on two gloo ranks: what they compute is what one process does."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from launch import on_two_ranks
from on_ranks import RESUMED, RUNS, STEPS, fit, step_two
from safetensors.torch import load_file
from torch import distributed

from walt.checkpoint import TensorFiles, best_weights, load_weights, read_tensors
from walt.distributed import (
    all_max,
    all_mean,
    is_rank0,
    process_group,
    raise_on_all_ranks,
    rank,
    world_size,
)
from walt.errors import WaltError
from walt.train.log import read_log
from walt.train.objective import TIMES

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """Every run in this process."""
    out = tmp_path_factory.mktemp("one")
    for name, (make, settings, _) in RUNS.items():
        make(out / name, **settings).run()
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory, one) -> tuple[Path, list[dict], list[str]]:
    """Every run on two ranks; what each returned, and printed."""
    out = tmp_path_factory.mktemp("two")
    for name in RESUMED:
        shutil.copytree(step_two(one / name), out / f"{name}-from-one")
    printed = on_two_ranks("on_ranks.py", out)
    return out, [json.loads((out / f"said-{i}.json").read_text()) for i in range(2)], printed


def assert_close(first: Path, second: Path, tolerance: float = 1e-6) -> None:
    """All tensors that are trained."""
    names = sorted(path.name for path in first.glob("*.safetensors"))
    assert "model.safetensors" in names
    assert "optimizer.safetensors" in names
    for name in names:
        a, b = read_tensors(first / name), read_tensors(second / name)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(b[key], a[key], atol=tolerance, rtol=tolerance, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_equal_one_process(one, two, name):
    assert_close(one / name, two[0] / name)
    rows = [read_log(out / f"{name}.jsonl") for out in (one, two[0])]
    assert len(rows[0]) == len(rows[1]) == 4
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"frames_s", "seconds", *TIMES}:
            assert b[key] == pytest.approx(a[key], rel=2e-6, abs=1e-6), (a["step"], key)


def test_clipping_was_tested(one):
    """The runs above would agree on a wrong norm if it never exceeded the limit."""
    assert all(row["grad_norm"] > 0.5 for row in read_log(one / "fsdp.jsonl"))
    assert any(row["grad_norm"] > 0.1 for row in read_log(one / "fsdp-transformer.jsonl"))


def test_parts_equal_the_whole(one, tmp_path):
    """Gradient accumulation in one process."""
    make, settings, _ = RUNS["ddp-parts"]
    make(tmp_path / "a", **settings, accumulate=4).run()
    assert_close(one / "ddp-parts", tmp_path / "a")


def test_each_rank_writes_its_shards(two):
    files = sorted(path.name for path in (two[0] / "fsdp").iterdir())
    ranks = [f"{name}-0000{i}-of-00002.safetensors" for name in ("ema", "model", "optimizer") for i in (1, 2)]
    assert files == sorted(["config.json", "state.json", *ranks])
    held = [sum(tensor.numel() for tensor in load_file(two[0] / "fsdp" / name).values()) for name in ranks[2:4]]
    whole = sum(tensor.numel() for tensor in read_tensors(two[0] / "fsdp" / "model.safetensors").values())
    assert sum(held) == whole
    assert max(held) < 0.65 * whole
    files = TensorFiles(two[0] / "fsdp" / "model.safetensors")
    assert torch.equal(files.read("layers.0.mlp.0.weight", (2, 9)), files.read("layers.0.mlp.0.weight")[2:9])
    assert files.shapes["last.weight"] == (1, 5)
    assert files.shapes["scale"] == ()


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_with_fewer_and_more_ranks(one, two, tmp_path, name):
    shutil.copytree(step_two(two[0] / name), tmp_path / "a")
    trainer = fit(tmp_path / "a", **RUNS[name][1])
    assert trainer.resume()
    assert trainer.step == 2
    trainer.run()
    assert_close(one / name, tmp_path / "a")
    assert_close(one / name, two[0] / f"{name}-from-one")


def test_bfloat16_on_shards(one, two):
    wide, narrow = ([row["loss"] for row in read_log(out)] for out in (one / "fsdp.jsonl", two[0] / "bfloat16.jsonl"))
    assert narrow == pytest.approx(wide, rel=0.05)
    assert narrow != pytest.approx(wide, rel=1e-5)


def test_shards_load_for_inference(one, two):
    nets = [fit(Path("unused")).model for _ in range(2)]
    for net, folder in zip(nets, (one / "fsdp", two[0] / "fsdp"), strict=True):
        path = best_weights(folder)
        assert path.name == "ema.safetensors"
        load_weights(net, read_tensors(path), path)
    x = torch.randn(4, 3)
    torch.testing.assert_close(nets[0](x), nets[1](x), atol=1e-5, rtol=1e-5)


def test_missing_and_foreign_shards(two, tmp_path):
    shutil.copytree(two[0] / "fsdp", tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    first, second = (tmp_path / "a" / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    whole = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(WaltError, match=r"model\.safetensors is broken: the shards do not make up '.*'"):
        read_tensors(path)
    second.write_bytes(whole[:50])
    with pytest.raises(WaltError, match=r"model-00002-of-00002\.safetensors is broken"):
        read_tensors(path)
    second.unlink()
    with pytest.raises(WaltError, match=r"not a complete checkpoint: model-00002-of-00002\.safetensors is missing"):
        read_tensors(path)


def test_dropout_of_ranks(two):
    out, said, _ = two
    assert said[0]["dropout"] != said[1]["dropout"]
    for name in ("model", "ema", "optimizer"):
        whole, resumed = (read_tensors(out / run / f"{name}.safetensors") for run in ("dropout", "dropout-resumed"))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_previews_and_averages_of_shards(two):
    out, said, _ = two
    assert [ranks["previews"] for ranks in said] == [[2, 4], []]
    assert said[0]["averaged"] == said[1]["averaged"]
    assert not said[0]["training"]
    tensors = read_tensors(out / "preview" / "ema.safetensors")
    assert tensors["scale"] == 7
    net = fit(Path("unused")).model.eval()
    load_weights(net, tensors, out)
    assert net(torch.ones(1, 3)).item() == pytest.approx(said[0]["averaged"], rel=1e-6)


def test_a_signal_to_one_rank_stops_all(two):
    out, said, _ = two
    assert [ranks["struck"] for ranks in said] == [[signal.SIGTERM, 3]] * 2
    assert json.loads((out / "struck" / "state.json").read_text())["step"] == 3


def test_a_failure_on_one_rank_stops_all(two):
    out, said, _ = two
    for ranks in said:
        assert "became nan at step 3" in ranks["nan"]
        assert "cannot write" in ranks["full"]
    assert "No space left on device" in said[1]["full"]
    state = json.loads((out / "nan" / "state.json").read_text())
    assert state["step"] == 2
    assert read_tensors(out / "preview" / "model.safetensors")  # the old one
    assert not list(out.glob(".*"))
    # A checkpoint in between that one of them cannot write stops neither.
    assert json.loads((out / "outlived" / "state.json").read_text())["step"] == STEPS


def test_only_the_main_rank_prints(two):
    assert two[2] == ["one line\n", ""]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not list threads there")
def test_no_thread_outlives_the_group():
    """One that frees a tensor of Python's while Python ends aborts the process."""
    assert on_two_ranks("left_group.py") == ["[]\n", "[]\n"]


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group() as device:
        assert device.type in ("cpu", "cuda")
        assert (rank(), world_size(), is_rank0()) == (0, 1, True)
        assert all_max(1.5, True) == [1.5, True]
        value = torch.arange(3.0)
        assert torch.equal(all_mean(value), value)
        with pytest.raises(WaltError, match="cannot write x: No space"), raise_on_all_ranks("cannot write x"):
            raise OSError(28, "No space left on device")
