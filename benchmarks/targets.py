"""What a results file says about the targets of the GPU kernels: met, missed or not measured."""

from __future__ import annotations

from typing import Any

from .case import Target
from .cases import TARGETS

Row = dict[str, Any]

DTYPE = "bfloat16"  # all targets are for it
NEAR = 1.1  # within 10 %
SLACK = 1.05, 2.0  # times the outputs, and MiB more: what an allocator rounds up


def verdicts(results: dict[str, Any], targets: list[Target] | None = None) -> list[Row]:
    """One entry per target and row that it is about: op, case, mode, backend, ``met``, and ``found`` in words.

    A target without a row has one entry, with None as ``met``.
    """
    entries: list[Row] = []
    for target in TARGETS if targets is None else targets:
        about = {"op": target.op, "mode": target.mode}
        rows = [row for row in results["rows"] if _is_about(target, row)]
        if not rows:
            entries.append({**about, "case": ", ".join(target.cases), "backend": "-", "met": None, "found": []})
        for row in rows:
            parts = _parts(target, row, results)
            met = None if any(part[0] is None for part in parts) else all(part[0] for part in parts)
            found = [text for _, text in parts]
            entries.append({**about, "case": row["case"], "backend": row["backend"], "met": met, "found": found})
    return entries


def _is_about(target: Target, row: Row) -> bool:
    same = row["op"] == target.op and row["mode"] == target.mode and row["dtype"] == DTYPE
    return same and row["case"].startswith(target.cases)


def _parts(target: Target, row: Row, results: dict[str, Any]) -> list[tuple[bool | None, str]]:
    """Every demand of the target: whether it is met (None: not measured), and both numbers."""
    peak = results["ceilings"][DTYPE]
    parts: list[tuple[bool | None, str]] = []
    if target.share:
        shares = {"copy": row["gbps"] / peak["gbps"], "product": row["gflops"] / peak["gflops"]}
        share = {**shares, "floor": row["share_of_peak"]}[target.of]
        parts.append((share >= target.share, f"{share:.0%} of {target.of}, {target.share:.0%} wanted"))
    if target.speedup:
        times = [ms for name, ms in row["baselines"].items() if target.over in name]
        over = target.over or "the fastest baseline"
        if times:
            speedup = min(times) / row["ms"]
            parts.append((speedup >= target.speedup, f"{speedup:.2f}x over {over}, {target.speedup:g}x wanted"))
        else:
            parts.append((None, f"{over} was not timed"))
    if target.deterministic:
        same = row["deterministic"]
        parts.append((same, "the same bits every time" if same else "other bits in another run"))
    if target.lean:
        used, wanted = row["peak_memory"], SLACK[0] * row["output_memory"] + SLACK[1]
        parts.append((used <= wanted, f"{used:.0f} MiB at the peak, {wanted:.0f} wanted"))
    if target.half_of:
        parts.append(_half(target, row, results["rows"], peak["gbps"]))
    return parts


def _half(target: Target, row: Row, rows: list[Row], gbps: float) -> tuple[bool | None, str]:
    same = ("op", "mode", "dtype", "backend")
    whole = [r for r in rows if r["case"].startswith(target.half_of) and all(r[key] == row[key] for key in same)]
    if not whole:
        return None, f"{target.half_of} was not timed"
    moved, moved_whole = (r["gbps"] * r["ms"] for r in (row, whole[0]))
    wanted = NEAR * (whole[0]["ms"] / 2 + (moved - moved_whole / 2) / gbps)
    return row["ms"] <= wanted, f"{row['ms']:.3f} ms, {wanted:.3f} ms wanted"


def line(entry: Row) -> str:
    verdict = {True: "met", False: "MISSED", None: "not measured"}[entry["met"]]
    about = f"{entry['op']}, {entry['case']}, {entry['mode']}, {entry['backend']}"
    return f"{verdict}: {about}" + f": {'; '.join(entry['found'])}" * bool(entry["found"])
