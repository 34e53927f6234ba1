"""Results as pictures: bars of the speed-ups, and a roofline with the ceilings that were measured."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from .cases import CASES
from .machine import sentence

Row = dict[str, Any]

INK, GRID, PAPER = "#1f2933", "#d9dee4", "#ffffff"
# Chosen to stay apart for colour-blind readers; each op has one, in the order of the cases.
PALETTE = ("#1b9e77", "#7a4fa3", "#d95f02", "#2166ac", "#6b7280", "#a6761d", "#e7298a", "#66a61e")
COLOURS = dict(zip(dict.fromkeys(case.op for case in CASES), itertools.cycle(PALETTE), strict=False))
MARKERS = {"forward": "o", "backward": "v", "forward+backward": "s"}
SHADES = {"forward": 0.5, "backward": 0.75, "forward+backward": 1.0, "step": 1.0}


def pyplot() -> Any:
    """matplotlib, without a display; imported only where a plot is asked for."""
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("--plot needs matplotlib: pip install matplotlib, or pip install '.[demo]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def write(results: dict[str, Any], folder: Path) -> list[Path]:
    """speedup-DTYPE.png and, where ceilings were measured, roofline-DTYPE.png."""
    plt = pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for dtype in dict.fromkeys(row["dtype"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["dtype"] == dtype]
        figures = {"speedup": bars(plt, rows, dtype, results["machine"])}
        if dtype in results.get("ceilings", {}):
            figures["roofline"] = roofline(plt, rows, dtype, results["machine"], results["ceilings"][dtype])
        for name, figure in figures.items():
            path = folder / f"{name}-{dtype}.png"
            figure.savefig(path, dpi=150, facecolor=PAPER, bbox_inches="tight")
            plt.close(figure)
            written.append(path)
    return written


def bars(plt: Any, rows: list[Row], dtype: str, machine: dict[str, str]) -> Any:
    """One bar per case and mode, on a logarithmic axis: twice as fast is as far from 1 as half as fast."""
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.3 * len(rows)))
    places, labels, place = [], [], 0.0
    last, several = None, len({row["backend"] for row in rows if row["op"] != "training_step"}) > 1
    for row in rows:
        place += 0.85 if last == (row["op"], row["case"]) else 1.3 if last and last[0] == row["op"] else 1.9
        last = (row["op"], row["case"])
        colour = shade(plt, COLOURS.get(row["op"], INK), SHADES[row["mode"]])
        axes.barh(place, row["speedup"] - 1, left=1, height=0.78, color=colour)
        right = row["speedup"] >= 1
        axes.annotate(
            f"{row['speedup']:.2f}x  {row['ms']:.3g} ms",
            (row["speedup"], place),
            xytext=(4 if right else -4, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            fontsize=8,
            color=INK,
        )
        places.append(place)
        labels.append(f"{row['case']}  {row['mode']}" + f"  {row['backend']}" * several)
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    _logarithmic(axes, min(row["speedup"] for row in rows), max(row["speedup"] for row in rows))
    axes.axvline(1, color=INK, linewidth=1)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS.get(op, INK)) for op in dict.fromkeys(r["op"] for r in rows)]
    axes.legend(
        handles, dict.fromkeys(r["op"] for r in rows), loc="lower right", fontsize=8, frameon=True, edgecolor=GRID
    )
    _dress(axes, f"Speed-up over the fastest baseline, {dtype}", machine)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    return figure


def shade(plt: Any, colour: str, strength: float) -> tuple[float, ...]:
    """The colour mixed with the paper's white: lighter, and nothing shines through."""
    return tuple(1 - strength * (1 - part) for part in plt.matplotlib.colors.to_rgb(colour))


def _logarithmic(axes: Any, lowest: float, highest: float) -> None:
    """Powers of two around the data, with room for the labels on both sides of 1."""
    axes.set_xscale("log", base=2)
    low, high = math.floor(math.log2(min(lowest, 1))), math.ceil(math.log2(max(highest, 1.5)))
    axes.set_xticks([2.0**power for power in range(low, high + 1)])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.minorticks_off()
    axes.set_xlim(2.0**low * (0.45 if lowest < 1 else 0.92), 2.0**high * 1.6)


def roofline(plt: Any, rows: list[Row], dtype: str, machine: dict[str, str], peak: dict[str, Any]) -> Any:
    """GFLOP/s against FLOP per byte that must move; the roof is the measured copy and matrix product."""
    points = [row for row in rows if row["gbps"]]
    figure, axes = plt.subplots(figsize=(10, 6))
    intensity = [row["gflops"] / row["gbps"] for row in points] or [1.0]
    left, right = min(*intensity, 1.0) / 2, max(*intensity, 1.0) * 3
    balance = peak["gflops"] / peak["gbps"]
    axes.plot([left, balance, right], [left * peak["gbps"], peak["gflops"], peak["gflops"]], color=INK, linewidth=1.5)
    product = f"PyTorch's matrix product in {peak.get('product', dtype)}, {peak['gflops']:.0f} GFLOP/s"
    label = {"textcoords": "offset points", "color": INK, "fontsize": 9}
    axes.annotate(product, (balance, peak["gflops"]), xytext=(-6, 6), ha="left", **label)
    axes.annotate(
        f"copy, {peak['gbps']:.0f} GB/s", (balance / 3, peak["gflops"] / 3), xytext=(-8, 0), ha="right", **label
    )
    for row, flops_per_byte in zip(points, intensity, strict=False):
        colour = COLOURS.get(row["op"], INK)
        filled = row["mode"] != "forward"
        axes.plot(
            flops_per_byte,
            row["gflops"],
            MARKERS[row["mode"]],
            markersize=8,
            markerfacecolor=colour if filled else PAPER,
            markeredgecolor=colour,
            markeredgewidth=1.5,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    heights = [peak["gflops"], left * peak["gbps"], *(row["gflops"] for row in points)]
    axes.set_ylim(min(heights) / 1.3, max(heights) * 1.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5) if axis is axes.yaxis else (1,)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_xlabel("FLOP per byte (inputs and outputs moved once)", color=INK)
    axes.set_ylabel("GFLOP/s (of the direct algorithm)", color=INK)
    axes.grid(which="major", color=GRID, linewidth=0.8)
    line = plt.matplotlib.lines.Line2D
    entries = [
        line([], [], marker="o", linestyle="", color=COLOURS.get(op, INK), label=op)
        for op in dict.fromkeys(row["op"] for row in points)
    ]
    for mode in dict.fromkeys(row["mode"] for row in points):
        marker = MARKERS[mode]
        face = INK if mode != "forward" else PAPER
        entries.append(line([], [], marker=marker, linestyle="", color=INK, markerfacecolor=face, label=mode))
    axes.legend(handles=entries, loc="lower right", fontsize=8, edgecolor=GRID)
    _dress(axes, f"Roofline, {dtype}", machine)
    return figure


def _dress(axes: Any, title: str, machine: dict[str, str]) -> None:
    """What all pictures have in common: title, the machine below it, no frame."""
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=20)
    axes.text(0, 1.008, sentence(machine), transform=axes.transAxes, fontsize=8.5, color="#52606d", va="bottom")
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
