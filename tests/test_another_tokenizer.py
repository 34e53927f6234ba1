"""Denoisers whose tokenizer is not the one they were trained with: refused by name, never garbage."""

from __future__ import annotations

import shutil

import pytest
import torch
from command_line import fails
from safetensors.torch import load_file, save_file
from tiny_runs import fit

from walt.cli import main
from walt.errors import WaltError
from walt.sample.pipeline import WaltPipeline

pytest.importorskip("av", reason="PyAV is not installed")

LARGE = ("data.height=32", "data.width=32", "transformer.patch=2")


@pytest.fixture(scope="module")
def trained(films, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    fit("tokenizer", films, out)
    fit("base", films, out)
    fit("sr1", films, out, *LARGE)
    return out


@pytest.fixture
def model(trained, tmp_path):
    """A copy, so also a run folder that was moved."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def generate(folder):
    return WaltPipeline.from_pretrained(folder).generate("up", steps=1, progress=False)


def refused(folder, stage: str, command: str):
    """The sentence that says so."""
    return pytest.raises(
        WaltError,
        match=rf"{folder / stage} was trained on the latents of another tokenizer than {folder / 'tokenizer'} holds; "
        rf"remove it and train it again \(walt train {command}\), or put its tokenizer back",
    )


def test_a_folder_that_was_moved_is_not(model):
    assert generate(model).shape == (1, 5, 16, 16, 3)


def test_trained_anew(model, films, tmp_path, capsys):
    shutil.rmtree(model / "tokenizer")
    fit("tokenizer", films, model, "training.seed=1")
    with refused(model, "transformer", "base"):
        generate(model)
    for command in (("sample",), ("evaluate", "--data", films, "--metrics", "fvd")):
        line = fails(capsys, *command, "--from", model, *(["--out", tmp_path / "a.mp4"] * (command[0] == "sample")))
        assert "was trained on the latents of another tokenizer" in line
    # It reconstructs as well as ever.
    assert main(["evaluate", "--from", str(model), "--data", str(films)]) == 0


def test_trained_further(model, films, capsys):
    fit("tokenizer", films, model, "training.steps=3", new_settings=True)
    said = capsys.readouterr().err
    for stage, command in (("transformer", "base"), ("sr1", "sr")):
        assert f"{model / stage} was trained on this tokenizer's latents; afterwards" in said
        assert f"walt train {command}" in said
    with refused(model, "transformer", "base"):
        generate(model)
    # A tokenizer that is finished, and the same command again, change nothing.
    before = (model / "tokenizer" / "ema.safetensors").read_bytes()
    fit("tokenizer", films, model, "training.steps=3", new_settings=True)
    assert (model / "tokenizer" / "ema.safetensors").read_bytes() == before
    assert "afterwards" not in capsys.readouterr().err


def test_other_statistics_of_the_latents(model):
    path = model / "tokenizer" / "ema.safetensors"
    tensors = load_file(path)
    tensors["latent_std"] = tensors["latent_std"] * 2
    save_file(tensors, path)
    with refused(model, "transformer", "base"):
        generate(model)


def test_without_the_averaged_weights(model):
    (model / "tokenizer" / "ema.safetensors").unlink()
    with refused(model, "transformer", "base"):
        generate(model)


def test_training_goes_on_with_the_same_tokenizer_only(model, films):
    """Refused before the data is encoded: latents that took days are still there."""
    latents = (model / "latents-16x16" / "video.raw").read_bytes()
    shutil.rmtree(model / "tokenizer")
    fit("tokenizer", films, model, "training.seed=1")
    with refused(model, "transformer", "base"):
        fit("base", films, model, "training.steps=3", new_settings=True)
    assert (model / "latents-16x16" / "video.raw").read_bytes() == latents
    # What it says to do.
    shutil.rmtree(model / "transformer")
    fit("base", films, model)
    with refused(model, "sr1", "sr"):
        generate(model)
    shutil.rmtree(model / "sr1")
    fit("sr1", films, model, *LARGE)
    assert generate(model).shape == (1, 5, 16, 16, 3)


def test_super_resolution_of_another_base_model(model, films, tmp_path):
    """Stages of two runs, put together by hand."""
    other = tmp_path / "other"
    fit("tokenizer", films, other, "training.seed=1")
    fit("sr1", films, other, *LARGE)
    shutil.rmtree(model / "sr1")
    shutil.copytree(other / "sr1", model / "sr1")
    with refused(model, "sr1", "sr"):
        generate(model)


def test_an_earlier_stage_of_another_tokenizer_is_told(model, films, capsys):
    """Super-resolution may be trained first."""
    shutil.rmtree(model / "tokenizer")
    shutil.rmtree(model / "sr1")
    fit("tokenizer", films, model, "training.seed=1")
    capsys.readouterr()
    fit("sr1", films, model, *LARGE)
    assert f"{model / 'transformer'} was trained on the latents of another tokenizer" in capsys.readouterr().err


def test_latents_of_another_tokenizer(model, films, tmp_path, capsys):
    """Those of walt encode say whose they are; others are decoded as before."""
    source, latents = ("--from", str(model)), tmp_path / "a.safetensors"
    decode = ("decode", *source, "--out", str(tmp_path / "a.mp4"), "--latents")
    assert main(["encode", *source, "--video", str(films / "up/0.mp4"), "--out", str(latents)]) == 0
    assert main([*decode, str(latents)]) == 0
    save_file({"latent": load_file(latents)["latent"]}, tmp_path / "foreign.safetensors")
    fit("tokenizer", films, model, "training.steps=3", new_settings=True)
    capsys.readouterr()
    assert fails(capsys, *decode, latents).endswith(
        f"{latents} holds latents of another tokenizer than {model}; encode the video again, or name"
        " the model that it was encoded with"
    )
    assert main([*decode, str(tmp_path / "foreign.safetensors")]) == 0


def test_exported_models_know_their_tokenizer_too(model, tmp_path):
    pipeline = WaltPipeline.from_pretrained(model)
    pipeline.tokenizer.half()  # a copy in 16 bits is read back as it was written
    pipeline.save_pretrained(tmp_path / "export")
    assert generate(tmp_path / "export").shape == (1, 5, 16, 16, 3)
    path = tmp_path / "export" / "tokenizer" / "model.safetensors"
    save_file({name: torch.ones_like(tensor) for name, tensor in load_file(path).items()}, path)
    with refused(tmp_path / "export", "transformer", "base"):
        generate(tmp_path / "export")
