"""The results as text: the full table, what it comes to, and the part of README that nobody writes by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .machine import sentence

Row = dict[str, Any]

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
WIDE = " in float32"  # how the name of a baseline ends that makes the round trip
COLUMNS = {
    "fp32 forward": ("float32", ("forward",)),
    "fp32 forward+backward": ("float32", ("forward+backward", "step")),
    "bf16 forward": ("bfloat16", ("forward",)),
    "bf16 forward+backward": ("bfloat16", ("forward+backward", "step")),
}


def line(row: Row) -> str:
    """One row while the benchmark runs."""
    return (
        f"{row['op']:<24} {row['case']:<30} {row['mode']:<17} {row['dtype']:<9} {row['ms']:9.3f} ms "
        f"{row['speedup']:6.2f}x over {row['best_baseline']}, {row['backend']}"
    )


def table(rows: list[Row]) -> str:
    """All rows as Markdown."""
    head = ["op", "case", "mode", "dtype", "backend", "ms", "fastest baseline", "its ms", "speedup"]
    lines = table_head([*head, "GFLOP/s", "GB/s", "of peak", "H200 floor ms", "MiB"])
    for row in rows:
        base = row["baselines"][row["best_baseline"]]
        gbps, memory = ("-" if row.get(name) is None else f"{row[name]:.1f}" for name in ("gbps", "peak_memory"))
        cells = [row["op"], row["case"], row["mode"], row["dtype"], row["backend"], f"{row['ms']:.3f}"]
        cells += [row["best_baseline"], f"{base:.3f}", f"{row['speedup']:.2f}x", f"{row['gflops']:.0f}", gbps]
        floor = "-" if row.get("h200_floor_ms") is None else f"{row['h200_floor_ms']:.4f}"
        lines.append(table_row([*cells, f"{row['share_of_peak']:.0%}", floor, memory]))
    return "\n".join(lines)


def notes(rows: list[Row]) -> list[str]:
    """Every note once, with the cases that it is about."""
    cases: dict[str, list[str]] = {}
    for row in rows:
        for note in row.get("notes", []):
            about = cases.setdefault(note, [])
            name = f"{row['op']} {row['case']}, {row['dtype']}"
            if name not in about:
                about.append(name)
    return [f"{note} ({'; '.join(about[:3])}{'; ...' * (len(about) > 3)})" for note, about in cases.items()]


def summary(rows: list[Row]) -> list[str]:
    """Geometric mean and lowest speed-up of every op, dtype and mode."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["dtype"], row["mode"]), []).append(row["speedup"])
    return [
        f"{op}, {dtype}, {mode}: geometric mean {mean(speedups):.2f}x, lowest {min(speedups):.2f}x"
        for (op, dtype, mode), speedups in groups.items()
    ]


def mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def section(results: dict[str, Any]) -> str:
    """README's table: one line per op and case, and what the speed-ups come to."""
    rows = results["rows"]
    faster: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        for column, (dtype, modes) in COLUMNS.items():
            if row["dtype"] == dtype and row["mode"] in modes:
                faster.setdefault((row["op"], row["case"]), {})[column] = row
    lines = table_head(["op", "case", *COLUMNS])
    for (op, case), cells in faster.items():
        lines.append(table_row([f"`{op}`", case, *(_cell(cells.get(column)) for column in COLUMNS)]))
    for op in dict.fromkeys(op for op, _ in faster):
        means = ["**geometric mean, lowest**"]
        for column in COLUMNS:
            found = [cells[column]["speedup"] for (name, _), cells in faster.items() if name == op and column in cells]
            means.append(f"**{mean(found):.2f}x**, {min(found):.2f}x" if found else "-")
        lines.append(table_row([f"`{op}`", *means]))
    baselines = dict.fromkeys(name.removesuffix(WIDE) for row in rows for name in row["baselines"])
    widened = any(name.endswith(WIDE) for row in rows for name in row["baselines"])
    command = results.get("command", "python -m benchmarks")
    return "\n".join(
        [
            f"Written by `{command}` on {sentence(results['machine'])}.",
            "Milliseconds of ours (median), and how many times as long the **fastest** baseline of that run takes; a",
            "whole training step stands under forward+backward. Baselines, interleaved with ours where they run:",
            f"{', '.join(baselines)}{'; in bf16 each also by way of float32' if widened else ''}.",
            "",
            *lines,
        ]
    )


def table_head(names: list[str]) -> list[str]:
    return [table_row(names), "|---" * len(names) + "|"]


def table_row(values: list[str]) -> str:
    return f"| {' | '.join(values)} |"


def _cell(row: Row | None) -> str:
    return "-" if row is None else f"{row['ms']:.2f} ms, {row['speedup']:.2f}x"


def split(readme: Path, marks: tuple[str, str] = (BEGIN, END)) -> tuple[str, str]:
    """What stands before the part that ``rewrite`` writes, and what after it; ValueError without the two markers."""
    text, (begin, end) = readme.read_text(), marks
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{readme} has no single pair of lines {begin} and {end} to write between")
    return text.split(begin)[0], text.split(end)[1]


def rewrite(readme: Path, text: str, marks: tuple[str, str] = (BEGIN, END)) -> None:
    """Puts ``text`` between README's two markers; everything else stays, byte for byte."""
    before, after = split(readme, marks)
    readme.write_text(f"{before}{marks[0]}\n{text}\n{marks[1]}{after}")
