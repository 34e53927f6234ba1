"""Where the time of a step goes: columns of the log, progress bar, peak of the device, traces, FLOPs."""

from __future__ import annotations

import gzip
import json
import sys
import time

import pytest
import torch
from on_ranks import fit, regression, source
from torch.utils.flop_counter import FlopCounterMode

from walt.model.config import DiffusionConfig
from walt.model.cost import denoiser_flops, tokenizer_flops
from walt.model.tokenizer import Tokenizer
from walt.presets import PRESETS
from walt.terminal import terminal
from walt.train.log import read_log
from walt.train.timing import StepTimes, peak_flops, peak_gib


def slow(function, seconds: float):
    def slower(*arguments):
        time.sleep(seconds)
        return function(*arguments)

    return slower


def test_each_part_has_its_time(tmp_path):
    """Means over the steps since the last row; a checkpoint counts in the row after it."""
    trainer = fit(tmp_path / "a", 4, loss=slow(regression, 0.02), log_every=2, save_every=2)
    trainer.source = slow(source, 0.07)
    optimizer = trainer.objectives[0].optimizer
    optimizer.step = slow(optimizer.step, 0.03)
    trainer.save = slow(trainer.save, 0.1)
    trainer.run()
    first, second = read_log(tmp_path / "a.jsonl")
    assert second["step"] == 4
    assert second["compute_s"] >= 0.02
    assert second["optimizer_s"] >= 0.03
    assert second["data_s"] > 0.005  # what is left of 0.07 s beside the rest of the step
    assert first["save_s"] < 0.01
    assert second["save_s"] >= 0.05  # one in two steps
    parts = sum(second[f"{name}_s"] for name in ("data", "compute", "optimizer", "save"))
    assert second["frames_s"] == pytest.approx(8 / parts, rel=0.3)  # a frame a sample, 8 of them
    assert 0 < first["peak_gib"] <= second["peak_gib"] < 100


@pytest.mark.parametrize(("seconds", "shown"), [(0.05, True), (0.0, False)])
def test_the_bar_shows_the_wait_for_data(tmp_path, capsys, seconds, shown):
    trainer = fit(tmp_path / "a", 3, loss=slow(regression, 0.0 if shown else 0.15))
    trainer.source = slow(source, seconds)
    trainer.run()
    assert ("waits_for_data=" in capsys.readouterr().err) == shown


def test_lines_without_a_terminal(tmp_path, capsys):
    """Of a command: one for each row of the log, and no bar."""
    with terminal():
        fit(tmp_path / "a", 4, log_every=2).run()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("=")[0] for line in lines] == [f"train net: step {step} of 4, loss" for step in (2, 4)]
    assert lines[-1].endswith(", 00:00 left")


def test_the_bar_of_a_terminal(tmp_path, capsys, monkeypatch):
    """In place of the lines."""
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True)
    with terminal():
        fit(tmp_path / "a", 3).run()
    printed = capsys.readouterr().err
    assert "step/s, loss=" in printed
    assert "step 1 of 3" not in printed


def test_mfu(tmp_path):
    trainer = fit(tmp_path / "a", 2, peak_tflops=0.5)
    trainer.flops = lambda: 3e6
    trainer.run()
    for row in read_log(tmp_path / "a.jsonl"):
        step = trainer.frames_per_step / row["frames_s"]
        assert row["mfu"] == pytest.approx(3e6 / step / 0.5e12, rel=1e-6)
    measured = fit(tmp_path / "b", 1)
    measured.flops = lambda: 3e6
    measured.run()
    assert 0 < read_log(tmp_path / "b.jsonl")[0]["mfu"] < 1
    fit(tmp_path / "c", 1).run()
    assert "mfu" not in read_log(tmp_path / "c.jsonl")[0]


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "float32", 66.9),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312.0),
        ("NVIDIA L40S", "bfloat16", 362.0),
        ("NVIDIA L4", "bfloat16", 121.0),
        ("Some other GPU", "bfloat16", None),
    ],
)
def test_peaks_of_gpus(monkeypatch, name, precision, tflops):
    peak_flops.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = peak_flops(torch.device("cuda"), precision)
    assert found == (None if tflops is None else pytest.approx(tflops * 1e12))
    peak_flops.cache_clear()


def test_peaks_of_others():
    assert peak_flops(torch.device("cpu"), "float32") > 1e8
    assert peak_flops(torch.device("cpu"), "bfloat16") >= 1e8
    assert peak_flops(torch.device("mps"), "float32") is None


def test_a_gpu_is_waited_for_in_logged_steps_only(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    times = StepTimes(torch.device("cuda"))
    with times.part("compute"):
        pass
    assert waits == []
    times.synchronize = True
    with times.part("compute"):
        pass
    assert waits == [torch.device("cuda")] * 2  # before and after


def test_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    assert peak_gib(torch.device("cuda")) == 3


def test_a_trace_of_some_steps(tmp_path, capsys):
    fit(tmp_path / "a", 7, profile=2).run()
    path = tmp_path / "a.trace.json.gz"
    assert f"{path}: a trace of 2 steps, to open at https://ui.perfetto.dev" in capsys.readouterr().err
    with gzip.open(path, "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert [names.count(part) for part in ("data", "compute", "optimizer")] == [2, 2, 2]
    assert any(name.startswith("aten::") for name in names)
    assert [row["step"] for row in read_log(tmp_path / "a.jsonl")][-1] == 7


def test_a_trace_of_what_steps_there_are(tmp_path, capsys):
    """It says how many it has, and none takes the place of one that has some."""
    fit(tmp_path / "a", 5, profile=50).run()
    path = tmp_path / "a.trace.json.gz"
    assert f"{path}: a trace of 3 steps" in capsys.readouterr().err
    size = path.stat().st_size
    for steps in (6, 8):
        trainer = fit(tmp_path / "a", steps, profile=50)
        trainer.resume(new_settings=True)
        trainer.run()
        assert "no trace: the first 2 steps are not traced, and there were no more" in capsys.readouterr().err
        assert path.stat().st_size == size


def test_a_trace_counts_as_saving(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda self, path: time.sleep(0.3))
    fit(tmp_path / "a", 5, profile=1, log_every=1).run()
    assert max(row["save_s"] for row in read_log(tmp_path / "a.jsonl")) > 0.3


def test_a_trace_that_cannot_be_written_stops_nothing(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full)
    trainer = fit(tmp_path / "a", 4, profile=1)
    trainer.run()
    assert trainer.step == 4
    assert "a.trace.json.gz: No space left on device; training goes on" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.gz"))


@pytest.mark.parametrize("frames", [1, 5])
def test_flops_of_the_tokenizer_are_those_of_a_real_pass(frames):
    config = PRESETS["minimal"][0]
    tokenizer = Tokenizer(config)
    with FlopCounterMode(display=False) as counter:
        tokenizer.decode(tokenizer.encode(torch.zeros(1, 3, frames, 16, 24))).sum().backward()
    assert tokenizer_flops(config, frames, 16, 24) == counter.get_total_flops() > 1e6


def test_flops_of_the_denoiser():
    config = PRESETS["tiny"][1]
    forward = sum(config.flops().values())
    assert denoiser_flops(config, DiffusionConfig()) == 4 * forward
    assert denoiser_flops(config, DiffusionConfig(self_condition_probability=0.0)) == 3 * forward
