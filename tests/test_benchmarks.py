"""The benchmark measures what it says: a check before any time, fair baselines, interleaving, honest reports."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import __main__ as benchmark
from benchmarks import (
    adaln_lora,
    cases,
    causal_conv3d,
    compare,
    contender,
    machine,
    measure,
    memory,
    ops,
    plots,
    report,
    scaling,
    timing,
    video_norm,
    window_attention,
)
from benchmarks.case import MODES, Case
from walt_kernels import testing

SMALL = dataclasses.replace(adaln_lora.modulation("small", 1, 8, 16), fused=False)  # nothing is compiled
PEAK = {"gbps": 10.0, "gflops": 100.0, "product": "float32"}
FIELDS = {"op", "case", "mode", "dtype", "backend", "ms", "ms_p20", "ms_p80", "baselines", "best_baseline", "speedup"}
FIELDS |= {"gflops", "gbps", "share_of_peak", "peak_memory", "error_ratio", "notes"}
KINDS = {  # one small case of every kind
    "attention": window_attention.attention("small", (1, 2, 4, 4, 2, 8), (2, 2, 4)),
    "frames": window_attention.attention("small", (1, 2, 4, 4, 2, 8), (1, 4, 4)),
    "images": window_attention.attention("small", (2, 2, 4, 4, 2, 8), (2, 2, 2), images=1),
    "convolution": causal_conv3d.convolution("small", (1, 4, 3, 5, 5), 6),
    "strided": causal_conv3d.convolution("small", (1, 4, 4, 6, 6), 6, (4, 4, 4), (2, 2, 2)),
    "pointwise": causal_conv3d.convolution("small", (1, 4, 3, 5, 5), 6, (1, 1, 1)),
    "modulation": SMALL,
    "lora": adaln_lora.lora("small", 2, 16, 3, 2),
    "norm of frames": video_norm.norm("small", (2, 8, 3, 5, 4), groups=4),
    "adaptive norm": video_norm.norm("small", (2, 8, 3, 5, 4), groups=4, adaptive=True),
    "norm of clips": video_norm.norm("small", (1, 8, 3, 5, 4), "clip", groups=4, memory_format=video_norm.NCDHW),
    "norm of pixels": video_norm.norm("small", (1, 8, 3, 5, 4), **video_norm.PIXEL),
}


@pytest.fixture
def one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line sees one small case, and nothing is compiled."""
    monkeypatch.setattr(cases, "CASES", [SMALL])
    monkeypatch.setattr(benchmark, "CASES", [SMALL])
    monkeypatch.setattr(benchmark, "ceilings", lambda device, dtype: PEAK)
    monkeypatch.setattr(measure.Effort, "seconds", 0.01)


def result(op: str, mode: str = "forward", dtype: str = "float32", speedup: float = 2.0, **rest: Any) -> dict[str, Any]:
    row = {"op": op, "case": "a case", "mode": mode, "dtype": dtype, "backend": "cpu", "ms": 1.0, "speedup": speedup}
    row |= {"baselines": {"slow": 5.0, "fast": speedup}, "best_baseline": "fast", "gflops": 10.0, "gbps": 1.0}
    return {**row, "share_of_peak": 0.5, "peak_memory": 1.0, "error_ratio": 0.1, "notes": [], **rest}


