"""``python -m benchmarks overhead``: rows of every op without a GPU, and the verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import overhead
from benchmarks.__main__ import main
from walt_kernels import _dispatch, _plans, _triton

if _triton.reason is not None:
    pytest.skip(str(_triton.reason), allow_module_level=True)
if _triton.INTERPRET:
    pytest.skip("calls have no plans under TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("op", _dispatch.ops())
def test_planned_calls_are_timed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "CALLS", 2)
    planned: list[int] = []
    run = _plans.Plan.run
    monkeypatch.setattr(_plans.Plan, "run", lambda *arguments: planned.append(1) or run(*arguments))
    for mode, passes in (("forward", 1), ("forward+backward", 2)):
        planned.clear()
        row = overhead.row_of(op, mode, DEVICE, 3)
        assert 0 < row.us < 1e6
        assert row.us_without_plans > 0
        assert len(planned) == (1 + 3 * 2) * passes
    assert _triton.imagined is None
    assert _plans.enabled


def test_the_rows_are_written_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results" / "overhead.json"
    monkeypatch.setattr(overhead, "MICROSECONDS", {"forward": 1e6})
    assert main(["overhead", "--op", "adaln_residual", "--quick", "--check", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["launches"] == torch.cuda.is_available()
    assert [(row["op"], row["mode"], row["limit"]) for row in written["rows"]] == [("adaln_residual", "forward", 1e6)]
    monkeypatch.setattr(overhead, "MICROSECONDS", {"forward": 1e-3})
    assert main(["overhead", "--op", "adaln_residual", "--quick"]) == 0
    assert main(["overhead", "--op", "adaln_residual", "--quick", "--check"]) == 1


def test_arguments_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["overhead", "--json", str(tmp_path)])
    assert "expected a file" in capsys.readouterr().err
    with _plans.none(), pytest.raises(SystemExit):
        main(["overhead"])
    assert "have no plans" in capsys.readouterr().err
