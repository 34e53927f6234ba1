"""Reconstructions of held-out clips: their figures, and how the demo's report shows them."""

from __future__ import annotations

from typing import Any

import numpy as np

from walt.data.clips import ClipStore
from walt.data.simulator import FILM
from walt.demo.progress import FIGURES
from walt.demo.report import Report, paragraph, table
from walt.evaluate.evaluate import evaluate


def measure(real: np.ndarray, made: np.ndarray, store: ClipStore) -> dict[str, Any]:
    """Mean PSNR and colour error of reconstructions, and of each class."""
    labels = [item.label or "" for item in store.items]
    result = evaluate(real, made, FIGURES, labels=labels, progress=False)
    by_class = {f"{name}_by_class": values for name, values in result.by_class.items()}
    return {**result.values, **by_class, "clips": result.real}


def beside(report: Report, name: str, real: np.ndarray, made: np.ndarray, fps: float) -> str:
    """The block of clips above their reconstructions."""
    both = np.concatenate([real, made])
    return report.video(name, both, len(real), fps, "clips above their reconstructions", scale=2)


def pairs(
    report: Report, name: str, real: np.ndarray, made: np.ndarray, store: ClipStore, figures: dict[str, Any]
) -> list[str]:
    """Blocks: a clip of each class above its reconstruction, and the figures."""
    one = store.balanced(1)
    rows = [
        [name, f"{value:.2f}", f"{figures['colour_by_class'][name]:.3f}"]
        for name, value in figures["psnr_by_class"].items()
    ]
    text = (
        f"Above what went in, below what came out. Over {figures['clips']} clips of episodes that no training saw (and"
        f" the end of the film {FILM}): PSNR {figures['psnr']:.2f} dB, mean colours off by"
        f" {figures['colour']:.3f} of a range of 2."
    )
    return [
        paragraph(text),
        beside(report, name, real[one], made[one], store.rate),
        table(["class", "PSNR, dB", "colour error"], rows),
    ]
