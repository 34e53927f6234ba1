"""The report of a GPU run: the same plan and the same code on the cpu backend, and with what only seems to be a GPU."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_benchmarks import PEAK, SMALL, results
from test_benchmarks_gpu import BOTH, QUICK, Gpu, needs_native

from benchmarks import __main__ as benchmark
from benchmarks import (
    cases,
    contender,
    gpu_ahead,
    gpu_child,
    gpu_models,
    gpu_report,
    gpu_tests,
    gpu_watch,
    machine,
    measure,
    memory,
    ops,
    targets,
    timing,
    verified,
)
from benchmarks.case import GPU_MODES, Case


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled, hardly anything is timed."""
    monkeypatch.setattr(measure.Effort, "seconds", 0.0)
    monkeypatch.setattr(gpu_child, "ceilings", lambda device, dtype: PEAK)


def report_on(
    out: Path, some: list[Case], seconds: float = 1e3, backends: tuple[str, ...] = ("cpu",)
) -> tuple[dict[str, Any], list[str]]:
    """The report of some cases on the CPU, measured in this process."""
    plan = [(dtype, i) for dtype in ("bfloat16", "float32") for i in range(len(some))]
    effort = measure.Effort(True, backends)

    def measured(deadline: float) -> Iterator[gpu_child.Message]:
        return gpu_child.messages(plan, some, effort, "cpu")

    return gpu_report.run(out, seconds, command="a command", tests=lambda _: [], measured=measured, device="cpu")


@needs_native
@pytest.mark.usefixtures("quick")
def test_report_writes_the_file_after_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = gpu_report.save

    def save(found: dict[str, Any], path: Path) -> None:
        real(found, path)
        sizes.append(len(json.loads(path.read_text())["rows"]))

    monkeypatch.setattr(gpu_report, "save", save)
    found, failed = report_on(tmp_path, [BOTH["modulation"], BOTH["attention"]])
    assert failed == []
    assert len(found["rows"]) == 12
    assert sorted(set(sizes)) == list(range(13))
    (path,) = tmp_path.iterdir()
    assert path.name == f"cpu-{machine.level()}.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(found))
    ran = [(dtype, op) for dtype in ("bfloat16", "float32") for op in ("adaln_residual_modulate", "window_attention")]
    keys = [(row["dtype"], row["op"], row["mode"], row["backend"]) for row in found["rows"]]
    assert keys == [(*key, mode, "cpu") for key in ran for mode in GPU_MODES]
    assert found["ceilings"] == {"bfloat16": PEAK, "float32": PEAK}
    for row in found["rows"]:
        assert row["deterministic"] is True
        assert 0 <= row["error_ratio"] <= 1
        assert row["output_memory"] > 0
        assert row["h200_floor_ms"] > 0
        assert row["best_baseline"] in row["baselines"]
        assert "cpu" not in row["baselines"]


def test_the_plan_begins_with_what_matters_most() -> None:
    found = gpu_report.plan(cases.GPU_CASES)
    assert found[: len(cases.GPU_CASES)] == [("bfloat16", i) for i in range(len(cases.GPU_CASES))]
    assert found[len(cases.GPU_CASES) :] == [("float32", i) for i, case in enumerate(cases.GPU_CASES) if case.quick]
    assert gpu_report.plan(cases.chosen("adaln_lora", None, False, "cuda")) == [("bfloat16", 4), ("bfloat16", 12)]


@needs_native
@pytest.mark.usefixtures("quick")
def test_report_stops_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = report_on(tmp_path, [BOTH["modulation"], BOTH["attention"]], seconds=0.0)
    assert found["rows"] == []
    assert "out of time" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1


@needs_native
@pytest.mark.usefixtures("quick")
def test_a_failing_case_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.walt_kernels.window_attention

    def broken(*args: Any, **inputs: Any) -> torch.Tensor:
        if ops.walt_kernels._dispatch.forced() == "cpu":
            raise RuntimeError("an illegal memory access\nand more")
        return right(*args, **inputs)

    monkeypatch.setattr(ops.walt_kernels, "window_attention", broken)
    found, failed = report_on(tmp_path, [BOTH["attention"], BOTH["modulation"]])
    assert {row["op"] for row in found["rows"]} == {"adaln_residual_modulate"}
    assert [text.split(": ", 1)[1] for text in failed] == ["cpu: RuntimeError: an illegal memory access"] * 2
    assert found["failed"] == failed


