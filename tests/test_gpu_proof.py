"""What a GPU run is judged by: its targets, its tests, and the table that README shows of it."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from test_benchmarks import PEAK, result, results

from benchmarks import __main__ as benchmark
from benchmarks import cases, gpu_tests, machine, plots, targets, verified
from benchmarks.case import GPU_MODES

# ---- targets --------------------------------------------------------------------------------------------------------


def test_every_target_is_about_cases_that_are_measured() -> None:
    for target in targets.TARGETS:
        found = [case for case in cases.GPU_CASES if case.op == target.op and case.name.startswith(target.cases)]
        assert {case.name.startswith(name) for case in found for name in target.cases} >= {True}
        assert all(any(case.name.startswith(name) for case in found) for name in target.cases)
        assert all(target.mode in case.modes for case in found)
    blocks = [case for case in cases.GPU_CASES if case.op == "adaln_residual_modulate"]
    tokens = [c.elements / 4 / d for c, d in zip(blocks, (1024, 1152), strict=True)]
    assert [case.name for case in blocks] == ["L block, 16 x 1280 x 1024", "XL block, 16 x 1280 x 1152"]
    assert min(tokens) >= 16_000


def judged(target: targets.Target, *rows: dict[str, Any]) -> list[tuple[bool | None, list[str]]]:
    found = results(*rows) | {"ceilings": {"bfloat16": PEAK}}
    return [(entry["met"], entry["found"]) for entry in targets.verdicts(found, [target])]


def row(**values: Any) -> dict[str, Any]:
    more = {"output_memory": 100.0, "peak_memory": 100.0, "deterministic": True, "dtype": "bfloat16"}
    return {**result("causal_conv3d"), **more, **values}  # 10 GFLOP/s of 100, 1 GB/s of 10, half of its floor


@pytest.mark.parametrize(
    ("demand", "values", "met", "found"),
    [
        ({"share": 0.9, "of": "copy"}, {"gbps": 9.0}, True, "90% of copy, 90% wanted"),
        ({"share": 0.9, "of": "copy"}, {"gbps": 8.9}, False, "89% of copy, 90% wanted"),
        ({"share": 0.6, "of": "product"}, {"gflops": 60.0}, True, "60% of product, 60% wanted"),
        ({"share": 0.6, "of": "product"}, {"gflops": 59.0, "gbps": 10.0}, False, "59% of product, 60% wanted"),
        ({"share": 0.5}, {}, True, "50% of floor, 50% wanted"),
        ({"share": 0.51}, {}, False, "50% of floor, 51% wanted"),
        ({"speedup": 2.0}, {}, True, "2.00x over the fastest baseline, 2x wanted"),
        ({"speedup": 2.1}, {}, False, "2.00x over the fastest baseline, 2.1x wanted"),
        ({"speedup": 4.0, "over": "slow"}, {}, True, "5.00x over slow, 4x wanted"),
        ({"speedup": 4.0, "over": "absent"}, {}, None, "absent was not timed"),
        ({"deterministic": True}, {}, True, "the same bits every time"),
        ({"deterministic": True}, {"deterministic": False}, False, "other bits in another run"),
        ({"lean": True}, {"peak_memory": 106.0}, True, "106 MiB at the peak, 107 wanted"),
        ({"lean": True}, {"peak_memory": 200.0}, False, "200 MiB at the peak, 107 wanted"),
    ],
)
def test_targets(demand: dict[str, Any], values: dict[str, Any], met: bool | None, found: str) -> None:
    target = targets.Target("causal_conv3d", "forward", ("a c",), **demand)
    assert judged(target, row(**values), row(mode="backward"), row(case="other"), row(dtype="float32")) == [
        (met, [found])
    ]


def test_all_demands_of_a_target_must_be_met() -> None:
    target = targets.Target("causal_conv3d", "forward", ("a case",), speedup=2.0, deterministic=True)
    assert judged(target, row())[0][0] is True
    assert judged(target, row(deterministic=False))[0][0] is False
    assert judged(target) == [(None, [])]
    entries = targets.verdicts(results(row()) | {"ceilings": {"bfloat16": PEAK}}, [target])
    assert targets.line(entries[0]).startswith("met: causal_conv3d, a case, forward, cpu: 2.00x over")
    assert targets.line({**entries[0], "met": False}).startswith("MISSED")


@pytest.mark.parametrize(("ms", "met"), [(1.1 * 7.0, True), (1.1 * 7.0 + 0.01, False)])
def test_half_a_batch_of_images(ms: float, met: bool) -> None:
    """All video: 10 ms for 40 MB. Half: 20 MB for the video and 20 MB more for the images, 2 ms at 10 GB/s."""
    target = targets.Target("causal_conv3d", "forward", ("half",), half_of="whole")
    whole = row(case="whole", ms=10.0, gbps=4.0)
    half = row(case="half", ms=ms, gbps=40.0 / ms)
    assert judged(target, half, whole) == [(met, [f"{ms:.3f} ms, 7.700 ms wanted"])]
    assert judged(target, half, {**whole, "backend": "triton"}) == [(None, ["whole was not timed"])]


# ---- the tests of a GPU ---------------------------------------------------------------------------------------------

TESTS = """
import time
import pytest

