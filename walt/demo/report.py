"""The demo's pictures and its report: one HTML file that holds everything it shows."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

import numpy as np

from walt.atomic import atomic_write
from walt.data.video import check_size, sheet_size, tile, write_gif, write_mp4, write_png
from walt.errors import require
from walt.train.log import read_log

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd; }
th { text-align: left; font-weight: 600; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; image-rendering: pixelated; } .note { color: #555; font-size: 14px; }
"""


def write_media(
    out: Path, original: np.ndarray, reconstruction: np.ndarray, samples: np.ndarray, pictures: np.ndarray, fps: float
) -> None:
    """samples.mp4/.gif (one clip a class), reconstructions.mp4/.gif (originals above, output below), images.png."""
    sampled = tile(samples, columns=min(4, len(samples)), scale=3)
    pairs = tile(np.concatenate([original, reconstruction]), columns=len(original), scale=2)
    for name, video in (("samples", sampled), ("reconstructions", pairs)):
        write_mp4(out / f"{name}.mp4", video, fps)
        write_gif(out / f"{name}.gif", video, fps)
    write_png(out / "images.png", tile(pictures[:, None], columns=min(16, len(pictures)), scale=1)[0])


def check_media(out: Path, classes: int, size: int) -> None:
    """WaltError, before anything is trained, if videos of that many classes would be larger than a video can be."""
    check_size(out / "samples.mp4", *sheet_size(classes, min(4, classes), 3 * size, 3 * size))
    check_size(out / "reconstructions.mp4", *sheet_size(2 * classes, classes, 2 * size, 2 * size))


def write_curves(out: Path) -> None:
    """losses.png from the two logs: each logged loss, and a running mean that shows the trend."""
    require("matplotlib", "demo").use("Agg")
    plt: Any = require("matplotlib.pyplot", "demo")
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for axis, name, title in zip(
        axes, ("tokenizer", "transformer"), ("tokenizer: reconstruction", "transformer: v-prediction"), strict=True
    ):
        rows = read_log(out / f"{name}.jsonl")
        steps, loss = [row["step"] for row in rows], np.array([row["loss"] for row in rows])
        axis.plot(steps, loss, color="0.75", linewidth=1)
        axis.plot(steps, running_mean(loss, 10), color="C0")
        axis.set(title=title, xlabel="step", ylabel="loss", yscale="log")
        axis.grid(alpha=0.3)
    with atomic_write(out / "losses.png") as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and up to width - 1 before it."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(last - width, 0)
    return np.asarray((total[last] - total[first]) / (last - first))


def write_html(out: Path, metrics: dict[str, Any]) -> None:
    frechet = metrics["frechet"]
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>WALT demo</title><style>{STYLE}</style></head><body>
<h1>A small W.A.L.T, trained from nothing</h1>
<p>{_intro(metrics)}</p>
<h2>Samples</h2>
<p>One clip for each class, in the order {html.escape(", ".join(metrics["classes"]))}; the first sample of each, not the
best one. {metrics["settings"]["sampling_steps"]} DDIM steps.</p>
{_picture(out / "samples.gif", "sampled clips")}
<p>Pictures from the same model, four a class (a stack of images is one sample of the joint training):</p>
{_picture(out / "images.png", "sampled images")}
<h2>Reconstructions of held-out clips</h2>
<p>Above what went into the tokenizer, below what came out. PSNR {metrics["psnr"]:.2f} dB, the mean over all
{metrics["clips"]["held out"]} held-out clips; by class:</p>
{_table(["class", "PSNR, dB"], [[name, f"{value:.2f}"] for name, value in metrics["psnr_by_class"].items()])}
{_picture(out / "reconstructions.gif", "originals and reconstructions")}
<h2>Distance to real clips</h2>
<p>Frechet distance to the held-out clips, {metrics["frechet_clips"]} clips ({metrics["frechet_frames"]} frames) on each
side. Features: {html.escape(metrics["frechet_features"])}.
The trained model is {metrics["frechet_ratio"]:.2f} times nearer than the same network before its first step; measured
against the same clips as the tokenizer shows them, {metrics["decoded_ratio"]:.2f} times.</p>
{_table(["set", "frames", "motion", "frames, to reconstructions"], [_distances(n, d) for n, d in frechet.items()])}
<p class="note">"Frames" compares single frames, "motion" the steps of the features from frame to frame. The untrained
model has the same sampler, seeds, tokenizer and number of clips. "Reconstructions" are the held-out clips through the
tokenizer, which samples can hardly beat: such features count its blur heavily. The last row is the floor: other real
clips against the held-out ones. Few clips make every distance larger than many would, and these numbers cannot be
compared with a published FVD or FID, which use other features, other data and thousands of clips.</p>
<h2>Training</h2>
{_picture(out / "losses.png", "loss curves")}
{_training(metrics)}
<p class="note">Held out are whole episodes of the simulator and the last frames of the film: no held-out frame was
trained on. The rooms of a scenario are the same in all its episodes, so this measures new views and motions, not new
rooms. Clips: <a href="https://vizdoom.cs.put.edu.pl">ViZDoom</a> scenarios, and "Big Buck Bunny" (Blender Foundation,
CC-BY 3.0). Sample again with <code>walt sample --from {html.escape(str(out))}</code>.</p>
</body></html>
"""
    with atomic_write(out / "report.html") as temporary:
        temporary.write_text(page)


def _intro(metrics: dict[str, Any]) -> str:
    tokenizer, transformer = (metrics["parameters"][name] / 1e6 for name in ("tokenizer", "transformer"))
    minutes = metrics["seconds"]["total"] / 60
    return (
        f"A causal video tokenizer ({tokenizer:.1f} M parameters) and a windowed-attention diffusion transformer"
        f" ({transformer:.1f} M) learned {metrics['clips']['train']} clips of {len(metrics['classes'])} classes on"
        f" {metrics['threads']} CPU threads. This run took {minutes:.1f} minutes. A model this small, trained this"
        " briefly, makes blurred clips; what counts here is that every part works and learns."
    )


def _training(metrics: dict[str, Any]) -> str:
    rows = [
        [name, f"{stage['done']} of {stage['planned']}", f"{stage['seconds']:.0f}"]
        for name, stage in metrics["steps"].items()
    ]
    note = ""
    if any(stage["done"] < stage["planned"] for stage in metrics["steps"].values()):
        note = '<p class="note">The budget of minutes ended a stage before its last planned step.</p>'
    return _table(["stage", "steps", "seconds"], rows) + note


def _distances(name: str, row: dict[str, float]) -> list[str]:
    return [name, f"{row['frames']:.1f}", f"{row['motion']:.2f}", f"{row['decoded']:.1f}"]


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><td>{html.escape(first)}</td>" + "".join(f'<td class="n">{html.escape(c)}</td>' for c in rest) + "</tr>"
        for first, *rest in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def _picture(path: Path, text: str) -> str:
    kind = {".gif": "gif", ".png": "png"}[path.suffix]
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/{kind};base64,{data}">'
