"""`walt evaluate --of upscaled`: super-resolution of real clips that were shrunk, beside bicubic interpolation."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from command_line import fails
from tiny_runs import fit

from walt.cli import main
from walt.commands import evaluate
from walt.data.pixels import enlarge, shrink
from walt.data.prepare import prepare
from walt.data.video import write_mp4
from walt.evaluate.evaluate import reconstructions
from walt.evaluate.metrics import psnr
from walt.evaluate.real_clips import real_clips
from walt.pretrained import load_tokenizer
from walt.sample.pipeline import WaltPipeline

pytest.importorskip("av", reason="PyAV is not installed")


@pytest.fixture(scope="module")
def model(films, tmp_path_factory):
    """Clips of 5 frames of 16x16 pixels, and of 32x32 by super-resolution, which takes classes."""
    out = tmp_path_factory.mktemp("model") / "run"
    fit("tokenizer", films, out)
    fit("base", films, out)
    fit("sr1", films, out, "data.height=32", "data.width=32", "transformer.patch=2")
    return out


@pytest.fixture(autouse=True)
def frames(monkeypatch) -> None:
    class Frames:
        """Mean colours of frames."""

        description = "mean colours"

        def __init__(self, *_, **__) -> None:
            pass

        def __call__(self, clips: np.ndarray) -> np.ndarray:
            return clips.mean(axis=(2, 3)).astype(np.float64)

    monkeypatch.setattr(evaluate, "FrameFeatures", Frames)


def measured(model, data, out, *options: object) -> dict:
    words = ["evaluate", "--from", model, "--data", data, "--steps", 2, "--json", out / "a.json", *options]
    assert main([str(word) for word in words]) == 0
    return json.loads((out / "a.json").read_text())


def test_both_start_from_the_shrunk_clips(model, films, tmp_path, monkeypatch, capsys):
    seen = {}
    upscale = WaltPipeline.upscale

    def spy(self, video, **options):
        seen.update(video=video, **options)
        return upscale(self, video, **options)

    monkeypatch.setattr(WaltPipeline, "upscale", spy)
    found = measured(model, films, tmp_path, "--of", "upscaled", "--metrics", "psnr", "frechet_image_distance")
    real, labels, _ = real_clips(films, 64, 5, (32, 32), model, reference=True)
    small = np.stack([shrink(clip, 16, 16) for clip in real])
    kept = reconstructions(load_tokenizer(model / "tokenizer"), small)
    assert np.array_equal(seen["video"], small)
    assert (seen["stages"], seen["label"]) == (1, [int(label == "up") for label in labels])
    assert found.keys() == {"upscaled", "bicubic"}
    for name, made in (
        ("upscaled", upscale(WaltPipeline.from_pretrained(model), small, label=labels, steps=2, progress=False)),
        ("bicubic", np.stack([enlarge(clip, 32, 32) for clip in kept])),
    ):
        values = psnr(made, real)
        assert found[name]["clip"] == [5, 32, 32]
        assert found[name]["values"]["psnr"] == pytest.approx(values.mean(), abs=1e-3)
        mine = values[[label == "up" for label in labels]].mean()
        assert found[name]["by_class"]["psnr"]["up"] == pytest.approx(mine, abs=1e-3)
        assert found[name]["values"]["frechet_image_distance"] > 0
    assert "bicubic: 4 real clips and 4 compared with them, 5 frames of 32x32 pixels" in capsys.readouterr().out


def test_beside_the_other_sets(model, films, tmp_path, capsys):
    """Each size has its reference, and the figures are those that a set has alone."""
    options = ("--metrics", "psnr", "frechet_image_distance", "--reference", films, "--of")
    small = ("reconstructions", "samples", "untrained")
    found = measured(model, films, tmp_path, *options, *small, "upscaled")
    assert capsys.readouterr().err.count("warning: ") == 1
    assert found.keys() == {"reference", *small, "large_reference", "upscaled", "bicubic"}
    assert [result["clip"][1] for result in found.values()] == [16] * 4 + [32] * 3
    for name in ("reference", "large_reference"):  # the same clips
        assert found[name]["values"]["frechet_image_distance"] == pytest.approx(0, abs=1e-6)
    alone = measured(model, films, tmp_path, *options, *small) | measured(model, films, tmp_path, *options, "upscaled")
    assert alone == found


def test_what_cannot_be_upscaled(model, films, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "base", ignore=shutil.ignore_patterns("sr1*"))
    prepare(films, tmp_path / "small", height=16, width=16, progress=False, say=lambda line: None)
    of = ("--of", "upscaled")
    for source, arguments, message in (
        (
            tmp_path / "base",
            [films],
            "--of upscaled: OUT/base has no super-resolution stage; train one with walt train sr",
        ),
        (
            model,
            [films, "--size", 32],
            "--frames 5, --size 32x32: samples, and clips to upscale, have 5 frames of 16x16",
        ),
        (
            model,
            [tmp_path / "small"],
            "small was prepared for 16x16 pixels; 32x32 are wanted: prepare it with --size 32",
        ),
    ):
        line = fails(capsys, "evaluate", "--from", source, "--data", *arguments, *of)
        assert message.replace("OUT", str(tmp_path)) in line


def test_small_films_and_unknown_classes_are_told(model, films, tmp_path, capsys):
    for name in ("a", "b"):
        write_mp4(tmp_path / "films" / "sideways" / f"{name}.mp4", np.zeros((5, 16, 24, 3), np.uint8), 10)
    options = ["--from", str(model), "--data", str(tmp_path / "films"), "--steps", "1"]
    assert main(["evaluate", *options, "--of", "upscaled"]) == 0
    said = capsys.readouterr().err
    assert said.count("films of fewer than 32x32 pixels are enlarged to that: figures of them flatter") == 1
    assert "clips of classes that the model does not know are made without a class: sideways" in said