@needs_native
@pytest.mark.usefixtures("quick")
def test_a_wrong_backend_is_not_timed_and_the_right_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.check

    def check(case: Case, dtype: Any, device: str, runs: bool, ours: str) -> Any:
        assert ours != "reference", "off by one"
        return right(case, dtype, device, runs, ours)

    monkeypatch.setattr(ops, "check", check)
    rows = []
    effort = measure.Effort(True, ("reference", "cpu"))
    with pytest.raises(AssertionError, match="reference: off by one"):
        rows.extend(measure.rows_of(SMALL, torch.float32, "cpu", PEAK, effort))
    assert [(row["mode"], row["backend"]) for row in rows] == [(mode, "cpu") for mode in SMALL.modes]
    assert "reference" not in rows[0]["baselines"]


@needs_native
@pytest.mark.usefixtures("quick")
def test_rows_of_a_seeming_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is particular to ``device="cuda"``, with tensors that are on the CPU all the same."""
    clock = Gpu()
    inputs_of = ops.inputs_of
    monkeypatch.setattr(ops, "inputs_of", lambda case, dtype, device: inputs_of(case, dtype, "cpu"))
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(timing, "_flush", lambda: SimpleNamespace(zero_=lambda: None))
    for name, value in (("synchronize", None), ("reset_peak_memory_stats", None), ("memory_allocated", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 20)

    def too_large(**inputs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    real = ops.subject

    def subject(case: Case, *rest: Any) -> contender.Subject:
        made = real(case, *rest)
        full = {
            "too large": contender.Contender(too_large if case.name == "a case" else made.contenders["cpu"].function)
        }
        return dataclasses.replace(made, contenders={**made.contenders, **full})

    monkeypatch.setattr(ops, "subject", subject)
    case = dataclasses.replace(BOTH["attention"], name="a case")
    rows = list(measure.rows_of(case, torch.bfloat16, "cuda", PEAK, QUICK))
    assert [row["mode"] for row in rows] == list(GPU_MODES)
    for row in rows:
        assert row["ms"] == pytest.approx(1.0)
        assert row["peak_memory"] == row["baseline_memory"] == 3.0
        assert "too large: does not run: OutOfMemoryError: CUDA out of memory" in row["notes"]
        assert set(row["baselines"]) == {ops.REFERENCE, "partition + SDPA"}  # and none by way of float32
    assert torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False


@needs_native
@pytest.mark.usefixtures("quick")
def test_no_backend_no_row(tmp_path: Path) -> None:
    found, failed = report_on(tmp_path, [BOTH["modulation"]], backends=("flash",))
    assert (found["rows"], failed) == ([], [])
    assert all(entry["met"] is None for entry in found["targets"])


def test_two_calls_that_differ_are_not_deterministic() -> None:
    counter = iter(range(9))
    functions = {
        "ours": contender.Contender(lambda: torch.full((1 << 18,), float(next(counter)))),
        "same": contender.Contender(lambda: torch.ones(1 << 18)),
    }
    subject = contender.Subject({}, functions)
    assert measure.memory_of(subject, "ours", "forward", "cpu")["deterministic"] is False
    found = measure.memory_of(subject, "same", "forward", "cpu")
    assert (found["deterministic"], found["output_memory"]) == (True, 1.0)


def test_memory_of_a_backward_pass_is_without_its_forward_pass() -> None:
    x = torch.ones(10 << 18, requires_grad=True)  # 10 MiB
    if memory.peak(lambda: None) is None:
        pytest.skip("this system does not tell a process's high-water mark")
    functions = {"ours": contender.Contender(lambda x: (x.exp() + 1).exp())}
    found = measure.memory_of(contender.Subject({"x": x}, functions), "ours", "backward", "cpu")
    assert found["output_memory"] == 10.0
    assert 9 <= found["peak_memory"] <= 31


def test_report_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        benchmark.main(["gpu-report", "--out", "never made", "--minutes", "1"])
    assert exit.value.code == 2
    assert "needs a CUDA device, and torch sees none here" in capsys.readouterr().err
    assert not Path("never made").exists()


class Compiled:
    """In the place of what compiles ahead: takes no time."""

    last: Compiled

    def __init__(self, work: list[gpu_ahead.Work], jobs: int) -> None:
        self.work, self.jobs = work, jobs
        Compiled.last = self

    def finish(self, deadline: float) -> int:
        self.deadline = deadline
        return len(self.work)


def test_report_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU seems to be here; the run itself is left out, what is around it is not."""
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n{verified.MARKS[0]}\n{verified.MARKS[1]}\nb\n")
    passed = {"file": "test_triton_adaln_lora.py", "backend": "triton", "finished": True}
    passed |= {"passed": 7, "failed": 0, "skipped": 0, "messages": []}
    seen: dict[str, Any] = {}

    def run(out: Path, seconds: float, **rest: Any) -> Any:
        seen.update(rest, seconds=seconds)
        out.mkdir()
        found = {**results(), "tests": rest["tests"](60.0)}
        return {**found, "targets": targets.verdicts(found)}, []

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_report, "run", run)
    monkeypatch.setattr(gpu_watch, "watched", lambda *asked: iter([asked]))
    monkeypatch.setattr(gpu_report, "steps", lambda models, deadline: iter([(models, deadline)]))
    monkeypatch.setattr(gpu_tests, "run", lambda files, seconds, say, reports, jobs: seen.update(jobs=jobs) or [passed])
    monkeypatch.setattr(gpu_report, "Ahead", Compiled)
    arguments = ["gpu-report", "--out", str(tmp_path / "out"), "--minutes", "2", "--readme", str(readme)]
    assert benchmark.main([*arguments, "--jobs", "16"]) == 1  # not one test of the cuda backend ran
    assert (seen["seconds"], seen["jobs"]) == (120, 8)
    effort = measure.Effort(False, ("triton", "cuda", "cudnn", "flash"))
    planned = gpu_report.plan(cases.GPU_CASES)
    models = [(m, b) for b in ("default", "reference") for m in ("transformer", "tokenizer")]
    assert list(seen["measured"](1009.0)) == [(planned, effort, "cuda", 1009.0 - 0.22 * 120), (models, 1009.0)]
    compiled = Compiled.last
    assert (compiled.jobs, compiled.deadline, len(compiled.work)) == (8, 1009.0 - 0.65 * 120, 2 + len(planned))
    assert readme.read_text().startswith(f"a\n{verified.MARKS[0]}\nWritten by `python -m benchmarks` on A machine")
    assert benchmark.main([*arguments[:2], str(tmp_path / "again"), "--no-tests"]) == 0


