"""A training from nothing, as sections of the demo's report: by the code of `walt train`, previewed every minute."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from walt.checkpoint import fingerprint
from walt.commands.model import find_device
from walt.data.clips import ClipStore
from walt.data.video import check_size, sheet_size
from walt.demo.clips import ClipSet
from walt.demo.config import DemoConfig
from walt.demo.curves import write_curves
from walt.demo.progress import HeldOut
from walt.demo.reconstructed import beside, measure, pairs
from walt.demo.report import SCALE, Report, command, paragraph, picture, table
from walt.errors import WaltError, say
from walt.evaluate.evaluate import reconstructions
from walt.model.diffusion import Diffusion
from walt.model.text import TextEncoder
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.pretrained import load_tokenizer
from walt.sample.pipeline import WaltPipeline
from walt.train.denoiser import latents, train_denoiser
from walt.train.log import read_log
from walt.train.run import Run
from walt.train.timing import PARTS
from walt.train.tokenizer import train_tokenizer
from walt.train.trainer import Preview, Trainer
from walt_kernels import explain
from walt_kernels.testing import sample_call

TOKENIZER = "A tokenizer, trained from nothing"
BASE = "A denoiser, trained on its latents"
KERNELS = "Which kernel runs where"
COST = "What a training step cost"
SECTIONS = (TOKENIZER, BASE, KERNELS, COST)
OPS = ("causal_conv3d", "video_norm", "window_attention", "adaln_lora", "adaln_modulate", "adaln_residual_modulate")
COLUMNS = 4
PREVIEW_STEPS = 20  # of DDIM
RESERVE = 20.0  # seconds of the budget for what comes after the training


def check_media(out: Path, classes: int, size: int) -> None:
    """WaltError, before anything is trained, if videos of that many classes would be larger than a video can be."""
    check_size(out / "media" / "transformer.mp4", *sheet_size(classes, COLUMNS, SCALE * size, SCALE * size))
    check_size(out / "media" / "tokenizer.mp4", *sheet_size(2 * classes, classes, 2 * size, 2 * size))


class Every:
    """A preview that is called only if that many seconds have passed since the last time."""

    def __init__(self, seconds: float, preview: Preview) -> None:
        self.seconds, self.preview, self.last = seconds, preview, time.monotonic()

    def __call__(self, module: nn.Module, step: int) -> None:
        if time.monotonic() - self.last >= self.seconds:
            self.preview(module, step)
            self.last = time.monotonic()


def steps(title: str, trainer: Trainer[Any]) -> str:
    """The block that says how long it trained; on the terminal, too, if that was in an earlier run."""
    text = f"{trainer.step} steps of {trainer.batch} clips in {trainer.elapsed:.0f} seconds."
    if trainer.resumed == trainer.step:
        text += " It was finished before: to train for longer, give another folder."
        say(f"{title}: {text}")
    return paragraph(text)


class Trained:
    """Trains the tokenizer and the base model of the preset, and shows them while it does."""

    def __init__(
        self, config: DemoConfig, out: Path, report: Report, clips: ClipSet, train: ClipStore, test: ClipStore
    ) -> None:
        self.config, self.out, self.report, self.clips, self.train, self.test = config, out, report, clips, train, test
        self.real = clips.read(test)
        self.one = self.real[test.balanced(1)]

    def tokenizer(self, seconds: float) -> dict[str, Any]:
        """Train for that long; figures of the held-out clips."""
        run, rows = self._run("tokenizer"), self.out / "tokenizer.held-out.jsonl"

        def show(made: np.ndarray) -> None:
            video = beside(self.report, "tokenizer", self.one, made, self.train.rate)
            self.report.show(TOKENIZER, self._curves("tokenizer", rows), video)

        preview = Every(self.config.preview_seconds, HeldOut(rows, self.one, show))
        trainer = train_tokenizer(run, preview=preview, seconds=max(1.0, seconds))
        made = reconstructions(load_tokenizer(self.out / "tokenizer"), self.real)
        figures = measure(self.real, made, self.test)
        blocks = pairs(self.report, "tokenizer", self.real, made, self.test, figures)
        train = command("walt train tokenizer --data clips --out runs/mine")
        self.report.show(TOKENIZER, steps(TOKENIZER, trainer), self._curves("tokenizer", rows), *blocks, train)
        return {"trained": figures, "tokenizer": trainer.progress()}

    def base(self, seconds: float) -> dict[str, Any]:
        """Train for that long, less what sampling takes at the end; show a sample of each class."""
        run, classes = self._run("base"), self.train.classes

        def show(pipeline: WaltPipeline, steps: int) -> None:
            made = pipeline.generate(classes, len(classes), steps=steps, seed=self.config.seed, progress=False)
            video = self.report.video("transformer", made, COLUMNS, self.train.rate, "samples")
            names = paragraph(f"A sample of each class: {', '.join(classes)}.")
            self.report.show(BASE, self._curves("transformer"), names, video)

        def make_preview(
            run: Run, tokenizer: Tokenizer, diffusion: Diffusion, encoder: TextEncoder | None
        ) -> Preview | None:
            def preview(module: nn.Module, step: int) -> None:
                assert isinstance(module, Transformer)
                show(WaltPipeline(tokenizer, module, diffusion, clip=run.clip, classes=classes), PREVIEW_STEPS)

            return Every(self.config.preview_seconds, preview)

        begun = time.monotonic()
        self._encode(run)
        left = seconds - (time.monotonic() - begun) - RESERVE
        trainer = train_denoiser(run, preview=make_preview, seconds=max(1.0, left))
        show(WaltPipeline.from_pretrained(self.out), self.config.sampling_steps)
        sample = command(f"walt sample --from {shlex.quote(str(self.out))}")
        self.report.show(BASE, steps(BASE, trainer), self.report.sections[BASE].body, sample)
        return {"transformer": trainer.progress()}

    def kernels(self) -> dict[str, Any]:
        """The backend of each op for a small call where the training ran, and why not the others."""
        chosen = {}
        rows = []
        device = find_device(None)
        for op in OPS:
            reasons = explain(op, **sample_call(op, device))
            chosen[op] = next(name for name, reason in reasons.items() if reason is None)
            others = [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]
            rows.append([op, chosen[op], "; ".join(others)])
        text = paragraph(f"For a small call in float32 on {device}: the kernel that it gets, and why not the others.")
        blocks = table(["op", "runs on", "and not on"], rows), command("python -m walt_kernels")
        self.report.show(KERNELS, text, *blocks)
        return {"kernels": chosen}

    def cost(self) -> dict[str, Any]:
        """Milliseconds of a step by what they went to, means over the log."""
        costs = {}
        for stage in ("tokenizer", "transformer"):
            log = read_log(self.out / f"{stage}.jsonl")
            if not log:
                raise WaltError(f"no step of the {stage} was logged")
            columns = [*(f"{part}_s" for part in PARTS), "frames_s"]
            costs[stage] = {name: float(np.mean([row[name] for row in log])) for name in columns}
        head = ["stage", *(f"{part}, ms" for part in PARTS), "frames a second"]
        rows = [
            [stage, *(f"{1000 * cost[f'{part}_s']:.2f}" for part in PARTS), f"{cost['frames_s']:.0f}"]
            for stage, cost in costs.items()
        ]
        threads = f"Means over the training, {torch.get_num_threads()} threads."
        self.report.show(COST, paragraph(threads), table(head, rows))
        return {"cost": costs}

    def _run(self, stage: str) -> Run:
        return Run(stage, self.config.settings(stage), self.train, self.out, find_device(None))

    def _encode(self, run: Run) -> None:
        """Encode the latents now, so that the time that is left is for training."""
        tokenizer = load_tokenizer(self.out / "tokenizer")
        latents(run, tokenizer, fingerprint(tokenizer), half=False)

    def _curves(self, name: str, held_out: Path | None = None) -> str:
        rows = read_log(held_out) if held_out is not None else []
        path = self.report.media(f"{name}.svg")
        write_curves(path, read_log(self.out / f"{name}.jsonl"), rows)
        return picture(path, "curves of the training")
