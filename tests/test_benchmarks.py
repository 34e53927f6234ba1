"""The benchmark measures what it says: a check before any time, interleaving, rows with the promised fields."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as benchmark
from benchmarks import cases, timing

SMALL = cases.modulation("small", 1, 8, 16)
FIELDS = {"op", "case", "mode", "dtype", "backend", "ms", "baselines", "best_baseline", "speedup"}
FIELDS |= {"gflops", "gbps", "share_of_peak", "error_ratio"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "CASES", [SMALL])
    monkeypatch.setattr(benchmark, "CASES", [SMALL])
    monkeypatch.setattr(benchmark, "ceilings", lambda device, dtype: {"gbps": 10.0, "gflops": 100.0})


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    return benchmark.main()


def test_rows_hold_the_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    assert run(monkeypatch, "--quick", "--dtype", "float32", "--json", str(out)) == 0
    written = json.loads(out.read_text())
    assert [row["mode"] for row in written["rows"]] == ["forward", "forward+backward"]
    for row in written["rows"]:
        assert set(row) >= FIELDS
        best = row["baselines"][row["best_baseline"]]
        assert best == min(row["baselines"].values())
        assert row["speedup"] == pytest.approx(best / row["ms"])
        assert 0 <= row["error_ratio"] <= 1
    assert {"hardware", "torch", "commit", "date"} <= set(written["machine"])
    assert "adaln_residual_modulate, forward: geometric mean" in capsys.readouterr().out


def test_a_wrong_kernel_gets_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = benchmark.walt_kernels.adaln_residual_modulate

    def wrong(**inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_new, h = right(**inputs)
        return x_new, h * (1.01 if benchmark.walt_kernels._dispatch._forced is None else 1.0)

    monkeypatch.setattr(benchmark.walt_kernels, "adaln_residual_modulate", wrong)
    assert run(monkeypatch, "--quick", "--dtype", "float32") == 1
    captured = capsys.readouterr()
    assert "wrong result, not timed" in captured.err
    assert "geometric mean" not in captured.out


def test_functions_take_turns() -> None:
    calls: list[str] = []
    timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0, least=3)
    assert calls == ["a", "b"] * 4  # once to warm up, then three times


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--case", "no such case"), "matches nothing"), (("--device", "cuda"), "torch sees no CUDA device")],
)
def test_bad_arguments(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available() and "cuda" in arguments:
        pytest.skip("a CUDA device is here")
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, *arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