def results(*rows: dict[str, Any]) -> dict[str, Any]:
    where = {"hardware": "A machine", "isa": "avx2", "threads": "2", "torch": "2", "commit": "abc", "date": "today"}
    return {"command": "python -m benchmarks", "machine": where, "ceilings": {"float32": PEAK}, "rows": list(rows)}


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_case")
def test_rows_hold_the_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    assert benchmark.main(["--quick", "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    found = [(row["dtype"], row["mode"]) for row in written["rows"]]
    assert found == [(dtype, mode) for dtype in ("float32", "bfloat16") for mode in MODES]
    for row in written["rows"]:
        assert set(row) >= FIELDS
        best = row["baselines"][row["best_baseline"]]
        assert best == min(row["baselines"].values())
        assert row["speedup"] == pytest.approx(best / row["ms"])
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert 0 <= row["error_ratio"] <= 1
        assert any("left out by --quick" in note for note in row["notes"])
        assert ("layer_norm + elementwise in float32" in row["baselines"]) == (row["dtype"] == "bfloat16")
    assert {"hardware", "isa", "threads", "torch", "commit", "date"} <= set(written["machine"])
    assert written["ceilings"]["float32"] == PEAK
    assert "adaln_residual_modulate, float32, forward: geometric mean" in capsys.readouterr().out


@pytest.mark.usefixtures("one_case")
def test_a_wrong_kernel_gets_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    kernels = ops.walt_kernels
    right = kernels.adaln_residual_modulate

    def wrong(**inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_new, h = right(**inputs)
        return x_new, h * (1.01 if kernels._dispatch.forced() is None else 1.0)

    monkeypatch.setattr(kernels, "adaln_residual_modulate", wrong)
    assert benchmark.main(["--quick", "--dtype", "float32"]) == 1
    captured = capsys.readouterr()
    assert "wrong result, not timed" in captured.err
    assert "geometric mean" not in captured.out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_baselines_compute_what_the_op_computes(kind: str, dtype: torch.dtype) -> None:
    case = KINDS[kind]
    subject = ops.subject(case, dtype, "cpu", True)
    if not subject.notes:  # --quick leaves nothing out where it compiles
        subject.contenders.pop(ops.COMPILED)
    outcomes = {}
    for name, found in subject.contenders.items():
        inputs = found.prepared(subject.inputs)
        outputs = found.function(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [value for value in inputs.values() if getattr(value, "requires_grad", False)]
        total = sum((output.float() * testing.random(*output.shape, grad=False)).sum() for output in outputs)
        outcomes[name] = [*outputs, *torch.autograd.grad(total, wanted)]
    truth = outcomes.pop("ours")
    assert len(outcomes) >= 2
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    for name, outcome in outcomes.items():
        for got, expected in zip(outcome, truth, strict=True):
            assert (got - expected).abs().max() <= tolerance * (1 + expected.abs().max()), name


def test_norms_are_timed_in_both_memory_formats() -> None:
    seen = {}
    for name, found in video_norm.baselines(KINDS["norm of frames"].inputs(torch.float32)).items():
        x = torch.randn(1, 8, 3, 5, 4, requires_grad=True)
        subject = contender.Subject({"x": x}, {name: dataclasses.replace(found, function=lambda x: x)})
        seen[name] = subject.call(name, "forward")()
        assert torch.equal(seen[name], x)
    assert len(seen) == 6
    assert all(x.is_contiguous() == name.endswith(" NCDHW") for name, x in seen.items())


def test_flex_attention_computes_what_the_op_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_attention.torch, "compile", lambda function, **_: function)
    for kind in ("attention", "images"):
        subject = ops.subject(KINDS[kind], torch.float32, "cpu", False)
        assert subject.contenders["FlexAttention"].forward_only
        assert torch.allclose(
            subject.call("FlexAttention", "forward")(), subject.call("ours", "forward")(), rtol=1e-4, atol=1e-5
        )


def test_stricter_yardstick_where_the_reference_is_too_slow() -> None:
    for kind in KINDS:
        ratio, notes = ops.check(KINDS[kind], torch.bfloat16, "cpu", reference_runs=False)
        assert 0 < ratio <= 1
        assert notes == ["checked against the reference in float32, rounded once"]


@pytest.mark.parametrize("stage", ["tokenizer tiny", "base tiny"])
def test_training_step(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.Effort, "seconds", 0.0)
    case = cases.training(stage, *((1, 1, 32) if stage == "tokenizer tiny" else (4, 5, 8)))
    (row,) = measure.rows_of(case, torch.float32, "cpu", PEAK, measure.Effort(quick=True))
    assert row["mode"] == "step"
    assert row["gflops"] > 0
    assert row["gbps"] is None
    assert list(row["baselines"]) == [ops.REFERENCE]
    assert "checked on a smaller batch" in row["notes"]


def test_a_step_trains() -> None:
    case = cases.training("base tiny", 4, 5, 8)
    call = measure.workshop(case).subject(case, torch.float32, "cpu", True).call("ours", "step")
    losses = [call() for _ in range(5)]
    assert losses[-1] < losses[0]


# ---- timing ---------------------------------------------------------------------------------------------------------


def test_functions_take_turns() -> None:
    calls: list[str] = []
    timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0.001, least=3)
    assert calls[:2] == ["a", "b"]  # to warm up, then at least three times, after a call that is not timed
    assert len(calls) >= 14
    assert calls[2:] == ["a", "a", "b", "b"] * (len(calls) // 4)


def test_a_slow_baseline_is_called_a_few_times_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.02)
    slow = contender.Contender(lambda: time.sleep(0.05))
    subject = contender.Subject({}, {"ours": contender.Contender(lambda: None), "slow": slow})
    notes: list[str] = []
    times = measure.time_all(subject, "step", {}, "cpu", measure.Effort(quick=True), notes)
    assert times["slow"].calls == timing.FEW
    assert times["ours"].calls > timing.FEW
    assert notes == ["slow: median of 2 calls"]


def test_preflight_skips_what_would_take_minutes() -> None:
    def broken() -> None:
        raise RuntimeError("no kernel for this dtype\nmore")

    subject = contender.Subject(
        {},
        {
            "ours": contender.Contender(lambda: time.sleep(0.02)),
            "slow": contender.Contender(lambda: time.sleep(0.02)),
            "compiled": contender.Contender(broken, compiled=True, like="slow"),
            "broken": contender.Contender(broken),
            "quick": contender.Contender(lambda: None),
        },
    )
    assert contender.preflight(subject, "step", 2000.0, 5.0, "cpu") == {
        "slow": "skipped: about 40 s a call",
        "compiled": "skipped with slow, whose calls it makes",
        "broken": "does not run: RuntimeError: no kernel for this dtype",
    }
    del subject.contenders["quick"]
    assert "slow" not in contender.preflight(subject, "step", 2000.0, 5.0, "cpu")  # now it is the fastest one


def test_a_skipped_baseline_is_in_the_notes_and_not_in_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.Effort, "seconds", 0.0)
    monkeypatch.setattr(
        measure, "preflight", lambda *_: {ops.REFERENCE: "skipped: about 40 s a call", "layer_norm + elementwise": "-"}
    )
    rows = measure.rows_of(SMALL, torch.bfloat16, "cpu", PEAK, measure.Effort(quick=True))
    for row in rows:
        assert list(row["baselines"]) == ["layer_norm + elementwise in float32"]
        assert "eager reference: skipped: about 40 s a call" in row["notes"]
        assert "checked against the reference in float32, rounded once" in row["notes"]


def test_ceilings_take_the_faster_product(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[torch.dtype, int]] = []

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        asked.append((a.dtype, len(a)))
        return a

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr(machine, "interleaved", lambda *_, **__: {"copy": SimpleNamespace(p20=1.0)})
    monkeypatch.setattr(machine, "seconds_of", lambda call, device: 1.0 if call().dtype is torch.bfloat16 else 1e-3)
    peak = machine.ceilings("cpu", torch.bfloat16)
    assert peak["product"] == "float32"
    assert peak["gflops"] == pytest.approx(2 * 2048**3 / 1e-3 / 1e9)
    assert (torch.bfloat16, 256) in asked
    assert all(n == 256 for dtype, n in asked if dtype is torch.bfloat16)  # no large product in a slow dtype


def test_peak_memory_is_that_of_the_call() -> None:
    mib = memory.peak(lambda: torch.zeros(40 << 18).add_(1))  # 40 MiB
    if mib is None:
        pytest.skip("this system does not tell a process's high-water mark")
    assert 38 <= mib <= 50


def test_scaling() -> None:
    group = {
        "base": SMALL,
        "channels": adaln_lora.modulation("small", 1, 8, 32),
        "batch": adaln_lora.modulation("x", 4, 8, 16),
    }
    found = scaling.growths(None, torch.float32, "cpu", measure.Effort(quick=True), [group])
    assert [(g["doubled"], g["mode"]) for g in found] == [(s, m) for m in MODES for s in ("channels", "batch")]
    assert found[0]["per_doubling"] == pytest.approx(found[0]["time"])
    assert found[1]["per_doubling"] == pytest.approx(found[1]["time"] ** 0.5)  # four times the work is two doublings
    assert "(in step)" in scaling.line({**found[0], "per_doubling": 2.0})
    assert "MORE than 2.1x" in scaling.line({**found[0], "per_doubling": 2.2})


# ---- reports --------------------------------------------------------------------------------------------------------


def test_readme_is_rewritten_between_the_markers_and_only_there(tmp_path: Path) -> None:
    readme, file = tmp_path / "README.md", tmp_path / "results.json"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    rows = [
        result("causal_conv3d"),
        result("causal_conv3d", case="other", speedup=8.0),
        result("training_step", "step"),
    ]
    file.write_text(json.dumps(results(*rows)))
    assert benchmark.main(["table", str(file), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"\n{report.END}\nafter\n")
    assert "old" not in text
    assert "| `causal_conv3d` | other | 1.00 ms, 8.00x | - | - | - |" in text
    assert "| `training_step` | a case | - | 1.00 ms, 2.00x | - | - |" in text
    assert "**4.00x**, 2.00x" in text  # geometric mean and lowest
    assert "`python -m benchmarks` on A machine (avx2), 2 threads, torch 2, commit abc, today" in text
    benchmark.main(["table", str(file), "--readme", str(readme)])
    assert readme.read_text() == text


def test_readme_without_markers_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, file = tmp_path / "README.md", tmp_path / "results.json"
    readme.write_text("no markers\n")
    file.write_text(json.dumps(results(result("causal_conv3d"))))
    with pytest.raises(SystemExit):
        benchmark.main(["table", str(file), "--readme", str(readme)])
    assert "no single pair of lines" in capsys.readouterr().err
    assert readme.read_text() == "no markers\n"


def test_our_readme_has_the_markers() -> None:
    text = (machine.ROOT / "README.md").read_text()
    assert text.count(report.BEGIN) == text.count(report.END) == 1
    assert text.index("## How fast") < text.index(report.BEGIN) < text.index(report.END) < text.index("## The model")


def test_every_note_is_printed_once() -> None:
    rows = [result("causal_conv3d", mode, notes=["no compiler"]) for mode in MODES]
    assert report.notes(rows) == ["no compiler (causal_conv3d a case, float32)"]


def test_plots_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [result("causal_conv3d", speedup=0.5), result("training_step", "step", gbps=None)]
    written = plots.write(results(*rows), tmp_path / "plots")
    assert [path.name for path in written] == ["speedup-float32.png", "roofline-float32.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_plots_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(benchmark.sys.modules, "matplotlib", None)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results(result("causal_conv3d"))))
    with pytest.raises(SystemExit):
        benchmark.main(["table", str(file), "--plot", str(tmp_path)])
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "no such case"], "matches nothing"),
        (["--device", "cuda"], "torch sees no CUDA device"),
        (["--op", "no such op"], "invalid choice"),
        (["--dtype", "float8"], "invalid choice"),
        (["table", "no such file"], "is not a results file"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available() and "cuda" in arguments:
        pytest.skip("a CUDA device is here")
    with pytest.raises(SystemExit) as exit:
        benchmark.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


# ---- old against new ------------------------------------------------------------------------------------------------


def test_compare_prints_ratio_and_noise(capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def fake(tree: Path, cases: list[Case]) -> compare.Times:
        order.append(tree.name)
        new = tree.name == "new"
        return {"faster": 1.0 if new else 2.0, "same": 1.01 if new else 1.0, "added": 1.0 if new else None}

    good = {"build": lambda tree: True, "passes": lambda tree, ops: True}
    assert compare.compare(Path("base"), Path("new"), [SMALL], 3, measure=fake, **good) == 0
    assert order == ["base", "new", "new", "base", "base", "new"]
    out = capsys.readouterr().out
    assert "| faster | 2.000 | 1.000 | 0.500 | ±0.000 | faster |" in out
    assert "| same | 1.000 | 1.010 | 1.010 | ±0.000 | same |" in out
    assert "| added | | | | | does not run in base |" in out
    assert compare.ratio_of([(1.0, 1.0), (1.0, 1.1), (1.0, 1.4)]) == (1.1, pytest.approx(0.2))


@pytest.mark.parametrize("failing", ["base", "new"])
def test_compare_reports_no_speed_when_tests_fail(failing: str, capsys: pytest.CaptureFixture[str]) -> None:
    def never(tree: Path, cases: list[Case]) -> compare.Times:
        raise AssertionError("timed although tests fail")

    code = compare.compare(
        Path("base"),
        Path("new"),
        [SMALL],
        3,
        build=lambda tree: True,
        passes=lambda tree, ops: tree.name != failing,
        measure=never,
    )
    assert code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{failing} fails its tests: no times" in captured.err


def test_compare_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "repository"
    git = ["git", "-C", str(tmp_path / "repository"), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(repository)], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.setattr(compare, "ROOT", repository)

    def interrupt() -> Path:
        with compare.checked_out("HEAD") as tree:
            assert (tree / ".git").exists()
            (tree / "built").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    listed = subprocess.run(["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True).stdout
    assert len(listed.splitlines()) == 1


def test_compare_refuses_an_unknown_revision(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--base", "no-such-revision"])
    assert "is no revision" in capsys.readouterr().err
