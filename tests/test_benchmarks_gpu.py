"""The benchmark's GPU side as far as a CPU can test it: the same plan and the same code on the cpu backend."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_benchmarks import KINDS, PEAK, SMALL, result, results
from torch.nn.attention import SDPBackend

from benchmarks import __main__ as benchmark
from benchmarks import (
    cases,
    contender,
    floors,
    gpu_report,
    gpu_tests,
    machine,
    measure,
    memory,
    ops,
    report,
    targets,
    timing,
    verified,
    window_attention,
)
from walt_kernels import _native, testing

needs_native = pytest.mark.skipif(_native.C is None, reason=f"native kernels: {_native.reason}")
QUICK = measure.Effort(True, ("cpu",))
PLAIN = cases.attention("plain", (1, 2, 4, 4, 2, 8), (2, 2, 4), plain=True)
BOTH = {name: dataclasses.replace(case, modes=cases.GPU_MODES) for name, case in KINDS.items()}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled, hardly anything is timed."""
    monkeypatch.setattr(ops, "QUICK_COMPILED", ())
    monkeypatch.setattr(measure.Effort, "seconds", 0.0)
    monkeypatch.setattr(gpu_report, "ceilings", lambda device, dtype: PEAK)


def report_on(
    out: Path, some: list[cases.Case], seconds: float = 1e3, backends: tuple[str, ...] = ("cpu",)
) -> tuple[dict[str, Any], list[str]]:
    return gpu_report.run(
        out,
        seconds,
        command="a command",
        cases=some,
        effort=measure.Effort(True, backends),
        tests=lambda seconds: [],
        device="cpu",
    )


# ---- what is timed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_backward_alone(kind: str) -> None:
    subject = ops.subject(KINDS[kind], torch.float32, "cpu", True)
    calls: list[str] = []
    ours = subject.contenders["ours"].function

    def counted(**inputs: Any) -> Any:
        calls.append("forward")
        return ours(**inputs)

    torch.manual_seed(0)
    call = contender.step(counted, subject.inputs, "backward")
    runs = [contender.tensors_of(call()) for _ in range(3)]
    assert calls == ["forward"]  # once, whatever the number of backward passes
    torch.manual_seed(0)
    outputs, grads = contender.step(ours, subject.inputs, "forward+backward")()
    assert len(contender.tensors_of((outputs, grads))) == len(outputs) + len(grads)
    for run in runs:
        assert all(torch.equal(a, b) for a, b in zip(run, grads, strict=True))


@needs_native
def test_each_backend_of_ours_is_a_contender() -> None:
    subject = ops.subject(KINDS["attention"], torch.float32, "cpu", True, ("cpu", "flash", "no such backend"))
    assert subject.ours == ("cpu",)
    assert next(iter(subject.contenders)) == "cpu"
    assert "flash: flash-attn knows no bias_table" in subject.notes
    assert "no such backend: window_attention has no no such backend kernels" in subject.notes
    assert ops.subject(KINDS["attention"], torch.float32, "cpu", True).ours == ("ours",)


@pytest.mark.parametrize("kind", ["attention", "images", "frames", "plain"])
def test_every_attention_baseline(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU is compared with computes what the op computes; on a CPU it is all called by its plain version."""
    monkeypatch.setattr(window_attention.torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(window_attention, "CPU_KERNELS", {" math": SDPBackend.MATH, " flash": None})
    subject = ops.subject(PLAIN if kind == "plain" else KINDS[kind], torch.float32, "cpu", False)
    names = {name for name in subject.contenders if "Flex" in name or "SDPA" in name}
    layouts = {"images": ["partition", "videos only, partition"], "frames": ["partition", "views"]}
    assert names == {
        *(f"{layout} + SDPA {kernel}" for layout in layouts.get(kind, ["partition"]) for kernel in ("math", "flash")),
        *(["FlexAttention"] if kind == "plain" else ["FlexAttention", "FlexAttention, expanded bias"]),
    }
    inputs = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in subject.inputs.items()}
    expected = subject.contenders["ours"].function(**inputs)
    for name in names:
        assert torch.allclose(subject.contenders[name].function(**inputs), expected, rtol=1e-4, atol=1e-5), name


def test_the_kernels_of_a_gpu() -> None:
    assert set(window_attention.GPU_KERNELS.values()) == {
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.MATH,
    }


class Gpu:
    """Writes down what a GPU is asked for; a call takes a millisecond, what comes before it is not counted."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        return SimpleNamespace(
            record=lambda: self.asked.append("record"),
            synchronize=lambda: self.asked.append("wait"),
            elapsed_time=lambda end: 1.0,
        )


