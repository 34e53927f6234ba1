"""What the benchmark times on a GPU, and how, as far as a CPU can test it; and the floors of all cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_benchmarks import KINDS, PEAK, result
from torch.nn.attention import SDPBackend

from benchmarks import __main__ as benchmark
from benchmarks import (
    cases,
    contender,
    floors,
    machine,
    measure,
    ops,
    report,
    timing,
    video_norm,
    window_attention,
)
from benchmarks.case import GPU_MODES, Case
from walt_kernels import _native, testing

needs_native = pytest.mark.skipif(_native.C is None, reason=f"native kernels: {_native.reason}")
QUICK = measure.Effort(True, ("cpu",))
PLAIN = window_attention.attention("plain", (1, 2, 4, 4, 2, 8), (2, 2, 4), table=False, norm=False)
BOTH = {name: dataclasses.replace(case, modes=GPU_MODES) for name, case in KINDS.items()}


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
    refusals = [note for note in subject.notes if "left out by --quick" not in note]
    assert refusals == ["flash: flash-attn knows no bias_table"]
    assert ops.subject(KINDS["attention"], torch.float32, "cpu", True).ours == ("ours",)


def test_inputs_keep_their_layout_on_the_device() -> None:
    """q, k and v stay views of one packed projection; a copy of each alone would be contiguous."""
    for name, case in KINDS.items():
        here, there = (ops.inputs_of(case, torch.bfloat16, device) for device in ("cpu", "meta"))
        for key, value in case.inputs(torch.bfloat16).items():
            if isinstance(value, torch.Tensor):
                assert here[key].stride() == there[key].stride() == value.stride(), (name, key)
                assert here[key].requires_grad == there[key].requires_grad == value.requires_grad
                assert there[key].device.type == "meta"
                assert torch.equal(here[key], value)
    q, k = (ops.inputs_of(KINDS["attention"], torch.float32, "cpu")[name] for name in "qk")
    assert q.untyped_storage().nbytes() == 3 * q.nbytes
    assert k.is_leaf


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
def test_work_adds_up(case: Case) -> None:
    forward, backward, both = (case.work(mode, torch.bfloat16) for mode in GPU_MODES)
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
        held += inputs["x"].nbytes if inputs.get("over") == "clip" else 0  # read for its statistics, and again
        assert case.work("forward", torch.float32)[1] == pytest.approx(held, rel=0.4), kind


def test_floors_of_known_cases() -> None:
    block, conv, norm, attention = cases.GPU_CASES[:4]
    tokens = 16 * 1280 * 1024
    assert floors.milliseconds(block, "forward", torch.bfloat16) == pytest.approx(8 * tokens / 4.3e12 * 1e3)
    assert floors.milliseconds(attention, "forward", torch.bfloat16) == pytest.approx(8 * tokens / 4.3e12 * 1e3)
    products = 2 * 17 * 128 * 128 * 27 * 128 * 128
    assert floors.milliseconds(conv, "forward", torch.bfloat16) == pytest.approx(products / 790e12 * 1e3)
    assert floors.milliseconds(conv, "forward+backward", torch.bfloat16) == pytest.approx(3 * products / 790e12 * 1e3)
    values = 17 * 128 * 128 * 128  # statistics, then the norm: two reads and a write; backward the gradient twice, too
    assert floors.milliseconds(norm, "forward", torch.bfloat16) == pytest.approx(3 * 2 * values / 4.3e12 * 1e3)
    assert floors.milliseconds(norm, "backward", torch.bfloat16) == pytest.approx(5 * 2 * values / 4.3e12 * 1e3)
    for small in (
        video_norm.norm("", (9, 512, 5, 16, 16)),
        video_norm.norm("", (1, 96, 4, 256, 256), **video_norm.PIXEL),
    ):
        forward, backward = (small.work(mode, torch.bfloat16)[1] for mode in ("forward", "backward"))
        assert backward == pytest.approx(1.5 * forward)  # a frame is on chip after one read: 1 and 1, 2 and 1


def test_floors_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["floors"]) == 0
    out = capsys.readouterr().out
    assert all(f"| {case.op} | {case.name} | backward |" in out for case in cases.GPU_CASES)
    assert "| causal_conv3d | C 128, 17x128x128 | forward | 246 | 143.5 | 1.72e+03 | 0.3119 | product |" in out
    assert benchmark.main(["floors", "--device", "cpu", "--op", "adaln_lora", "--dtype", "float32"]) == 0
    assert "| adaln_lora | 24 layers, rank 2 | forward |" in capsys.readouterr().out


def test_the_floor_stands_beside_the_time() -> None:
    times = timing.Times(1.0, 2.0, 3.0, 9)
    row = result("causal_conv3d") | measure.rates(cases.GPU_CASES[1], "forward", torch.bfloat16, times, PEAK)
    assert row["h200_floor_ms"] == pytest.approx(0.3119, abs=1e-4)
    assert "| 0.3119 |" in report.table([row])
    assert "H200 floor ms" in report.table([row])


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
