"""README's first table and its other numbers, and those of docs/kernels.md, are those of benchmarks/results."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as benchmark
from benchmarks import blocks, overview
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


def test_a_gpu_has_a_line_of_its_default_backend_and_of_whole_models(tmp_path: Path) -> None:
    row = {"op": "adaln_modulate", "mode": "forward", "dtype": "bfloat16", "backend": "triton", "speedup": 2.0}
    rows = [row, {**row, "mode": "forward+backward", "speedup": 3.0}, {**row, "backend": "cuda", "speedup": 9.0}]
    rows += [{**row, "mode": "backward", "speedup": 5.0}, {**row, "dtype": "float32", "speedup": 7.0}]
    models = [
        {"model": model, "backend": backend, "step_ms": ms}
        for model, backend, ms in (
            ("transformer", "default", 10.0),
            ("transformer", "reference", 25.0),
            ("tokenizer", "default", 1.0),
        )
    ]
    machine = {"hardware": "A GPU", "isa": "sm90", "threads": "2"}
    (tmp_path / "cuda-sm90.json").write_text(json.dumps({"machine": machine, "rows": rows, "models": models}))
    (line,) = overview.section(tmp_path).splitlines()[2:]
    assert line == "| A GPU, sm90 | Triton kernels | bf16 | - | - | - | 2.00x, 3.00x | transformer 2.50x | - |"


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


def test_numbers_of_blocks() -> None:
    """Where this fails after a benchmark, it was without --page docs/kernels.md."""
    rows = json.loads((overview.RESULTS / "blocks-avx512.json").read_text())["rows"]
    page = (ROOT / blocks.PAGE).read_text()
    for name in blocks.BLOCKS:
        begin, end = blocks.marks(name)
        assert page.partition(f"{begin}\n")[2].partition(f"\n{end}")[0] == blocks.section(rows, name)

    def of(*words: str, mode: str = "", dtype: str = "") -> list[dict[str, Any]]:
        return [
            row
            for row in rows
            if all(word in row["model"] for word in words) and mode in ("", row["mode"]) and dtype in ("", row["dtype"])
        ]

    def span(values: list[float], form: str) -> str:
        return " to ".join(dict.fromkeys(form.format(value) for value in (min(values), max(values))))

    def less(name: str, than: str) -> list[float]:
        return [100 - 100 * row["kept"]["after"] / row["kept"][than] for row in of(name, mode="forward+backward")]

    said = " ".join(page.split())
    last = {(row["model"], row["mode"], row["dtype"]): row["ms"]["after"] for row in of("channels_last_3d")}
    slower = [
        row["ms"]["after"] / last[f"{row['model']}, channels_last_3d", row["mode"], row["dtype"]]
        for row in of("causal block")
        if "channels_last_3d" not in row["model"]
    ]
    assert f"takes {span(slower, '{:.2f}')} times as long in the contiguous one" in said
    speedups = span([row["speedup"] for row in of("transformer")], "{:.2f}x")
    assert f"({speedups}) and keeps {span(less('transformer', 'before'), '{:.0f} %')} less" in said
    assert less("transformer", "compiled") == [0.0] * 6
    (small,) = of("1x7x7", mode="forward+backward", dtype="float32")
    assert f"1x7x7 gains {small['speedup']:.2f}x, {small['ms']['compiled'] / small['ms']['after']:.2f}x over" in said
    large = [row["speedup"] for size in ("5x8x8", "1x16x16") for row in of(size, mode="forward+backward")]
    assert f"256 tokens and more gain {span(large, '{:.2f}x')}" in said
    peaks = [row["mib"] for row in of("C 128", mode="forward", dtype="bfloat16")]
    after, before = (span([mib[way] for mib in peaks], "{:.0f}") for way in ("after", "before"))
    assert f"peaks at {after} MiB in place of {before}," in said
    (step,) = of("C 64", "channels_last_3d", mode="forward+backward", dtype="float32")
    assert f"at {step['mib']['compiled']:.0f} MiB beside our {step['mib']['after']:.0f}" in said
    plain, compiled = (span(less("causal block", than), "{:.0f} %") for than in ("before", "compiled"))
    assert f"falls by {plain} over the plain one and by {compiled} over the compiled one" in said


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