def test_a_gpu_call_is_timed_by_events_and_finds_a_cold_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.asked.append("busy"))
    monkeypatch.setattr(timing, "_flush", lambda: SimpleNamespace(zero_=lambda: gpu.asked.append("flush")))
    assert timing.seconds_of(lambda: gpu.asked.append("call"), "cuda") == pytest.approx(1e-3)
    once = ["busy", "flush", "record", "call", "record", "wait"]
    assert gpu.asked == once
    gpu.asked.clear()
    times = timing.interleaved({"a": lambda: gpu.asked.append("call")}, device="cuda", seconds=0.01)
    assert times["a"].p50 == pytest.approx(1.0)
    assert gpu.asked == once * (1 + times["a"].calls)  # between repeats, too


def test_the_flush_is_larger_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "empty", lambda size, **_: made.append(size))
    for cache in (50 << 20, 128 << 20):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, c=cache: SimpleNamespace(L2_cache_size=c))
        timing._flush.__wrapped__()
        assert made[-1] >= 2 * cache


@pytest.mark.gpu
def test_a_copy_on_a_gpu_takes_the_time_of_a_copy() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    source = torch.ones(64 << 20, device="cuda")
    target = torch.empty_like(source)
    times = timing.interleaved({"copy": lambda: target.copy_(source)}, device="cuda", seconds=0.1)
    gbps = 2 * source.nbytes / times["copy"].p50 / 1e6
    assert 100 < gbps < 20_000
    peak = machine.ceilings("cuda", torch.bfloat16)
    assert peak["product"] == "bfloat16"
    assert peak["gbps"] == pytest.approx(gbps, rel=0.3)


# ---- floors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*cases.CASES, *cases.GPU_CASES], ids=lambda case: f"{case.op} {case.name}")
def test_work_adds_up(case: cases.Case) -> None:
    forward, backward, both = (case.work(mode, torch.bfloat16) for mode in cases.GPU_MODES)
    assert [f + b for f, b in zip(forward, backward, strict=True)] == pytest.approx(both)
    if case.op != "training_step":
        assert min(*forward, *backward) > 0
        assert case.work("forward", torch.float32) == (forward[0], 2 * forward[1])


def test_work_is_that_of_the_inputs() -> None:
    """Bytes of the forward pass against what the tensors of a small case hold."""
    for kind, case in BOTH.items():
        inputs = case.inputs(torch.float32)
        made = ops.subject(case, torch.float32, "cpu", True).call("ours", "forward")()
        held = sum(x.nbytes for x in (*inputs.values(), *contender.tensors_of(made)) if isinstance(x, torch.Tensor))
        assert case.work("forward", torch.float32)[1] == pytest.approx(held, rel=0.4), kind


def test_floors_of_known_cases() -> None:
    block, attention, conv = cases.GPU_CASES[:3]
    tokens = 16 * 1280 * 1024
    assert floors.milliseconds(block, "forward", torch.bfloat16) == pytest.approx(8 * tokens / 4.3e12 * 1e3)
    assert floors.milliseconds(attention, "forward", torch.bfloat16) == pytest.approx(8 * tokens / 4.3e12 * 1e3)
    products = 2 * 17 * 128 * 128 * 27 * 128 * 128
    assert floors.milliseconds(conv, "forward", torch.bfloat16) == pytest.approx(products / 790e12 * 1e3)
    assert floors.milliseconds(conv, "forward+backward", torch.bfloat16) == pytest.approx(3 * products / 790e12 * 1e3)


def test_floors_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["floors"]) == 0
    out = capsys.readouterr().out
    assert all(f"| {case.op} | {case.name} | backward |" in out for case in cases.GPU_CASES)
    assert "| causal_conv3d | C 128, 17x128x128 | forward | 246 | 143.5 | 1.72e+03 | 0.3119 | product |" in out
    assert benchmark.main(["floors", "--device", "cpu", "--op", "adaln_lora", "--dtype", "float32"]) == 0
    assert "| adaln_lora | 24 layers, rank 2 | forward |" in capsys.readouterr().out


def test_the_floor_stands_beside_the_time() -> None:
    times = timing.Times(1.0, 2.0, 3.0, 9)
    row = result("causal_conv3d") | measure.rates(cases.GPU_CASES[2], "forward", torch.bfloat16, times, PEAK)
    assert row["h200_floor_ms"] == pytest.approx(0.3119, abs=1e-4)
    assert "| 0.3119 |" in report.table([row])
    assert "H200 floor ms" in report.table([row])


