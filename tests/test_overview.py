"""README's first table and its other numbers, and those of docs/kernels.md, are those of benchmarks/results."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as benchmark
from benchmarks import overview
from benchmarks.machine import ROOT
from benchmarks.report import mean

README = (ROOT / "README.md").read_text()


def test_readme_has_what_the_results_come_to() -> None:
    """Where this fails after a benchmark: python -m benchmarks overview --readme README.md"""
    begin, end = overview.MARKS
    assert README.partition(f"{begin}\n")[2].partition(f"\n{end}")[0] == overview.section()
    assert README.index(end) < README.index("## A first clip")


def write(folder: Path, name: str, *rows: dict[str, Any]) -> None:
    machine = {"hardware": "A machine", "isa": "avx2", "threads": "2"}
    (folder / name).write_text(json.dumps({"machine": machine, "rows": rows}))


def test_machines_and_their_means(tmp_path: Path) -> None:
    row = {"op": "causal_conv3d", "mode": "forward", "dtype": "float32", "speedup": 2.0}
    step = {"op": "training_step", "mode": "step", "dtype": "bfloat16", "speedup": 3.0}
    lora = {**row, "op": "adaln_lora", "mode": "forward+backward"}
    write(tmp_path, "cpu-avx2.json", row, {**row, "speedup": 8.0}, step, lora, {**row, "dtype": "float16"})
    model = {"model": "Wan decode", "mode": "forward", "dtype": "float32", "speedup": 5.0}
    write(tmp_path, "models-avx2.json", model, {**model, "model": "Wan decode, streamed", "speedup": 1.0})
    first, second, gpu = overview.section(tmp_path).splitlines()[2:]
    assert first == "| A machine, avx2, 2 threads | C++ kernels | fp32 | 4.00x | - | - | 2.00x | - | 5.00x |"
    assert second == "| A machine, avx2, 2 threads | C++ kernels | bf16 | - | - | - | - | 3.00x | - |"
    assert gpu == f"| any GPU | PyTorch, with a warning | all | {overview.NO_GPU} | - | - | - | - | - |"
    write(tmp_path, "cuda-sm90.json")
    assert overview.NO_GPU not in overview.section(tmp_path)


def test_the_command_writes_between_the_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n{}\nold\n{}\nafter\n".format(*overview.MARKS))
    assert benchmark.main(["overview", "--readme", str(readme)]) == 0
    begin, end = overview.MARKS
    assert readme.read_text() == f"before\n{begin}\n{capsys.readouterr().out}{end}\nafter\n"
    readme.write_text("no markers")
    with pytest.raises(SystemExit):
        benchmark.main(["overview", "--readme", str(readme)])
    assert "no single pair of lines" in capsys.readouterr().err


def test_numbers_of_models() -> None:
    rows = json.loads((overview.RESULTS / "models-avx512.json").read_text())["rows"]
    speedups: dict[str, list[str]] = {}
    peaks: dict[str, list[str]] = {}
    for row in rows:
        speedups.setdefault(row["model"], []).append(f"{row['speedup']:.2f}x")
        peaks.setdefault(row["model"], []).append("{before:.0f} -> {after:.0f}".format_map(row["mib"]))
    text = (ROOT / "docs/kernels.md").read_text().partition("## Models of other libraries")[2]
    shown = re.findall(
        r"^\| (\w+)(?: \([^)]*\)|, 17 frames, (streamed))? \| (\d.*) \| (\d.*) \| (\d.*) \|$", text, re.M
    )
    assert len(shown) == 6
    for name, streamed, *cells in shown:
        encode, decode = (
            next(model for model in speedups if model.startswith(f"{name}{way}") and streamed in model)
            for way in (" encode", " decode")
        )
        assert cells == [", ".join(speedups[encode]), ", ".join(speedups[decode]), ", ".join(peaks[decode])]

    blocks = [row["speedup"] for row in rows if "code" not in row["model"]]
    assert f"({min(blocks):.2f}x to {max(blocks):.2f}x)" in README
    decoders = [row for row in rows if "decode" in row["model"] and "streamed" not in row["model"]]
    forward, step = (
        mean([row["mib"]["after"] / row["mib"]["before"] for row in decoders if row["mode"] == mode])
        for mode in ("forward", "forward+backward")
    )
    assert f"decoders need {100 * forward:.0f} % (forward) and {100 * step:.0f} % of the memory" in " ".join(
        README.split()
    )


def test_what_an_installation_builds() -> None:
    (levels,) = re.findall(r"every C\+\+ kernel three times \(([^)]*)\)", README)
    (architectures,) = re.findall(r"every CUDA kernel for three architectures \(([^;]*);", README)
    setup = {
        node.targets[0].id: node.value
        for node in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    keys = [key.value for key in setup["ISA_FLAGS"].keys]
    assert re.sub("-| with BF16", "", levels).lower().split(", ") == keys
    assert architectures.replace(".", "").split(", ") == ast.literal_eval(setup["CUDA_ARCHITECTURES"])
