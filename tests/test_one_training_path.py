"""There is one training path: `walt train`, the demo, the ablations and the step benchmark have the same losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from films import noise
from test_ablations import SETTINGS, SMALL, random_material
from tiny_runs import fit

import walt.demo.clips
from benchmarks import ablations, cases, measure
from benchmarks.ablation_variants import BASELINE
from walt.data.clips import Clip
from walt.demo.config import DemoConfig
from walt.demo.demo import Demo
from walt.errors import WaltError
from walt.evaluate.networks import FrameFeatures
from walt.settings import TrainingConfig, load_settings
from walt.train.log import read_log
from walt.train.losses import DenoiserLoss, TokenizerLoss

Losses = dict[type, float]


@pytest.fixture
def losses(monkeypatch) -> Losses:
    """Both classes of losses give twice what they gave; that is here, as it last was."""
    last: Losses = {}

    def double(kind: type) -> None:
        call = kind.__call__

        def doubled(self, network, batch):
            loss, values = call(self, network, batch)
            last[kind] = loss.item()
            return 2 * loss, values

        monkeypatch.setattr(kind, "__call__", doubled)

    double(TokenizerLoss)
    double(DenoiserLoss)
    return last


def assert_trained_with(losses: Losses, out: Path) -> None:
    for name, kind in (("tokenizer", TokenizerLoss), ("transformer", DenoiserLoss)):
        assert read_log(out / f"{name}.jsonl")[-1]["loss"] == pytest.approx(2 * losses[kind])


def test_walt_train(losses, films, tmp_path):
    for stage in ("tokenizer", "base"):
        fit(stage, films, tmp_path)
    assert_trained_with(losses, tmp_path)


def test_the_demo(losses, tmp_path, monkeypatch):
    for module in ("av", "PIL", "matplotlib"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    try:
        FrameFeatures()
    except WaltError as error:
        pytest.skip(str(error))

    def clips(train: int, held_out: int, *, frames: int, size: int, **_: object):
        names = [f"{name}/{number}" for number in range(train + held_out) for name in ("basic", "film")]
        made = [Clip(name, noise(frames, seed, size, size)) for seed, name in enumerate(names)]
        return made[: 2 * train], made[2 * train :]

    monkeypatch.setattr(walt.demo.clips, "demo_clips", clips)
    steps = {"tokenizer_steps": 2, "transformer_steps": 2, "sampling_steps": 1}
    Demo(
        DemoConfig(preset="minimal", scenarios=("basic",), clips=2, samples=2, frames=5, size=16, **steps), tmp_path
    ).run()
    assert_trained_with(losses, tmp_path)


@pytest.mark.parametrize("stage", ["tokenizer", "base"])
def test_the_demo_has_the_settings_of_its_preset(stage):
    """But for the size of its data, and for these."""
    ours, theirs = DemoConfig(preset="minimal").settings(stage), load_settings(stage, preset="minimal")
    own = {name: getattr(ours.training, name) for name in ("steps", "save_every", "preview_every", "seed")}
    assert ours == replace(theirs, data=ours.data, training=replace(theirs.training, **own))


def test_an_ablation(losses, tmp_path):
    material, training = random_material(tmp_path), TrainingConfig(1)
    _, objective, source = ablations.training_of(BASELINE, material, SMALL, SETTINGS, training)
    batch = ablations.make_batch(source, 0, 0, range(SETTINGS.batch))
    assert objective.backward([batch]).loss == pytest.approx(2 * losses[DenoiserLoss])
    losses.clear()
    ablations.run(BASELINE, 0, material, SETTINGS, 1, SMALL)
    assert np.isfinite(losses[DenoiserLoss])


@pytest.mark.parametrize(("stage", "kind"), [("tokenizer tiny", TokenizerLoss), ("base tiny", DenoiserLoss)])
def test_the_step_benchmark(losses, stage, kind):
    case = cases.training(stage, *((1, 1, 16) if kind is TokenizerLoss else (4, 5, 8)))
    step = measure.workshop(case).subject(case, torch.float32, "cpu", True).call("ours", "step")
    assert step() == pytest.approx(2 * losses[kind])