# ---- a process of its own -------------------------------------------------------------------------------------------

CHILD = """
import json, os, sys, time
for position, (dtype, index) in enumerate(json.load(sys.stdin)["plan"]):
    print(json.dumps({"begin": position}), flush=True)
    if index == 1:
        os._exit(7)
    if index == 2:
        time.sleep(60)
    if index == 3:
        print(json.dumps({"failed": "an illegal memory access"}), flush=True)
        sys.exit(3)
    print(json.dumps({"row": index}), flush=True)
"""


def watched(indices: list[int], seconds: float = 100.0, code: str = CHILD) -> list[gpu_child.Message]:
    child = (gpu_watch.CHILD[0], "-c", code)
    plan = [("bfloat16", i) for i in indices]
    return list(gpu_watch.watched(plan, QUICK, "cpu", time.monotonic() + seconds, case_seconds=3.0, child=child))


def test_a_crash_or_a_hang_costs_one_case() -> None:
    assert watched([0, 1, 0, 2, 3, 0, 1]) == [
        {"row": 0},
        {"failed": "('bfloat16', 1): the process ended with status 7"},
        {"row": 0},
        {"failed": "('bfloat16', 2): stopped, it took more than 3 s"},
        {"failed": "an illegal memory access"},
        {"row": 0},
        {"failed": "('bfloat16', 1): the process ended with status 7"},
    ]


def test_a_process_that_never_begins_is_not_started_again() -> None:
    assert watched([0, 0, 0], code="raise SystemExit(1)") == [
        {"failed": "('bfloat16', 0): the process ended with status 1"}
    ]


def test_nothing_outlives_the_deadline() -> None:
    start = time.monotonic()
    assert watched([0, 2, 0], seconds=1.0) in ([{"row": 0}], [])
    assert time.monotonic() - start < 3.0


