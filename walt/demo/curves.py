"""Curves of a training: its losses, and what it measured on held-out clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from walt.atomic import atomic_write
from walt.errors import require

Rows = Sequence[dict[str, float]]


def write_curves(path: Path, losses: Rows, held_out: Rows = ()) -> None:
    """An SVG of the rows' "loss" by "step", with a running mean that shows the trend, and beside it "psnr", if any."""
    require("matplotlib", "demo").use("Agg")
    plt: Any = require("matplotlib.pyplot", "demo")
    figure, axes = plt.subplots(1, 2 if held_out else 1, figsize=(8, 3), constrained_layout=True, squeeze=False)
    axis = axes[0, 0]
    steps, loss = [row["step"] for row in losses], np.array([row["loss"] for row in losses])
    axis.plot(steps, loss, color="0.75", linewidth=1)
    axis.plot(steps, running_mean(loss, 10), color="C0")
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    if held_out:
        axes[0, 1].plot([row["step"] for row in held_out], [row["psnr"] for row in held_out], color="C1", marker=".")
        axes[0, 1].set(xlabel="step", ylabel="PSNR of held-out clips, dB")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="svg")
    plt.close(figure)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and up to width - 1 before it."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - width, 0)
    return np.asarray((total[last] - total[first]) / (last - first))