# ---- the report -----------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.usefixtures("quick")
def test_report_writes_the_file_after_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = gpu_report.save

    def watched(found: dict[str, Any], path: Path) -> None:
        real(found, path)
        sizes.append(len(json.loads(path.read_text())["rows"]))

    monkeypatch.setattr(gpu_report, "save", watched)
    some = [BOTH["modulation"], dataclasses.replace(BOTH["attention"], quick=False)]
    found, failed = report_on(tmp_path, some)
    assert failed == []
    assert sizes == list(range(len(found["rows"]) + 1))
    (path,) = tmp_path.iterdir()
    assert path.name == f"cpu-{machine.level()}.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(found))
    keys = [(row["op"], row["dtype"], row["mode"], row["backend"]) for row in found["rows"]]
    assert keys == [
        *(
            (op, "bfloat16", mode, "cpu")
            for op in ("adaln_residual_modulate", "window_attention")
            for mode in some[0].modes
        ),
        *(("adaln_residual_modulate", "float32", mode, "cpu") for mode in some[0].modes),
    ]
    assert set(found["ceilings"]) == {"bfloat16", "float32"}
    for row in found["rows"]:
        assert row["deterministic"] is True
        assert 0 <= row["error_ratio"] <= 1
        assert row["output_memory"] > 0
        assert row["h200_floor_ms"] > 0
        assert row["best_baseline"] in row["baselines"]
        assert "cpu" not in row["baselines"]


@needs_native
@pytest.mark.usefixtures("quick")
def test_report_stops_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = report_on(tmp_path, [BOTH["modulation"], BOTH["attention"]], seconds=0.0)
    assert len(found["rows"]) == 1
    assert "out of time" in capsys.readouterr().err


@needs_native
@pytest.mark.usefixtures("quick")
def test_a_failing_case_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.walt_kernels.window_attention

    def broken(*args: Any, **inputs: Any) -> torch.Tensor:
        if ops.walt_kernels._dispatch._forced == "cpu":
            raise RuntimeError("an illegal memory access\nand more")
        return right(*args, **inputs)

    monkeypatch.setattr(ops.walt_kernels, "window_attention", broken)
    found, failed = report_on(tmp_path, [BOTH["attention"], BOTH["modulation"]])
    assert {row["op"] for row in found["rows"]} == {"adaln_residual_modulate"}
    assert [text.split(": ", 1)[1] for text in failed] == ["cpu: RuntimeError: an illegal memory access"] * 2


@needs_native
@pytest.mark.usefixtures("quick")
def test_a_wrong_backend_is_not_timed_and_the_right_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.check

    def check(case: cases.Case, dtype: Any, device: str, runs: bool, ours: str) -> Any:
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
    monkeypatch.setattr(gpu_tests, "run", lambda files, seconds, say: [passed])
    arguments = ["gpu-report", "--out", str(tmp_path / "out"), "--minutes", "2", "--readme", str(readme)]
    assert benchmark.main(arguments) == 1  # not one test of the cuda backend ran
    assert seen["seconds"] == 120
    assert seen["effort"].backends == ("triton", "cuda", "flash")
    assert seen["cases"] == cases.GPU_CASES
    assert readme.read_text().startswith(f"a\n{verified.MARKS[0]}\nWritten by `python -m benchmarks` on A machine")
    assert benchmark.main([*arguments[:2], str(tmp_path / "again"), "--no-tests"]) == 0


def test_ceilings_of_a_gpu_are_of_its_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a size where a GPU waits for its host, float32 may look as fast as bfloat16: it is not asked."""
    asked: list[torch.dtype] = []
    on_cpu: Callable[..., Any] = lambda make: lambda *size, device: make(*(min(n, 8) for n in size))  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: asked.append(a.dtype))
    monkeypatch.setattr(machine.torch, "ones", on_cpu(torch.ones))
    monkeypatch.setattr(machine.torch, "randn", on_cpu(torch.randn))
    monkeypatch.setattr(machine, "interleaved", lambda *_, **__: {"copy": SimpleNamespace(p20=1.0)})
    monkeypatch.setattr(machine, "seconds_of", lambda call, device: call() or 1e-3)
    assert machine.ceilings("cuda", torch.bfloat16)["product"] == "bfloat16"
    assert set(asked) == {torch.bfloat16}


def test_random_inputs_of_a_gpu_case_fit_its_shape() -> None:
    """The largest one is not made here; a small one of each kind is, in the layout that the op is called with."""
    for case in cases.GPU_CASES:
        inputs = case.small().inputs(torch.bfloat16)
        assert all(value.dtype is not torch.float64 for value in inputs.values() if isinstance(value, torch.Tensor))
        if case.op == "window_attention":
            assert ("bias_table" in inputs) == ("no table" not in case.name)
            assert inputs["q"].stride(3) == 3 * inputs["q"].shape[4] * inputs["q"].shape[5]  # packed
            assert testing.leaf(inputs["q"]).requires_grad
