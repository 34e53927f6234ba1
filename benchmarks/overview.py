"""README's first table: what the speed-ups come to on every machine that has a file in benchmarks/results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .machine import RESULTS
from .report import mean, rewrite, table_head, table_row

MARKS = ("<!-- overview: begin -->", "<!-- overview: end -->")
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
PASSES = {"forward": 0, "forward+backward": 1, "step": 1}
COLUMNS = {
    "causal_conv3d": "`causal_conv3d`",
    "video_norm": "`video_norm`",
    "window_attention": "`window_attention`",
    "adaln": "`adaln_*`",
    "training_step": "training step",
    "model": "accelerated models",
}
DEFAULT = ("triton", "Triton kernels")  # of our backends, on GPUs
NO_GPU = "nothing has run on one yet"


def section(folder: Path = RESULTS) -> str:
    """Geometric means of all cases of a machine and a dtype: forward, forward+backward."""
    found: dict[tuple[str, str], dict[str, tuple[list[float], list[float]]]] = {}
    for file in sorted([*folder.glob("cpu-*.json"), *folder.glob("models-*.json")]):
        results = json.loads(file.read_text())
        where = "{hardware}, {isa}, {threads} threads".format_map(results["machine"])
        for row in results["rows"]:
            if row["dtype"] in DTYPES and row["mode"] in PASSES and (column := _column(row)):
                cells = found.setdefault((where, row["dtype"]), {})
                cells.setdefault(column, ([], []))[PASSES[row["mode"]]].append(row["speedup"])
    lines = table_head(["machine", "runs by default", "in", *COLUMNS.values()])
    for (where, dtype), cells in found.items():
        values = [_cell(cells.get(column, ([], []))) for column in COLUMNS]
        lines.append(table_row([where, "C++ kernels", DTYPES[dtype], *values]))
    gpus = sorted(folder.glob("cuda-*.json"))
    lines += [_gpu(json.loads(file.read_text())) for file in gpus]
    if not gpus:
        lines.append(table_row(["any GPU", "PyTorch, with a warning", "all", NO_GPU, *["-"] * (len(COLUMNS) - 1)]))
    return "\n".join(lines)


def _gpu(results: dict[str, Any]) -> str:
    """A GPU's line: of the default backend in bfloat16, over the fastest baseline; and steps of whole L models."""
    cells: dict[str, tuple[list[float], list[float]]] = {}
    for row in results["rows"]:
        if row["backend"] == DEFAULT[0] and row["dtype"] == "bfloat16" and row["mode"] in PASSES:
            cells.setdefault(_column(row), ([], []))[PASSES[row["mode"]]].append(row["speedup"])
    steps = {(found["model"], found["backend"]): found["step_ms"] for found in results.get("models", [])}
    speedups = [
        f"{model} {steps[model, 'reference'] / ms:.2f}x"
        for (model, backend), ms in steps.items()
        if backend == "default" and (model, "reference") in steps
    ]
    values = {column: _cell(cells.get(column, ([], []))) for column in COLUMNS}
    values["training_step"] = ", ".join(speedups) or "-"
    where = "{hardware}, {isa}".format_map(results["machine"])
    return table_row([where, DEFAULT[1], DTYPES["bfloat16"], *values.values()])


def _column(row: dict[str, Any]) -> str:
    if "model" in row:
        return "" if "streamed" in row["model"] else "model"  # streaming has no backward pass
    return "adaln" if row["op"].startswith("adaln") else str(row["op"])


def _cell(passes: tuple[list[float], list[float]]) -> str:
    return ", ".join(f"{mean(speedups):.2f}x" for speedups in passes if speedups) or "-"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks overview", description=__doc__)
    parser.add_argument("--readme", type=Path, metavar="FILE", help="write it between the markers of this file")
    options = parser.parse_args(arguments)
    text = section()
    try:
        if options.readme:
            rewrite(options.readme, text, MARKS)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(text)
    return 0
