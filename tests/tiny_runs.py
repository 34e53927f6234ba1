"""Runs of the stages on a few small films: what tests of `walt train` and the commands share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import yaml

from walt.commands.train import train_stage
from walt.data.video import write_mp4
from walt.settings import load_settings
from walt.train.run import Run, captions_of, open_data

TOKENIZER = ("tokenizer.channels=4", "tokenizer.multipliers=[1, 1, 1, 1]", "tokenizer.groups=2")
TOKENIZER += ("tokenizer.middle_blocks=0", "tokenizer.latent_channels=4", "tokenizer.adaptive_norm=false")
TRANSFORMER = ("transformer.layers=2", "transformer.width=32", "transformer.heads=2", "transformer.patch=1")
SHORT = ("data.frames=5", "data.height=16", "data.width=16", "data.batch=4", "training.steps=2", "training.log_every=1")
SHORT += ("training.preview_every=0",)


def moving(seed: int, frames: int = 9, height: int = 64, width: int = 64) -> np.ndarray:
    """Soft coloured stripes that move: uint8 [T, H, W, 3]."""
    random = np.random.default_rng(seed)
    y, x, t = np.meshgrid(np.arange(height), np.arange(width), np.arange(frames), indexing="ij")
    channels = []
    for _ in range(3):
        a, b, c, phase = random.uniform(0.05, 0.3, 4)
        channels.append(127 + 100 * np.sin(a * y + b * x + 2 * c * t + 20 * phase))
    return np.stack(channels, axis=-1).transpose(2, 0, 1, 3).astype(np.uint8)


def write_films(folder: Path) -> Path:
    """up/0.mp4, up/1.mp4, down/0.mp4, down/1.mp4, with captions.jsonl: 9 frames of 64x64 each."""
    rows = []
    for label, name in enumerate(("up", "down")):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            write_mp4(folder / name / f"{i}.mp4", moving(2 * label + i), fps=8)
            rows.append({"file": f"{name}/{i}.mp4", "caption": f"stripes go {name}"})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(stage: str, *overrides: str, preset: str | None = None):
    pairs = (text.partition("=") for text in (*TOKENIZER, *TRANSFORMER, *SHORT, *overrides))
    return load_settings(stage, preset=preset, overrides={name: yaml.safe_load(value) for name, _, value in pairs})


def make(stage: str, data: Path, out: Path, *overrides: str, preset: str | None = None, new_settings: bool = False):
    """The run, ready for `train`."""
    made = settings(stage, *overrides, preset=preset)
    store = open_data(data, out, made, captions_of(data, None))
    return Run(stage, made, store, out, torch.device("cpu"), new_settings)


def fit(stage: str, data: Path, out: Path, *overrides: str, preset: str | None = None, new_settings: bool = False):
    return train_stage(make(stage, data, out, *overrides, preset=preset, new_settings=new_settings))