@pytest.mark.parametrize(("works", "status", "told"), [(True, 0, 2), (False, gpu_child.UNUSABLE, 1)])
def test_a_gpu_that_is_lost_ends_the_process(
    works: bool, status: int, told: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def synchronize() -> None:
        if not works:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def messages(*_: Any) -> Iterator[gpu_child.Message]:
        print("a library says something")
        yield from ({"failed": "a kernel"}, {"row": 1})

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(gpu_child, "messages", messages)
    asked = {"plan": [["bfloat16", 0]], "quick": True, "backends": ["triton"], "device": "cuda"}
    monkeypatch.setattr(gpu_child.sys, "stdin", io.StringIO(json.dumps(asked)))
    monkeypatch.setattr(gpu_child.sys, "stdout", os.fdopen(os.dup(2), "w"))
    assert gpu_child.main() == status
    lines = capfd.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [{"failed": "a kernel"}, {"row": 1}][:told]


# ---- compiled ahead -------------------------------------------------------------------------------------------------


def touch(path: Path, seconds: float = 0.0) -> gpu_ahead.Work:
    code = f"import sys, time; time.sleep({seconds}); open(sys.stdin.read(), 'w')"
    return gpu_ahead.Work((sys.executable, "-c", code), str(path))


def test_what_is_compiled_ahead_runs_until_it_is_done_or_its_time_is_up(tmp_path: Path) -> None:
    ahead = gpu_ahead.Ahead([touch(tmp_path / str(i)) for i in range(4)], 2)
    assert ahead.finish(time.monotonic() + 100.0) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "2", "3"}
    start = time.monotonic()
    broken = gpu_ahead.Work((sys.executable, "-c", "raise SystemExit(1)"))
    ahead = gpu_ahead.Ahead([touch(tmp_path / "slow", 100.0), broken, touch(tmp_path / "quick")], 2)
    while not (tmp_path / "quick").exists():
        time.sleep(0.02)
    assert ahead.finish(time.monotonic() + 0.5) == 1
    assert not (tmp_path / "slow").exists()
    assert time.monotonic() - start < 50.0
    assert gpu_ahead.Ahead([], 2).finish(0.0) == 0


@needs_native
def test_what_compiles_is_called_in_every_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, str]] = []

    def call(self: contender.Subject, name: str, mode: str) -> Any:
        return lambda: called.append((name, mode))

    monkeypatch.setattr(contender.Subject, "call", call)
    gpu_child.compile_all([("float32", 0)], [BOTH["attention"]], measure.Effort(False, ("cpu",)), "cpu")
    compiled = {"FlexAttention", "FlexAttention, expanded bias", contender.COMPILED}
    assert {name for name, mode in called if mode == "forward"} == {"cpu"} | compiled
    for mode in ("backward", "forward+backward"):  # FlexAttention has none on a CPU
        assert [name for name, called_in in called if called_in == mode] == ["cpu", contender.COMPILED]


def test_models_are_stepped_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest ones on the CPU; one that fails does not stop the others."""
    models = [("tokenizer", "reference"), ("transformer", "no such backend"), ("transformer", "default")]
    options = ("--preset", "minimal", "--device", "cpu")
    first, second, third = gpu_report.steps(models, time.monotonic() + 200.0, options)
    for found, name, backend in ((first, "tokenizer", "reference"), (third, "transformer", "default")):
        assert gpu_models.line(found["model"]).startswith(f"minimal {name}, {backend}: step ")
        assert 0 < found["model"]["least_ms"] <= found["model"]["step_ms"]
    assert "transformer, no such backend: ValueError: name is 'no such backend'" in second["failed"]
    assert list(gpu_report.steps(models, time.monotonic() - 1.0)) == []


@needs_native
def test_the_measuring_process_itself() -> None:
    """On the CPU, with a case that is small enough: messages arrive, and nothing else on that pipe."""
    (index,) = (i for i, case in enumerate(cases.GPU_CASES) if case.name == "24 layers, rank 2")
    found = list(gpu_watch.watched([("float32", index)], QUICK, "cpu", time.monotonic() + 150.0))
    assert list(found[0]["ceilings"]) == ["float32"]
    assert [(m["row"]["mode"], m["row"]["backend"]) for m in found[1:]] == [(mode, "cpu") for mode in GPU_MODES]
