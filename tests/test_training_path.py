"""One training path: what changes a class of `walt.train.losses` changes what `walt train` computes."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import fit

from walt.train import losses
from walt.train.log import read_log

pytest.importorskip("av", reason="PyAV is not installed")

ALL = ("losses.adversarial=0.1", "losses.r1_every=1")


def scaled(monkeypatch, loss: type) -> None:
    """Three times the loss, or the term of one."""
    original = loss.__call__

    def call(self, *arguments):
        result = original(self, *arguments)
        return (3 * result[0], result[1]) if isinstance(result, tuple) else 3 * result

    monkeypatch.setattr(loss, "__call__", call)


def rows(stage: str, out) -> list[dict[str, float]]:
    return read_log(out / f"{'transformer' if stage == 'base' else stage}.jsonl")


@pytest.fixture(scope="module")
def trained(films, tmp_path_factory):
    """Both stages as they are, the tokenizer with all its losses that need no other package."""
    out = tmp_path_factory.mktemp("trained")
    fit("tokenizer", films, out, *ALL)
    fit("base", films, out)
    return out


@pytest.mark.parametrize(
    ("loss", "column"),
    [
        (losses.ReconstructionTerm, "reconstruction"),
        (losses.DecorrelationTerm, "decorrelation"),
        (losses.AdversarialTerm, "adversarial"),
        (losses.TokenizerLoss, "loss"),
        (losses.DiscriminatorLoss, "discriminator_loss"),
    ],
)
def test_tokenizer(trained, films, tmp_path, monkeypatch, loss, column):
    scaled(monkeypatch, loss)
    fit("tokenizer", films, tmp_path, *ALL)
    before, after = rows("tokenizer", trained), rows("tokenizer", tmp_path)
    assert after[0][column] == pytest.approx(3 * before[0][column], rel=1e-5)
    norm = "discriminator_grad_norm" if loss is losses.DiscriminatorLoss else "grad_norm"
    assert after[0][norm] != pytest.approx(before[0][norm], rel=1e-5)


def test_denoiser(trained, films, tmp_path, monkeypatch):
    scaled(monkeypatch, losses.DenoiserLoss)
    for name in ("tokenizer", "data-16x16", "latents-16x16"):
        (tmp_path / name).symlink_to(trained / name)
    fit("base", films, tmp_path)
    before, after = rows("base", trained), rows("base", tmp_path)
    for column in ("loss", "grad_norm"):
        assert after[0][column] == pytest.approx(3 * before[0][column], rel=1e-5)


def test_a_new_term_is_one_class_and_one_weight(films, tmp_path, monkeypatch):
    """Its name is that of its weight among the settings, and of its column in the log."""

    class BrightnessTerm:
        name = "perceptual"  # a weight that is there

        def __call__(self, made):
            return made.output.mean() ** 2

    terms = losses.TokenizerLoss.__init__

    def with_another(self, config, given):
        terms(self, config, [*given, BrightnessTerm()])

    monkeypatch.setattr(losses.TokenizerLoss, "__init__", with_another)
    trainer = fit("tokenizer", films, tmp_path)
    first = rows("tokenizer", tmp_path)[0]
    config = trainer.objectives[0].forward.loss.terms
    assert [weight for weight, _, _ in config] == [1.0, 0.02, 0.0]
    parts = sum(weight * first[term.name] for weight, _, term in config)
    assert first["loss"] == pytest.approx(parts, rel=1e-5)
    assert torch.tensor(first["perceptual"]).isfinite()