@pytest.mark.GPU
def test_good(): pass

@pytest.mark.GPU
def test_bad(): assert 1 == 2, "one is not two"

@pytest.mark.GPU
def test_skipped(): pytest.skip("no such kernel")

def test_of_a_cpu(): raise AssertionError("never selected")

@pytest.mark.GPU
@pytest.mark.large
def test_large(): raise AssertionError("never selected")
""".replace("GPU", "gpu")  # this file itself has no such test


def outcome(file: str, passed: int = 1, failed: int = 0, skipped: int = 0, *messages: str) -> dict[str, Any]:
    counts = {"passed": passed, "failed": failed, "skipped": skipped, "messages": list(messages)}
    return {"file": file, "backend": gpu_tests.backend_of(Path(file)), "finished": True, **counts}


@pytest.mark.parametrize("jobs", [1, 2])
def test_test_files_are_run_and_counted(jobs: int, tmp_path: Path) -> None:
    (tmp_path / "test_triton_x.py").write_text(TESTS)
    (tmp_path / "test_cpu.py").write_text("def test(): pass")
    paths = gpu_tests.files(tmp_path)
    assert [path.name for path in paths] == ["test_triton_x.py"]
    said: list[str] = []
    (found,) = gpu_tests.run(paths, 120.0, said.append, tmp_path / "reports.jsonl", jobs)
    assert {key: found[key] for key in ("backend", "finished", "passed", "failed", "skipped")} == {
        "backend": "triton",
        "finished": True,
        "passed": 1,
        "failed": 1,
        "skipped": 1,
    }
    failed, counts = said
    assert failed == "FAILED test_triton_x.py test_bad: AssertionError: one is not two"
    assert counts.endswith("1 passed, 1 failed, 1 skipped: test_bad: AssertionError: one is not two")
    told = gpu_tests.read(tmp_path / "reports.jsonl")
    assert [report["tests"] for report in told if "tests" in report] == [3]
    assert ["one is not two" in report["text"] for report in told if report.get("outcome") == "failed"] == [True]


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["in front", "in the background"])
def test_a_file_that_takes_too_long_is_interrupted(
    handler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = tmp_path / "reached"

    class Late(subprocess.Popen):  # type: ignore[type-arg]
        """Its time is up as soon as the slow test runs: how long pytest takes to start says nothing."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout != 7.0:
                return super().wait(timeout)
            while not reached.exists() and self.poll() is None:
                time.sleep(0.05)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(gpu_tests.subprocess, "Popen", Late)
    slow = f"def test_slow():\n    open({str(reached)!r}, 'w').close()\n    time.sleep(120)\n"
    begin = "import pytest, time\npytestmark = pytest.mark.GPU\ndef test_quick(): pass\n"
    (tmp_path / "test_cuda_x.py").write_text(f"{begin}{slow}".replace("GPU", "gpu"))
    before = signal.signal(signal.SIGINT, handler)
    try:
        paths = [tmp_path / "test_cuda_x.py"]
        (found,) = gpu_tests.run(paths, 7.0, lambda _: None, tmp_path / "reports.jsonl")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not found["finished"]
    assert found["passed"] == 1  # what was done before is kept
    assert "stopped by the time limit" in gpu_tests.line(found)


def test_a_file_that_does_not_load_fails(tmp_path: Path) -> None:
    (tmp_path / "test_triton_x.py").write_text(
        "import pytest\n# mark.GPU\nraise RuntimeError('no kernels')".replace("GPU", "gpu")
    )
    (tmp_path / "test_cuda_x.py").write_text(TESTS)
    paths = gpu_tests.files(tmp_path)
    right, broken = gpu_tests.run(paths, 60.0, lambda _: None, tmp_path / "reports.jsonl")
    assert (broken["file"], broken["passed"], broken["failed"]) == ("test_triton_x.py", 0, 1)
    assert "no kernels" in broken["messages"][0]
    assert (right["passed"], right["failed"]) == (1, 1)


def test_a_backend_that_was_skipped_as_a_whole_is_a_failure() -> None:
    good = [outcome("test_triton_a.py"), outcome("test_cuda_a.py"), outcome("test_flash.py", 0, 0, 9, "not installed")]
    assert gpu_tests.failures(good) == []
    skipped = [good[0], outcome("test_triton_b.py", 0, 0, 5, "why"), outcome("test_cuda_a.py", 0, 0, 3, "no nvcc")]
    assert gpu_tests.failures(skipped) == ["no test of the cuda backend ran: no nvcc"]
    assert gpu_tests.failures(good[1:]) == ["no test of the triton backend ran: there is none"]
    failing = [good[0], outcome("test_cuda_a.py", 3, 1, 0, "test_x: wrong")]
    assert gpu_tests.failures(failing) == ["test_cuda_a.py: 3 passed, 1 failed, 0 skipped: test_x: wrong"]


