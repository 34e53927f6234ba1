"""``python -m benchmarks models``: the same model twice, compared and then timed, with the peaks of both."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as benchmark
from benchmarks import blocks, models

diffusers = pytest.importorskip("diffusers")
diffusers.AutoencoderKLCosmos  # noqa: B018  imported under torch.device("meta"), it would keep constants without numbers
TINY = models.Model(
    "tiny decode",
    partial(
        models.make,
        "diffusers.AutoencoderKLWan",
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
    ),
    models.decode,
    (1, 4, 2, 8, 8),
)


def test_a_row_has_both_sides(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(models, "models", lambda device: [replace(TINY, quick=True)])
    out = tmp_path / "new" / "rows.json"
    monkeypatch.setattr(models, "peaks_apart", models.peaks)  # another process imports for seconds
    assert benchmark.main(["models", "--quick", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["dtype"], row["mode"]) for row in rows] == [(d, m) for d in models.DTYPES for m in models.MODES]
    for row in rows:
        assert row["ms"].keys() == row["mib"].keys() == {"before", "after"}
        assert row["speedup"] == row["ms"]["before"] / row["ms"]["after"]
        assert 0 < row["error_ratio"] <= 1
        assert not row["replaced"].startswith("0 replaced")
    text = capsys.readouterr().out
    assert text.count("| tiny decode |") == 4
    assert "bfloat16, forward+backward: geometric mean" in text


def test_a_streamed_model_has_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "peaks_apart", models.peaks)
    streamed = replace(TINY, run=models.decode_streamed, streamed=True)
    (row,) = models.rows_of(streamed, torch.float32, "cpu", 0.01)
    assert row["mode"] == "forward"
    assert 0 < row["error_ratio"] <= 1


def test_peaks_of_another_process() -> None:
    layer = models.Model("layer", partial(torch.nn.Linear, 4, 1 << 20), blocks.call, (8, 4))
    found = models.peaks_apart(layer, torch.float32, "cpu", "before")
    if None in found.values():
        pytest.skip("this system does not tell")
    assert 30 < found["forward"] < 60  # 32 MiB of output
    assert found["forward+backward"] > found["forward"] + 15  # gradients of the weights


def test_another_result_has_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    accelerate = models.accelerate

    def wrong(module: Any) -> Any:
        with torch.no_grad():
            module.post_quant_conv.bias += 0.01
        return accelerate(module)

    monkeypatch.setattr(models, "accelerate", wrong)
    monkeypatch.setattr(models, "models", lambda device: [TINY])
    assert models.main(["--dtype", "float32"]) == 1
    captured = capsys.readouterr()
    assert "tiny decode, float32: another result, not timed: output: largest error" in captured.out
    assert "ms" not in captured.out


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    absent = models.Model("absent", partial(models.make, "no_such_package.Model"), models.decode, (1,))
    monkeypatch.setattr(models, "models", lambda device: [absent])
    assert models.main(["--dtype", "float32"]) == 1
    assert (
        "absent, float32: does not run: ModuleNotFoundError: No module named 'no_such_package'"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("index", range(len(models.models("cpu"))))
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_models_run_at_their_sizes(device: str, index: int) -> None:
    model = models.models(device)[index]
    with torch.device("meta"), torch.no_grad():
        y = model.run(model.make().eval().to("meta"), torch.empty(model.shape))
    assert y.is_meta
    assert len(y) == model.shape[0]


def test_summary() -> None:
    def row(model: str, speedup: float, before: float | None, after: float) -> dict[str, Any]:
        ms, mib = {"before": speedup, "after": 1.0}, {"before": before, "after": after}
        about = {"model": model, "dtype": "float32", "mode": "forward", "replaced": "1 replaced, 0 left"}
        return {**about, "ms": ms, "speedup": speedup, "mib": mib}

    rows = [row("A encode", 4.0, 1.0, 9.0), row("A decode", 2.0, 4.0, 2.0), row("B decode", 0.96, None, 1.0)]
    first, second = models.summary(rows)
    assert first == "float32, forward: geometric mean 1.97x, lowest 0.96x; decoders' peak memory 50% of before"
    assert second == f"slower: {models.line(rows[2])}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "nothing"], "matches nothing; models: Wan encode"),
        (["--device", "cuda"], "torch sees no CUDA device"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available() and "cuda" in arguments:
        pytest.skip("a CUDA device is here")
    with pytest.raises(SystemExit):
        models.main(arguments)
    assert message in capsys.readouterr().err
