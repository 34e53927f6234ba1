"""The commands on a small trained model: what they write, and that on bad input they write nothing."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
import torch
from command_line import fails
from safetensors.torch import load_file, save_file
from tiny_runs import fit, make, moving

from walt.cli import main
from walt.commands import evaluate
from walt.commands.sample import chunks_for
from walt.commands.train import next_commands
from walt.data.pixels import shrink, to_model, to_pixels
from walt.data.video import read_image, read_video, tile, write_mp4, write_png
from walt.pretrained import load_tokenizer
from walt.sample.pipeline import WaltPipeline

pytest.importorskip("av", reason="PyAV is not installed")


@pytest.fixture(scope="module")
def model(films, tmp_path_factory):
    """Classes and first frames, no text; one stage of super-resolution."""
    out = tmp_path_factory.mktemp("model") / "run"
    fit("tokenizer", films, out)
    fit("base", films, out, "transformer.frame_condition=true")
    fit("sr1", films, out, "data.height=32", "data.width=32", "transformer.patch=2")
    return out


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def left(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestSample:
    def test_classes(self, model, tmp_path, capsys):
        source = ("sample", "--from", model, "--steps", 1)
        run(*source, "--out", tmp_path / "each.mp4")
        assert read_video(tmp_path / "each.mp4").shape == (5, 16 + 4, 2 * 18 + 2, 3)
        assert "each.mp4: a grid of 2 clips of down, up" in capsys.readouterr().out
        run(*source, "--class", "up", "--out", tmp_path / "one.gif")
        assert "1 clip of up" in capsys.readouterr().out
        run(*source, "--class", "1", "--num", 2, "--images", "--out", tmp_path / "two.png")
        assert read_image(tmp_path / "two.png").shape == (16 + 4, 2 * 18 + 2, 3)
        assert "2 pictures of 1" in capsys.readouterr().out

    def test_a_file_for_each(self, model, tmp_path, capsys):
        """What is in the grid, and in a model's own size."""
        source = ("sample", "--from", model, "--steps", 1, "--num", 2)
        run(*source, "--out", tmp_path / "a.gif", "--separate")
        assert f"{tmp_path}/a-1.gif to {tmp_path}/a-2.gif: 2 clips of down, up\n" in capsys.readouterr().out
        run(*source, "--out", tmp_path / "b.png", "--images")
        run(*source, "--out", tmp_path / "b.png", "--images", "--separate")
        assert left(tmp_path) == ["a-1.gif", "a-2.gif", "b-1.png", "b-2.png", "b.png"]
        assert read_video(tmp_path / "a-2.gif").shape == (5, 16, 16, 3)
        pictures = [read_image(tmp_path / f"b-{i}.png") for i in (1, 2)]
        assert np.array_equal(tile(np.stack(pictures)[:, None], 2)[0], read_image(tmp_path / "b.png"))

    def test_a_grid_for_first_frames_is_noticed(self, model, tmp_path, capsys):
        source = ("sample", "--from", model, "--steps", 1)
        run(*source, "--num", 2, "--out", tmp_path / "grid.mp4")
        run(*source, "--num", 1, "--out", tmp_path / "one.mp4")
        capsys.readouterr()
        run(*source, "--class", "up", "--first-frames", tmp_path / "one.mp4", "--out", tmp_path / "a.mp4")
        assert capsys.readouterr().err == ""
        grid = tmp_path / "grid.mp4"
        run(*source, "--class", "up", "--first-frames", grid, "--out", tmp_path / "a.mp4")
        warning = f"walt: warning: {grid} looks like a grid with place for 2; walt sample --separate writes"
        told, cut = capsys.readouterr().err.splitlines()
        assert told.startswith(warning)
        assert cut == f"{grid}: the middle 20x20 of its 20x38 pixels is taken"
        for command in ("extend", "upscale"):
            assert main([command, "--from", str(model), "--video", str(grid), "--out", str(tmp_path / "b.mp4")]) == 2
            assert warning in capsys.readouterr().err

    @pytest.mark.parametrize("kind", ["film.mp4", "picture.png"])
    def test_from_first_frames(self, model, tmp_path, kind, monkeypatch):
        """They reach the pipeline at the model's size: covered by the picture, the middle of it."""
        picture = moving(0, 1, 48, 96)[0]
        path = tmp_path / kind
        if kind == "picture.png":
            write_png(path, picture)
        else:
            write_mp4(path, np.stack([picture] * 5))
        seen = {}
        generate = WaltPipeline.generate

        def spy(self, *arguments, **options):
            seen.update(options)
            return generate(self, *arguments, **options)

        monkeypatch.setattr(WaltPipeline, "generate", spy)
        source = ("sample", "--from", model, "--steps", 1, "--out", tmp_path / "a.mp4")
        run(*source, "--class", "up", "--first-frames", path)
        assert seen["frames"].shape == (1, 16, 16, 3)
        expected = shrink(picture[None, :, 24:72], 16, 16)[0].astype(float)
        error = np.abs(seen["frames"][0] - expected).mean()
        assert error < (1 if kind == "picture.png" else 10)  # grey levels; the codec shares colours between pixels
        assert read_video(tmp_path / "a.mp4").shape == (5, 16, 16, 3)

    def test_bad_input(self, model, films, tmp_path, capsys):
        source = ("sample", "--from", model, "--steps", 1)
        film, picture = films / "up/0.mp4", tmp_path / "picture.png"
        write_png(picture, moving(0, 1)[0])
        write_png(tmp_path / "strip.png", np.zeros((1, 4000, 3), np.uint8))
        for arguments, message in (
            (
                ["--first-frames", tmp_path / "strip.png"],
                "strip.png: so oblong that it would be over 16 times 16x16 to cover that",
            ),
            (["--class", "chess"], "unknown class 'chess'; the classes are down, up"),
            (["--class", "2"], "unknown class '2'"),
            (["--text", "a cat"], "text: the model was trained without text"),
            (["--out", tmp_path / "x.txt"], "must end in .mp4 or .gif"),
            (["--images"], "must end in .png"),
            (["--first-frames", tmp_path / "none.mp4"], "no such video"),
            (["--first-frames", tmp_path / "none.png"], "no such image"),
            (["--first-frames", picture, "--given", 5], "picture.png is a single picture"),
            (["--first-frames", film, "--given", 5], "frames: got"),
            (["--guidance", "0"], "0 must be above 0"),
            (["--device", "abacus"], "--device abacus: "),
        ):
            line = fails(capsys, *source, "--out", tmp_path / "a.mp4", *arguments)
            assert message in line, line
        assert "no such folder: " in fails(capsys, "sample", "--from", tmp_path / "nowhere")
        line = fails(capsys, "sample", "--from", tmp_path)
        assert line.endswith(f"/tokenizer; run walt train tokenizer --out {tmp_path} first")
        assert f"{film} is a file; expected a folder" in fails(capsys, "sample", "--from", film)
        (tmp_path / "file").write_text("")
        assert "cannot write" in fails(capsys, *source, "--out", tmp_path / "file" / "x.gif")
        assert left(tmp_path) == ["file", "picture.png", "strip.png"]

    def test_a_stage_given_for_the_run(self, model, films, tmp_path, capsys):
        stage = model / "tokenizer"
        for command in (
            ("sample", "--from", stage),
            ("encode", "--from", stage, "--video", films / "up/0.mp4", "--out", tmp_path / "a.safetensors"),
            ("train", "base", "--data", films, "--out", stage),
        ):
            assert fails(capsys, *command).endswith(f"{stage} is a stage of a run; give the run's folder, {model}")

    def test_foreign_checkpoint(self, capsys, tmp_path):
        (tmp_path / "tokenizer").mkdir()
        (tmp_path / "tokenizer" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
        line = fails(capsys, "sample", "--from", tmp_path, "--out", tmp_path / "x.mp4")
        assert "config.json is not that of a checkpoint" in line


class TestExtendAndUpscale:
    def clip(self, path, frames: int, size: int = 16):
        write_mp4(path, moving(1, frames, size, size))
        return path

    @pytest.mark.parametrize(("frames", "wanted", "made"), [(5, 13, 13), (5, 6, 9), (1, 9, 9), (9, 12, 13)])
    def test_extend(self, model, tmp_path, capsys, frames, wanted, made):
        film = self.clip(tmp_path / "film.mp4", frames)
        arguments = ["--video", film, "--frames", wanted, "--steps", 1, "--out", tmp_path / "long.mp4"]
        run("extend", "--from", model, *arguments)
        assert read_video(tmp_path / "long.mp4").shape == (made, 16, 16, 3)
        assert f"{frames} -> {made} frames" in capsys.readouterr().out

    def test_extend_by_five_frames(self):
        """The numbers of the paper: 17 -> 29 -> 41 frames."""
        assert [chunks_for(frames, 17) for frames in (0, 1, 12, 13, 24, 25)] == [0, 1, 1, 2, 2, 3]
        assert [chunks_for(frames, 5) for frames in (1, 4, 5)] == [1, 1, 2]

    def test_upscale(self, model, tmp_path, capsys):
        film = self.clip(tmp_path / "film.mp4", 9)
        run("upscale", "--from", model, "--video", film, "--steps", 1, "--out", tmp_path / "large.mp4")
        assert read_video(tmp_path / "large.mp4").shape == (9, 32, 32, 3)
        assert "16x16 -> 32x32 pixels" in capsys.readouterr().out

    def test_bad_input(self, model, films, tmp_path, capsys):
        film = self.clip(tmp_path / "film.mp4", 5)
        long = ("extend", "--from", model, "--out", tmp_path / "x.mp4", "--video")
        assert "--frames 5: " in fails(capsys, *long, film, "--frames", 5)
        assert "has frames of 64x64 pixels; the model takes 16x16" in fails(capsys, *long, films / "up/0.mp4")
        assert "no such video" in fails(capsys, *long, tmp_path / "none.mp4")
        assert fails(capsys, "sample", "--from", model.parent).endswith(f"; did you mean {model}?")
        assert "text: the model was trained without text" in fails(capsys, *long, film, "--text", "a cat")
        large = ("upscale", "--from", model, "--out", tmp_path / "x.mp4", "--video")
        assert "has frames of 64x64 pixels; the model takes 16x16" in fails(capsys, *large, films / "up/0.mp4")
        assert "stages: got 2; expected 1 to 1" in fails(capsys, *large, film, "--stages", 2)
        assert "must end in .mp4 or .gif" in fails(capsys, *large, film, "--out", tmp_path / "x.png")
        assert left(tmp_path) == ["film.mp4"]

    def test_the_commands_after_a_cascade(self, model, films, tmp_path, monkeypatch):
        """They run, one after the other."""
        monkeypatch.chdir(tmp_path)
        commands = [*next_commands(make("sr1", films, model, "data.height=32", "data.width=32"), films)]
        for _walt, *command in commands:
            run(*command, "--steps", 1)
        assert read_video(tmp_path / "large.mp4").shape == (5, 32, 32, 3)
        (command,) = next_commands(make("sr1", films, tmp_path, "data.height=32", "data.width=48"), films)
        assert shlex.join(map(str, command)).endswith("--size 16x24 --frames 5")  # there is no base model yet


class TestLatents:
    def test_round_trip(self, model, films, tmp_path, capsys):
        """Through files, what the tokenizer itself gives: exact for latents, and so for pixels before the codec."""
        tokenizer, film = load_tokenizer(model / "tokenizer"), read_video(films / "up/0.mp4")
        run("encode", "--from", model, "--video", films / "up/0.mp4", "--out", tmp_path / "a.safetensors")
        assert "9 frames of 64x64 -> latent [1, 4, 3, 8, 8]" in capsys.readouterr().out
        latent = load_file(tmp_path / "a.safetensors")["latent"]
        with torch.inference_mode():
            torch.testing.assert_close(latent, tokenizer.encode(to_model(film[None])), atol=1e-5, rtol=1e-5)
            expected = to_pixels(tokenizer.decode(latent))[0]
        run("decode", "--from", model, "--latents", tmp_path / "a.safetensors", "--out", tmp_path / "b.mp4")
        write_mp4(tmp_path / "expected.mp4", expected, fps=8)  # the film's, on which the codec's choices depend
        difference = np.abs(read_video(tmp_path / "b.mp4").astype(int) - read_video(tmp_path / "expected.mp4"))
        # One grey level of rounding before the codec, which may choose otherwise for a block.
        assert np.quantile(difference, 0.99) <= 2

    def test_edges_and_last_frames_are_cut(self, model, tmp_path, capsys):
        write_mp4(tmp_path / "film.mp4", moving(0, 8, 30, 42))
        run("encode", "--from", model, "--video", tmp_path / "film.mp4", "--out", tmp_path / "a.safetensors")
        told = "5 frames of 24x40 (cut from 8 of 30x42: 1 + 4k, multiples of 8) -> latent [1, 4, 2, 3, 5]"
        assert told in capsys.readouterr().out

    def test_picture_and_tiles(self, model, tmp_path):
        write_png(tmp_path / "a.png", moving(0, 1, 64, 96)[0])
        source = ("encode", "--from", model, "--video", tmp_path / "a.png")
        run(*source, "--out", tmp_path / "whole.safetensors")
        run(*source, "--out", tmp_path / "tiles.safetensors", "--tile", "32x48")
        run(*source, "--out", tmp_path / "one.safetensors", "--tile", "64x96")
        whole, tiles, one = (
            load_file(tmp_path / f"{name}.safetensors")["latent"] for name in ("whole", "tiles", "one")
        )
        assert whole.shape == tiles.shape == (1, 4, 1, 8, 12)
        assert torch.equal(one, whole)
        assert not torch.equal(tiles, whole)  # tiles are an approximation
        run("decode", "--from", model, "--latents", tmp_path / "whole.safetensors", "--out", tmp_path / "b.mp4")
        assert read_video(tmp_path / "b.mp4").shape == (1, 64, 96, 3)

    def test_bad_input(self, model, tmp_path, capsys):
        write_mp4(tmp_path / "film.mp4", moving(0, 5))
        save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
        save_file({"latent": torch.ones(1, 3, 1, 2, 2)}, tmp_path / "three.safetensors")
        write_png(tmp_path / "small.png", np.zeros((4, 40, 3), np.uint8))
        (tmp_path / "text.safetensors").write_text("text")
        before = left(tmp_path)
        encode = ("encode", "--from", model, "--out", tmp_path / "a.safetensors", "--video")
        assert "no such video" in fails(capsys, *encode, tmp_path / "none.mp4")
        assert "4x40 pixels; expected at least 8x8" in fails(capsys, *encode, tmp_path / "small.png")
        assert "--tile: tile: got (20, 20)" in fails(capsys, *encode, tmp_path / "film.mp4", "--tile", 20)
        line = fails(capsys, *encode, tmp_path / "film.mp4", "--out", tmp_path / "a.pt")
        assert "must end in .safetensors" in line
        nowhere = ("encode", "--from", tmp_path / "nowhere", "--video", "x.mp4", "--out", tmp_path / "a.safetensors")
        assert "no such folder" in fails(capsys, *nowhere)
        decode = ("decode", "--from", model, "--out", tmp_path / "a.mp4", "--latents")
        assert "holds no tensor named latent" in fails(capsys, *decode, tmp_path / "other.safetensors")
        assert "expected floating point [B, 4, 1+k, h, w]" in fails(capsys, *decode, tmp_path / "three.safetensors")
        assert "text.safetensors is broken" in fails(capsys, *decode, tmp_path / "text.safetensors")
        assert "no such file: " in fails(capsys, *decode, tmp_path / "none.safetensors")
        assert left(tmp_path) == before


class Colours:
    """Mean colours as features, of clips or of frames."""

    def __init__(self, *_, **__) -> None:
        self.description = "mean colours"

    def __call__(self, clips: np.ndarray) -> np.ndarray:
        return clips.mean(axis=(1, 2, 3)).astype(np.float64)


class Frames(Colours):
    """Mean colours of frames."""

    def __call__(self, clips: np.ndarray) -> np.ndarray:
        return clips.mean(axis=(2, 3)).astype(np.float64)


class TestEvaluate:
    def test_tokenizer(self, model, films, tmp_path, capsys):
        arguments = ["--data", films, "--num", 3, "--json", tmp_path / "a.json"]
        run("evaluate", "--from", model, *arguments, "--frames", 5, "--size", 16)
        printed = capsys.readouterr().out
        assert "reconstructions: 3 real clips and 3 compared with them, 5 frames of 16x16 pixels" in printed
        assert "mean over 3 clips of 10 log10(255^2 / mean squared error)" in printed
        document = json.loads((tmp_path / "a.json").read_text())
        assert document.keys() == {"reconstructions"}
        assert 0 < document["reconstructions"]["values"]["psnr"] < 40
        assert f"{document['reconstructions']['values']['psnr']:.2f}" in printed

    def test_of_a_film(self, model, films, capsys):
        arguments = ["--data", films / "up/0.mp4", "--frames", 5, "--size", "16x24", "--metrics", "ssim"]
        run("evaluate", "--from", model, *arguments)
        captured = capsys.readouterr()
        assert "1 real clips and 1 compared with them, 5 frames of 16x24 pixels" in captured.out
        assert "warning: 1 of the 1 files with the real clips were trained on" in captured.err

    def test_at_the_rate_of_training(self, films, tmp_path, capsys):
        """Of 9 frames at 8 a second every second one is left."""
        fit("tokenizer", films, tmp_path / "run", "data.fps=4", "training.steps=1")
        for data in (films, films / "up/0.mp4"):
            run("evaluate", "--from", tmp_path / "run", "--data", data, "--frames", 5, "--size", 16)
            assert "5 frames of 16x16 pixels" in capsys.readouterr().out
            line = fails(capsys, "evaluate", "--from", tmp_path / "run", "--data", data, "--frames", 9, "--size", 16)
            assert "holds no clip of 9" in line or "has 5 frames; clips of 9 are wanted" in line

    def test_samples(self, model, films, monkeypatch, capsys):
        monkeypatch.setattr(evaluate, "VideoFeatures", Colours)
        seen = {}
        generate = WaltPipeline.generate

        def spy(self, label, num, **options):
            seen.update(label=label, num=num, **options)
            return generate(self, label, num, **options)

        monkeypatch.setattr(WaltPipeline, "generate", spy)
        arguments = ["--data", films, "--num", 4, "--metrics", "fvd", "psnr", "--steps", 1]
        run("evaluate", "--from", model, *arguments)
        printed = capsys.readouterr().out
        assert "samples: 4 real clips and 4 compared with them, 5 frames of 16x16 pixels" in printed
        assert "FVD" in printed
        assert "not comparable with published FVD" in printed
        assert "reconstructions: 4 real clips" in printed
        assert seen["label"] == [0, 0, 1, 1]  # the classes of the real clips

    def test_sets_beside_a_reference(self, model, films, tmp_path, monkeypatch, capsys):
        """Of frames along the components of the reference, for each set that was named; by class what is paired."""
        monkeypatch.setattr(evaluate, "FrameFeatures", Frames)
        sets = ("reconstructions", "samples", "untrained")
        options = [
            "--metrics",
            "psnr",
            "colour",
            "frechet_image_distance",
            "--of",
            *sets,
            "--reference",
            films,
            "--steps",
            3,
        ]
        run("evaluate", "--from", model, "--data", films, *options, "--json", tmp_path / "a.json")
        captured = capsys.readouterr()
        assert captured.err.count("warning: ") == 1  # of the real clips; a reference is of the training
        document = json.loads((tmp_path / "a.json").read_text())
        assert document.keys() == {"reference", *sets}
        distances = {name: result["values"]["frechet_image_distance"] for name, result in document.items()}
        assert distances["reference"] == pytest.approx(0, abs=1e-6)  # the same clips
        assert len({distances[name] for name in sets}) == 3
        assert all(distances[name] > 1 for name in sets)
        assert document["reconstructions"]["by_class"]["colour"].keys() == {"up", "down"}
        assert "first 3 principal components" in captured.out

    def test_the_untrained_model_is_another(self, model, films, tmp_path, monkeypatch):
        monkeypatch.setattr(evaluate, "FrameFeatures", Frames)
        options = ["--data", films, "--metrics", "frechet_image_distance", "--of", "untrained", "--steps", 3]
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            run("evaluate", "--from", model, *options, "--seed", seed, "--json", tmp_path / f"{name}.json")
        values = [json.loads((tmp_path / f"{name}.json").read_text())["untrained"]["values"] for name in "abc"]
        assert values[0] == values[1] != values[2]

    def test_classes_that_the_model_does_not_know(self, model, films, tmp_path, monkeypatch):
        """Their samples are made without a class."""
        monkeypatch.setattr(evaluate, "VideoFeatures", Colours)
        for name in ("other", "up"):
            (tmp_path / "data" / name).mkdir(parents=True)
            write_mp4(tmp_path / "data" / name / "a.mp4", moving(0, 5))
        arguments = ["--data", tmp_path / "data", "--metrics", "fvd", "--steps", 1]
        run("evaluate", "--from", model, *arguments, "--json", tmp_path / "a.json")
        assert json.loads((tmp_path / "a.json").read_text())["samples"]["fake"] == 2

    def test_bad_input(self, model, films, tmp_path, capsys):
        source = ("evaluate", "--from", model, "--json", tmp_path / "a.json", "--data")
        for arguments, message in (
            ([films, "--frames", 14], "got 14 frames; expected 1 + 4k, the nearest being 13 or 17"),
            ([films, "--frames", 5, "--size", 20], "height: got 20 pixels; expected a multiple of 8, such as 16 or 24"),
            ([films / "up/0.mp4", "--frames", 13], "0.mp4 has 9 frames; clips of 13 are wanted"),
            ([films, "--frames", 13, "--size", 16], "holds no clip of 13 frames"),
            ([films / "captions.jsonl"], "captions.jsonl is not a video"),
            ([tmp_path / "none"], "no such folder"),
            ([films, "--metrics", "beauty"], "--metrics: got 'beauty'; expected fvd or frechet_image_distance or"),
            ([films, "--num", 1, "--metrics", "frechet_image_distance", "--steps", 1], "expected at least 2"),
            ([films, "--of", "samples"], "--metrics psnr: it compares reconstructions or upscaled; name one"),
            ([films, "--of", "reconstructions", "untrained"], "--of untrained: psnr and ssim compare"),
            ([films, "--of", "dreams"], "--of: got 'dreams'; expected reconstructions or samples or untrained"),
            ([films, "--reference", films], "--reference: only frechet_image_distance takes one"),
        ):
            assert message in fails(capsys, *source, *arguments), arguments
        assert left(tmp_path) == []


class TestDoctorAndData:
    def test_demo_data_refuses_a_full_folder(self, films, capsys):
        assert "is there already; name another folder" in fails(capsys, "demo-data", "--out", films)

    def test_prepare(self, films, tmp_path, capsys):
        assert "no such folder" in fails(capsys, "prepare", "--data", tmp_path / "none", "--out", tmp_path / "a")
        captions = ("prepare", "--data", films, "--out", tmp_path / "a", "--captions", films / "up/0.mp4")
        assert "captions must be in a file that ends in .csv or .jsonl" in fails(capsys, *captions)
        small = ("prepare", "--data", films, "--out", tmp_path / "a", "--size", 65)
        assert "--size: height: got 65 pixels; expected a multiple of 8, such as 64 or 72" in fails(capsys, *small)
        assert "--fps: 0 must be from 0.001 to 1000" in fails(
            capsys, "prepare", "--data", films, "--out", "x", "--fps", 0
        )
        assert left(tmp_path) == []