# ---- verified on ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("window_attention", "flash"), ("window_attention", "triton"), ("adaln_lora", "cuda")]
    pairs.append(("causal_conv3d", "cudnn"))
    monkeypatch.setattr(verified, "backends", lambda: iter(pairs))


@pytest.mark.usefixtures("two_backends")
def test_the_table_of_what_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    triton = {"op": "window_attention", "backend": "triton", "dtype": "bfloat16"}
    rows = [
        row(**triton, speedup=2.0),
        row(**triton, case="other", speedup=8.0),
        row(**triton, mode="backward", speedup=3.0),
        row(**triton | {"dtype": "float32"}, speedup=0.1),
    ]
    found = results(*rows) | {
        "tests": [
            outcome("test_triton_window_attention.py", 40, 0, 2),
            outcome("test_flash.py", 0, 0, 9, "missing"),
            outcome("test_cudnn.py", 5),
        ],
        "targets": [{**triton, "met": True}, {**triton, "met": False}, {**triton, "backend": "-", "met": None}],
    }
    file, readme = tmp_path / "results.json", tmp_path / "README.md"
    file.write_text(json.dumps(found))
    readme.write_text(f"before\n{verified.MARKS[0]}\nold\n{verified.MARKS[1]}\nafter\n")
    assert benchmark.main(["verified", str(file), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{verified.MARKS[0]}\nWritten by `python -m benchmarks` on A machine")
    assert text.endswith(f"\n{verified.MARKS[1]}\nafter\n")
    assert (
        "| `window_attention` | triton | 40 passed, 0 failed, 2 skipped | **4.00x**, 2.00x | **3.00x**, 3.00x "
        "| 1 of 2 met |" in text
    )
    assert "| `window_attention` | flash | layout tested; not yet run on a GPU | - | - | - |" in text
    assert "| `adaln_*` | cuda | compiles; not yet run on a GPU | - | - | - |" in text
    assert "| `causal_conv3d` | cudnn | 5 passed, 0 failed, 0 skipped | - | - | - |" in text
    assert capsys.readouterr().out.strip() in text


def test_readme_has_the_table_of_the_committed_results(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Where this fails after a run: python -m benchmarks verified --readme README.md"""
    assert benchmark.main(["verified"]) == 0
    begin, end = verified.MARKS
    assert (machine.ROOT / "README.md").read_text().partition(f"{begin}\n")[2].partition(f"\n{end}")[0] == (
        capsys.readouterr().out.strip()
    )
    (tmp_path / "README.md").write_text("no markers")
    for arguments in (["--readme", str(tmp_path / "README.md")], [str(tmp_path / "README.md")]):
        with pytest.raises(SystemExit):
            benchmark.main(["verified", *arguments])
    assert "is not a file of gpu-report" in capsys.readouterr().err


def test_the_backends_are_those_of_the_ops() -> None:
    assert ("window_attention", "flash") in set(verified.backends())
    assert all(backend in verified.WITHOUT for _, backend in verified.backends())


def test_a_gpu_backend_is_a_default_only_with_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    files = (machine.ROOT / "benchmarks" / "results").glob("cuda-*.json")
    rows = [found for path in files for found in json.loads(path.read_text())["rows"]]
    assert verified.unproven(rows) == []
    ops = {}
    for op, found in verified._dispatch._ops.items():
        free = [dataclasses.replace(backend, opt_in=None) for backend in found.backends]
        if op == "adaln_modulate":
            free.append(dataclasses.replace(free[0], name="cuda"))
        ops[op] = found._replace(backends=tuple(free))
    monkeypatch.setattr(verified._dispatch, "_ops", ops)
    assert {"window_attention, flash", "adaln_modulate, cuda"} <= set(verified.unproven([]))
    slow, fast = (row(op="window_attention", backend="flash", speedup=speedup) for speedup in (0.9, 1.1))
    assert "window_attention, flash" in verified.unproven([slow])
    found = verified.unproven([fast, row(op="adaln_residual_modulate", backend="cuda", speedup=0.5)])
    assert not {"window_attention, flash", "adaln_modulate, cuda"} & set(found)


def test_plots_of_several_backends_and_modes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [result("causal_conv3d", mode, backend=b) for mode in GPU_MODES for b in ("triton", "cuda")]
    assert len(plots.write(results(*rows), tmp_path)) == 2


def test_the_line_of_a_gpu() -> None:
    where = {**results()["machine"], "hardware": "NVIDIA H200", "isa": "sm90"}
    where |= {"cuda": "13.0", "driver": "580.1", "cudnn": "91200", "triton": "3.7.0"}
    assert machine.sentence(where) == (
        "NVIDIA H200 (sm90), driver 580.1, CUDA 13.0, cuDNN 91200, Triton 3.7.0, torch 2, commit abc, today"
    )
