"""`walt demo --release`: a model, its card, and what is kept when it runs again. And the model in the package."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import fails
from safetensors import safe_open

import walt
from walt.atomic import write_json
from walt.cli import main
from walt.data.clips import write_store
from walt.data.simulator import FILM, film_path, held_out_clips
from walt.data.video import read_video, write_mp4
from walt.demo import release
from walt.demo.card import CARD, describe_model
from walt.demo.clips import ClipSet
from walt.errors import WaltError
from walt.evaluate.evaluate import reconstructions
from walt.evaluate.metrics import psnr
from walt.evaluate.networks import FrameFeatures
from walt.pretrained import PACKAGED, TINY_DOOM, load_tokenizer, model_folder, packaged
from walt.sample.pipeline import WaltPipeline

MODEL = PACKAGED / TINY_DOOM
SMALL = {"transformer.layers": 2, "transformer.width": 32, "transformer.heads": 2}
RECIPE = {
    "tokenizer": ("minimal", {"training.steps": 4, "training.preview_every": 2}),
    "base": (
        "minimal",
        {
            "training.steps": 2,
            "transformer.text_width": 8,
            "transformer.text_vocabulary": 256,
            "transformer.frame_condition": True,
            "data.text": "bytes",
        },
    ),
    "sr1": ("tiny-sr", {**SMALL, "training.steps": 2}),
}


@pytest.fixture(scope="module")
def needs_simulator() -> None:
    for module in ("av", "vizdoom"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    try:
        film_path()
    except WaltError as error:
        pytest.skip(str(error))


@pytest.fixture
def small(needs_simulator, monkeypatch) -> None:
    """A release of seconds: 5 frames of 16x16 pixels."""
    try:
        FrameFeatures()
    except WaltError as error:
        pytest.skip(str(error))
    values = {"RECIPE": RECIPE, "FRAMES": 5, "SIZE": 16, "CLIPS": 2, "HELD_OUT": 2, "SCENARIOS": ("basic",)}
    for name, value in values.items():
        monkeypatch.setattr(release, name, value)


def test_a_release_its_card_and_the_weights_of_its_seed(small, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["demo", "--release", str(out), "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    card = json.loads((out / TINY_DOOM / CARD).read_text())
    assert printed.endswith(describe_model(out / TINY_DOOM) + "\n")
    assert [stage["done"] for stage in card["stages"].values()] == [4, 2, 2]
    assert [step for step, _ in card["psnr_by_step"]] == [2, 4]
    assert card["command"] == "walt demo --release OUT --seed 3"

    # The figures are those of the files in 16 bits.
    pipeline = WaltPipeline.from_pretrained(out / TINY_DOOM)
    test = ClipSet(3, 2, 2, 5, 32, ("basic",))
    real = test.read(test.open(out)[1], size=16)
    measured = psnr(reconstructions(pipeline.tokenizer, real), real)
    assert card["held_out"]["reconstructions"]["values"]["psnr"] == pytest.approx(measured.mean())
    for name in ("tokenizer", "transformer", "sr1"):
        assert dtypes(out / TINY_DOOM / name) <= {"F16", "F32"}
    assert pipeline.classes == ("basic", FILM)
    assert pipeline.generate("basic", text="walking in a brick hall", steps=1, progress=False).shape == (
        1,
        5,
        16,
        16,
        3,
    )

    assert main(["info", str(out / TINY_DOOM)]) == 0
    assert capsys.readouterr().out == describe_model(out / TINY_DOOM) + "\n"

    weights = {path: path.read_bytes() for path in (out / TINY_DOOM).rglob("*") if path.is_file()}
    assert main(["demo", "--release", str(out), "--seed", "3"]) == 0  # nothing is left to do
    assert all(path.read_bytes() == content for path, content in weights.items())

    again = release.Release(tmp_path / "again", 3).run()
    for name in ("tokenizer", "transformer", "sr1"):
        first, second = (folder / name / "model.safetensors" for folder in (out / TINY_DOOM, again))
        assert first.read_bytes() == second.read_bytes()

    # What the card says is run, and a model of another training is not taken for this one's.
    evaluate = shlex.split(card["evaluation"].replace("OUT", str(out)))[1:]
    assert main([*evaluate, "--from", str(out / TINY_DOOM)]) == 0
    write_json(out / TINY_DOOM / CARD, {**card, "command": "walt demo --release OUT --seed 9"})
    assert main(["demo", "--release", str(out), "--seed", "3"]) == 0
    assert json.loads((out / TINY_DOOM / CARD).read_text())["command"] == card["command"]
    capsys.readouterr()
    assert "holds a demo of other clips (seed is 3 there, 4 here)" in fails(
        capsys, "demo", "--release", out, "--seed", 4
    )


def dtypes(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)


def test_weights_beyond_a_dtype_are_refused(tmp_path) -> None:
    pipeline = WaltPipeline.from_pretrained(TINY_DOOM)
    with torch.no_grad():
        next(pipeline.tokenizer.parameters()).fill_(1e6)
    with pytest.raises(WaltError, match=r"dtype: got torch.float16; expected one whose range holds 'encoder.first"):
        pipeline.save_pretrained(tmp_path / "model", dtype=torch.float16)


def test_a_broken_card_is_one_line(tmp_path) -> None:
    card = json.loads((MODEL / CARD).read_text())
    for broken, message in (
        ({**card, "faults": 3}, "is broken: 'int' object is not iterable"),
        ({**card, "stages": []}, "is broken: 'list' object has no attribute 'values'"),
        ({name: value for name, value in card.items() if name != "what"}, "has no 'what': it is no card"),
        ([], "holds a list, expected an object"),
    ):
        write_json(tmp_path / CARD, broken)
        with pytest.raises(WaltError) as error:
            describe_model(tmp_path)
        assert str(error.value).startswith(f"{tmp_path / CARD} {message}")
        assert "\n" not in str(error.value)
    (tmp_path / CARD).write_text("{")
    with pytest.raises(WaltError, match="is not JSON"):
        describe_model(tmp_path)


class TestThePackagedModel:
    def test_is_found_by_its_name_unless_a_model_has_it(self, tmp_path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert packaged() == (TINY_DOOM,)
        assert model_folder(TINY_DOOM) == model_folder(f"./{TINY_DOOM}/") == MODEL
        (tmp_path / TINY_DOOM).mkdir()
        assert model_folder(TINY_DOOM) == MODEL
        shutil.copytree(MODEL / "tokenizer", tmp_path / TINY_DOOM / "tokenizer")
        assert model_folder(TINY_DOOM) == Path(TINY_DOOM)
        assert model_folder(f"{TINY_DOOM}/") == Path(TINY_DOOM)
        with pytest.raises(WaltError, match=r"no such folder: tiny-dom; did you mean tiny-doom\?"):
            model_folder("tiny-dom")

    def test_is_small_and_in_16_bits(self) -> None:
        assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 12e6
        for name in ("tokenizer", "transformer", "sr1"):
            assert "F16" in dtypes(MODEL / name)

    def test_gives_the_psnr_of_its_card(self, needs_simulator, tmp_path) -> None:
        card = json.loads((MODEL / CARD).read_text())
        real, labels = held_out(tmp_path / "held-out")
        made = reconstructions(load_tokenizer(MODEL / "tokenizer"), real)
        measured = psnr(made, real)
        for name, value in card["held_out"]["reconstructions"]["by_class"]["psnr"].items():
            assert measured[labels == name].mean() == pytest.approx(value, abs=0.05)

    def test_learned(self) -> None:
        """By its card, samples are far nearer to held-out clips than they were before the training."""
        held_out = json.loads((MODEL / CARD).read_text())["held_out"]
        distance = {name: result["values"]["frechet_image_distance"] for name, result in held_out.items()}
        assert distance["reference"] < distance["reconstructions"] < distance["samples"]
        assert distance["untrained"] > 2.4 * distance["samples"]

    def test_its_figures_are_those_of_the_command(self) -> None:
        card = json.loads((MODEL / CARD).read_text())
        assert card["evaluation"] == release.Release(Path("OUT"), 0).evaluation
        assert card["faults"] == [*release.FAULTS]

    def test_every_command_uses_it(self, needs_simulator, tmp_path, monkeypatch, capsys) -> None:
        monkeypatch.chdir(tmp_path)
        write_mp4(tmp_path / "film.mp4", np.zeros((17, 64, 64, 3), np.uint8) + 90, 8)
        few = ["--steps", "2"]
        for command in (
            ["sample", "--class", "basic", "--out", "a.mp4", *few],
            ["sample", "--text", "walking in a maze", "--first-frames", "film.mp4", "--out", "b.mp4", *few],
            ["extend", "--video", "a.mp4", "--frames", "29", "--out", "c.mp4", *few],
            ["upscale", "--video", "a.mp4", "--out", "d.mp4", *few],
            ["encode", "--video", "a.mp4", "--out", "e.safetensors"],
            ["decode", "--latents", "e.safetensors", "--out", "f.mp4"],
            ["evaluate", "--data", "film.mp4"],
            ["info", "tiny-doom"],
        ):
            assert main(command) == 0, capsys.readouterr().err
        shapes = [read_video(f"{name}.mp4").shape[:3] for name in "abcdf"]
        assert shapes == [(17, 64, 64), (17, 64, 64), (29, 64, 64), (17, 128, 128), (17, 64, 64)]

    def test_in_python(self) -> None:
        clips = walt.WaltPipeline.from_pretrained("tiny-doom").generate("basic", 2, steps=1, progress=False)
        assert clips.shape == (2, 17, 64, 64, 3)


def held_out(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The held-out clips of the release, uint8 [N, T, H, W, 3] at the base model's size, and their classes."""
    clips = ClipSet(0, release.CLIPS, release.HELD_OUT, release.FRAMES, 2 * release.SIZE, release.SCENARIOS)
    shape = {name: getattr(clips, name) for name in ("scenarios", "frames", "size", "seed")}
    store = write_store(folder, held_out_clips(clips.clips, clips.held_out, **shape), 1)
    return clips.read(store, size=release.SIZE), np.array([item.label for item in store.items])
