"""The commands on a small trained model: what they write, and that on bad input they write nothing."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from command_line import fails
from safetensors.torch import load_file, save_file
from tiny_runs import SHORT, TOKENIZER, TRANSFORMER, fit, make, moving

from walt.cli import main
from walt.commands import evaluate
from walt.commands.sample import chunks_for
from walt.commands.train import next_commands
from walt.data.pixels import shrink, to_model, to_pixels
from walt.data.video import read_image, read_video, write_mp4, write_png
from walt.pretrained import load_tokenizer
from walt.sample.pipeline import WaltPipeline
from walt.train.log import read_log

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


class TestTrain:
    def shared(self, films, out) -> list[str]:
        overrides = [f"--{text}" for text in (*TOKENIZER, *TRANSFORMER, *SHORT)]
        return ["--data", str(films), "--out", str(out), *overrides]

    def test_both_stages(self, films, tmp_path, capsys):
        shared = self.shared(films, tmp_path / "run")
        run("train", "tokenizer", "--steps", 1, *shared, "--batch", 2, "--seed", 5, "--data.images=0")
        printed = capsys.readouterr().out
        assert "data: 4 videos with 4 shots and 0 images, 36 frames, 2 classes, 4 captions" in printed
        assert f"{tmp_path / 'run' / 'tokenizer'}: 2 steps" in printed  # the last one counts
        (command,) = [line.removeprefix("next: walt ") for line in printed.splitlines() if line.startswith("next: ")]
        assert f"--out {tmp_path / 'run'} --size 16x16 --frames 5" in command
        config = tmp_path / "run" / "tokenizer.yaml"
        assert "seed: 5" in config.read_text()
        run(*shlex.split(command), "--config", config, "--training.lr=3e-4")
        assert WaltPipeline.from_pretrained(tmp_path / "run").classes == ("down", "up")
        assert "lr: 0.0003" in (tmp_path / "run" / "transformer.yaml").read_text()
        assert f"next: walt sample --from {tmp_path / 'run'} --num 1 --out sample.mp4\n" in capsys.readouterr().out

    def test_the_beginning_and_the_end_of_a_run(self, films, tmp_path, capsys):
        out = tmp_path / "a run"
        shared = [*self.shared(films, out), "--training.preview-every", "null", "--data.held-out", "0.3"]
        run("train", "tokenizer", *shared)
        captured = capsys.readouterr()
        (begun,) = [line for line in captured.err.splitlines() if line.startswith("train tokenizer: 0.")]
        assert " M parameters, float32 on cpu; batches of 4 samples of 5 frames, 16x16 pixels; steps 1 to 2; " in begun
        assert begun.endswith(f"log in {out}/tokenizer.jsonl")
        *_, ended, figure, picture, command = captured.out.splitlines()
        loss = read_log(out / "tokenizer.jsonl")[-1]["loss"]
        assert re.fullmatch(rf"{out}/tokenizer: 2 steps in \d+ s, loss {loss:.4g}; losses in .*/tokenizer.jsonl", ended)
        assert re.fullmatch(r"PSNR of \d (held-out|training) clips: \d+\.\d\d dB", figure)
        assert picture == f"picture: {out}/previews/tokenizer-0000002.mp4"
        assert command.startswith(f"next: walt train base --data {films} --out '{out}' --size 16x16 --frames 5")
        run("train", "tokenizer", *shared)
        again = capsys.readouterr()
        assert "train tokenizer: " not in again.err
        assert again.out.splitlines()[1:] == [
            f"{out}/tokenizer is finished; to train it further give more --steps, and --new-settings",
            *(ended, figure, picture, command),
        ]

    def test_the_commands_after_a_cascade(self, model, films, tmp_path, monkeypatch):
        """They run, one after the other."""
        monkeypatch.chdir(tmp_path)
        commands = [*next_commands(make("sr1", films, model, "data.height=32", "data.width=32"), films)]
        for _walt, *command in commands:
            run(*command, "--steps", 1)
        assert read_video(tmp_path / "large.mp4").shape == (5, 32, 32, 3)
        (command,) = next_commands(make("sr1", films, tmp_path, "data.height=32", "data.width=48"), films)
        assert shlex.join(map(str, command)).endswith("--size 16x24 --frames 5")  # there is no base model yet

    def test_on_a_prepared_folder(self, films, tmp_path, capsys):
        run("prepare", "--data", films, "--out", tmp_path / "prepared", "--size", "16x24")
        assert "4 videos with 4 shots and 0 images, 36 frames, 2 classes, 4 captions" in capsys.readouterr().out
        run("train", "tokenizer", *self.shared(tmp_path / "prepared", tmp_path / "run"))
        assert "data-16x16" not in left(tmp_path / "run")
        capsys.readouterr()
        source = shutil.copytree(films, tmp_path / "films")
        run("prepare", "--data", source, "--out", tmp_path / "again", "--size", 16)
        (source / "up/0.mp4").unlink()
        run("train", "tokenizer", *self.shared(tmp_path / "again", tmp_path / "c"))
        told = f"{source} has changed since {tmp_path}/again was prepared from it: 1 file fewer: up/0.mp4"
        assert capsys.readouterr().err.splitlines().count(told) == 1
        line = fails(
            capsys, "train", "tokenizer", *self.shared(tmp_path / "prepared", tmp_path / "b"), "--data.width=32"
        )
        assert "was prepared for 16x24 pixels; 16x32 are wanted: prepare it with --size 16x32" in line
        line = fails(
            capsys,
            *("train", "tokenizer", *self.shared(tmp_path / "prepared", tmp_path / "b")),
            *("--captions", films / "captions.jsonl"),
        )
        assert "is prepared already; give captions to walt prepare" in line
        assert not (tmp_path / "b").exists()

    def test_what_is_passed_over_is_told(self, films, tmp_path, capsys):
        """When the folder is prepared, trained on, and compared with; what is too short for a clip, too."""
        data = shutil.copytree(films, tmp_path / "data")
        write_mp4(data / "up" / "short.mp4", moving(0, 4))
        (data / "up" / "notes.txt").write_text("")
        other, short = (
            "passed over, unknown ending: 1 (up/notes.txt)",
            "passed over, no shot of 5 frames: 1 (up/short.mp4)",
        )
        run("prepare", "--data", data, "--out", tmp_path / "prepared", "--size", 16)
        printed = capsys.readouterr().err.splitlines()
        assert (printed.count(other), printed.count(short)) == (1, 0)
        for source in (data, tmp_path / "prepared"):
            out = tmp_path / f"run-{source.name}"
            run("train", "tokenizer", *self.shared(source, out), "--training.steps=1")
            printed = capsys.readouterr().err.splitlines()
            assert (printed.count(other), printed.count(short)) == (1, 1)
        run("evaluate", "--from", tmp_path / "run-data", "--data", tmp_path / "prepared", "--frames", 5, "--size", 16)
        printed = capsys.readouterr().err.splitlines()
        assert (printed.count(other), printed.count(short)) == (1, 1)

    def test_bad_input(self, films, tmp_path, capsys):
        out = tmp_path / "out"
        for stage, arguments, message in (
            ("tokenizer", ["--frames", 16], "1 + 4k, the nearest being 13 or 17"),
            ("tokenizer", ["--size", 60], "height: got 60 pixels; expected a multiple of 8, such as 56 or 64"),
            ("tokenizer", ["--size", "64x4"], "width: got 4 pixels; expected a multiple of 8, such as 8"),
            ("tokenizer", ["--preset", "huge"], "unknown preset 'huge'"),
            ("tokenizer", ["--data.colour=1"], "unknown option --data.colour"),
            ("tokenizer", ["--config", tmp_path / "none.yaml"], "cannot read"),
            ("tokenizer", ["--captions", tmp_path / "none.csv"], "cannot read"),
            ("tokenizer", ["--device", "abacus"], "--device abacus: "),
            ("base", [], f"no such checkpoint: {out}/tokenizer; run walt train tokenizer --out {out} first"),
            ("base", ["--preset", "tiny-sr"], "does not fit the stage base"),
            ("sr", ["--preset", "tiny"], "does not fit the stage sr1"),
            ("sr", ["--level", 3], "--level: got '3'; expected 1 or 2"),
        ):
            assert message in fails(capsys, "train", stage, "--data", films, "--out", out, *arguments)
            assert not out.exists(), (stage, arguments)
        missing = ("train", "tokenizer", "--data", tmp_path / "nowhere", "--out", out)
        assert "no such folder: " in fails(capsys, *missing)
        film = films / "up/0.mp4"
        line = fails(capsys, "train", "tokenizer", "--data", film, "--out", out)
        assert line.endswith(f"{film} is a file; expected a folder")
        (tmp_path / "empty").mkdir()
        assert "holds no video or image" in fails(
            capsys, "train", "tokenizer", "--data", tmp_path / "empty", "--out", out
        )
        assert not out.exists()

    def test_a_letter_named_mp4(self, capsys, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "letter.mp4").write_text("Dear reader,\n" * 50)
        line = fails(capsys, "train", "tokenizer", "--data", tmp_path / "data", "--out", tmp_path / "out")
        assert "none of its 1 videos and images can be used" in line
        assert not list((tmp_path / "out").glob("tokenizer*"))

    def test_out_is_a_file(self, films, capsys, tmp_path):
        (tmp_path / "out").write_text("")
        line = fails(capsys, "train", "tokenizer", *self.shared(films, tmp_path / "out"))
        assert "cannot write" in line


class TestSample:
    def test_classes(self, model, tmp_path, capsys):
        source = ("sample", "--from", model, "--steps", 1)
        run(*source, "--out", tmp_path / "each.mp4")
        assert read_video(tmp_path / "each.mp4").shape == (5, 16 + 4, 2 * 18 + 2, 3)
        assert "2 clips of down, up" in capsys.readouterr().out
        run(*source, "--class", "up", "--out", tmp_path / "one.gif")
        assert "1 clip of up" in capsys.readouterr().out
        run(*source, "--class", "1", "--num", 2, "--images", "--out", tmp_path / "two.png")
        assert read_image(tmp_path / "two.png").shape == (16 + 4, 2 * 18 + 2, 3)
        assert "2 pictures of 1" in capsys.readouterr().out

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
        assert "expected uint8 [T, 16, 16, 3]" in fails(capsys, *long, films / "up/0.mp4")
        assert "no such video" in fails(capsys, *long, tmp_path / "none.mp4")
        assert "text: the model was trained without text" in fails(capsys, *long, film, "--text", "a cat")
        large = ("upscale", "--from", model, "--out", tmp_path / "x.mp4", "--video")
        assert "expected uint8 [T, 16, 16, 3]" in fails(capsys, *large, films / "up/0.mp4")
        assert "stages: got 2; expected 1 to 1" in fails(capsys, *large, film, "--stages", 2)
        assert "must end in .mp4 or .gif" in fails(capsys, *large, film, "--out", tmp_path / "x.png")
        assert left(tmp_path) == ["film.mp4"]


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
        assert "5 frames (of 8: a clip has 1 + 4k) of 24x40 -> latent [1, 4, 2, 3, 5]" in capsys.readouterr().out

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
            ([films, "--of", "samples"], "--metrics psnr: it compares reconstructions; name them in --of, too"),
            ([films, "--of", "reconstructions", "untrained"], "--of untrained: psnr and ssim compare reconstructions"),
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

    def test_frame_rate(self, films, tmp_path, capsys):
        run("prepare", "--data", films, "--out", tmp_path / "four", "--size", 16, "--fps", 4)
        assert "4 videos with 4 shots and 0 images, 20 frames" in capsys.readouterr().out
        shared = ("tokenizer", *TestTrain().shared(tmp_path / "four", tmp_path / "run"))
        run("train", *shared, "--fps", 4)
        capsys.readouterr()
        assert "fps: 4.0" in (tmp_path / "run" / "tokenizer.yaml").read_text()
        assert "was prepared at 4 frames a second; 8 a second are wanted" in fails(capsys, "train", *shared, "--fps", 8)
