"""``python -m benchmarks levels``: every way that a CPU has, the rows, and the verdict on what an op chooses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from found_ops import needs_native

from benchmarks import adaln_lora, causal_conv3d, levels
from walt_kernels import _native
from walt_kernels.causal_conv3d import onednn

SMALL = causal_conv3d.convolution("small", (1, 4, 3, 5, 5), 6)


def names() -> set[str]:
    return {f"cpu, {level}" for level in _native.C.build_info()["isa_runnable"] if level != "baseline"}


@needs_native
def test_every_level_and_library_is_timed() -> None:
    before = _native.C.build_info()["isa"]
    rows = levels.rows_of(SMALL, torch.float32, 0.01)
    assert [row["mode"] for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        assert set(row["ms"]) == {"onednn", *names()}
        assert row["default"] == f"cpu, {before}"
        assert row["ms"][row["best"]] == min(row["ms"].values())
        assert row["behind"] == row["ms"][row["default"]] / row["ms"][row["best"]]
        assert "of the best" in levels.line(row)
    assert _native.C.build_info()["isa"] == before


@needs_native
def test_a_backend_that_an_op_has_not_is_no_way() -> None:
    (row, _) = levels.rows_of(adaln_lora.modulation("small", 1, 8, 16), torch.bfloat16, 0.01)
    assert set(row["ms"]) == names()


@needs_native
def test_the_level_in_use_is_a_way_also_where_it_is_the_lowest() -> None:
    with levels.at_level("baseline"):
        rows = levels.rows_of(SMALL, torch.float32, 0.01)
    assert all(row["default"] == "cpu, baseline" and "cpu, baseline" in row["ms"] for row in rows)


@needs_native
def test_a_way_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(onednn.backend(), forward=lambda **inputs: onednn.forward(**inputs) * 1.01)
    at = levels._dispatch.op("causal_conv3d")
    replaced = tuple(b if b.name != "onednn" else wrong for b in at.backends)
    monkeypatch.setitem(levels._dispatch._ops, "causal_conv3d", at._replace(backends=replaced))
    with pytest.raises(AssertionError, match="largest error"):
        levels.rows_of(SMALL, torch.float32, 0.01)


def test_arguments_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in (
        (["--json", str(tmp_path)], "is a folder, expected a file"),
        (["--case", "nothing", "--op", "adaln_lora"], "cases: 24 layers, rank 2, 24 layers, rank 256"),
    ):
        with pytest.raises(SystemExit):
            levels.main(arguments)
        assert text in capsys.readouterr().err


def test_a_wrong_case_is_told_and_the_others_are_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*_: Any) -> Any:
        raise AssertionError("output 0: largest error 1")

    monkeypatch.setattr(levels, "chosen", lambda *_: [SMALL])
    monkeypatch.setattr(levels, "rows_of", wrong)
    assert levels.main(["--dtype", "float32"]) == 1
    assert "small, float32: wrong result, not timed: output 0" in capsys.readouterr().out


@pytest.mark.parametrize(("behind", "code"), [(1.05, 0), (1.2, 1)])
def test_check_says_where_the_default_is_behind(
    behind: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    row = {"op": "causal_conv3d", "case": "small", "mode": "forward", "dtype": "float32", "best": "onednn"}
    row = {**row, "behind": behind, "default": "cpu, avx2", "ms": {"cpu, avx2": behind, "onednn": 1.0}}
    monkeypatch.setattr(levels, "chosen", lambda *_: [SMALL])
    monkeypatch.setattr(levels, "rows_of", lambda *_: [row])
    path = tmp_path / "new" / "rows.json"
    options: list[Any] = ["--dtype", "float32", "--json", str(path)]
    assert levels.main([*options, "--check"]) == code
    assert ("behind onednn: " in capsys.readouterr().out) == bool(code)
    assert levels.main(options) == 0
    assert json.loads(path.read_text())["rows"] == [row]
