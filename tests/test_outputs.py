"""What the commands write: at the rate of the clip, to a place that was tried before the work, and never lost."""

from __future__ import annotations

import shutil
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import fails
from safetensors.torch import load_file, save_file
from tiny_runs import fit, make, moving, write_films

from walt.checkpoint import write_tensors
from walt.cli import main
from walt.commands import sample
from walt.data.video import (
    check_output,
    check_size,
    frame_rate,
    keeping,
    read_image,
    read_video,
    write_gif,
    write_mp4,
    write_png,
)
from walt.demo.config import DemoConfig
from walt.demo.demo import Demo
from walt.errors import WaltError
from walt.sample import codec
from walt.sample.pipeline import WaltPipeline

av = pytest.importorskip("av", reason="PyAV is not installed")
image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

NTSC = Fraction(30000, 1001)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Trained on films of 8 frames a second; classes and first frames; one stage of super-resolution."""
    films = write_films(tmp_path_factory.mktemp("films") / "films")
    out = tmp_path_factory.mktemp("model") / "run"
    fit("tokenizer", films, out)
    fit("base", films, out, "data.frames=9", "transformer.frame_condition=true")
    fit("sr1", films, out, "data.frames=9", "data.height=32", "data.width=32", "transformer.patch=2")
    return out


@pytest.fixture
def unused(monkeypatch):
    """The model is not even read."""

    def refuse(*_, **__):
        raise AssertionError("the model is read")

    monkeypatch.setattr(WaltPipeline, "from_pretrained", refuse)
    monkeypatch.setattr("walt.commands.model.load_tokenizer", refuse)


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def rate(path: Path) -> Fraction:
    with av.open(str(path)) as container:
        return container.streams.video[0].average_rate


def film(path: Path, fps: float, frames: int = 9, size: int = 16) -> Path:
    write_mp4(path, moving(1, frames, size, size), fps)
    return path


class TestRate:
    @pytest.mark.parametrize("fps", [24, float(NTSC), 12.5, 1])
    def test_latents(self, model, tmp_path, capsys, fps):
        source = film(tmp_path / "a.mp4", fps)
        run("encode", "--from", model, "--video", source, "--out", tmp_path / "a.safetensors")
        run("decode", "--from", model, "--latents", tmp_path / "a.safetensors", "--out", tmp_path / "b.mp4")
        assert rate(source) == rate(tmp_path / "b.mp4") == Fraction(fps).limit_denominator(1001)
        assert f"9 frames of 16x16, {fps:g} a second" in capsys.readouterr().out

    def test_extend_and_upscale(self, model, tmp_path, capsys):
        source = film(tmp_path / "a.mp4", NTSC)
        options = ("--from", model, "--steps", 1, "--video")
        run("extend", *options, source, "--frames", 13, "--out", tmp_path / "b.mp4")
        assert "9 -> 13 frames, 29.97 a second" in capsys.readouterr().out
        run("upscale", *options, tmp_path / "b.mp4", "--out", tmp_path / "c.mp4")
        assert rate(tmp_path / "b.mp4") == rate(tmp_path / "c.mp4") == NTSC

    def test_sample(self, model, tmp_path):
        """The training data's; that of the given frames, if there are several. A picture has none."""
        write_png(tmp_path / "a.png", moving(0, 1)[0])
        source = ("sample", "--from", model, "--steps", 1, "--class", "up", "--out", tmp_path / "b.mp4")
        first = ("--first-frames", film(tmp_path / "a.mp4", 24))
        for more, expected in (
            (("--first-frames", tmp_path / "a.png"), 8),
            (first, 8),
            ((*first, "--given", 5), 24),
            ((*first, "--given", 5, "--fps", "30000/1001"), NTSC),
        ):
            run(*source, *more)
            assert rate(tmp_path / "b.mp4") == expected

    def test_that_is_asked_for(self, model, tmp_path):
        source = film(tmp_path / "a.mp4", 24)
        run("encode", "--from", model, "--video", source, "--out", tmp_path / "a.safetensors")
        for name, more in (
            ("extend", ("--video", source, "--frames", 13, "--steps", 1)),
            ("upscale", ("--video", source, "--steps", 1)),
            ("decode", ("--latents", tmp_path / "a.safetensors")),
        ):
            run(name, "--from", model, *more, "--fps", "12.5", "--out", tmp_path / "b.mp4")
            assert rate(tmp_path / "b.mp4") == Fraction(25, 2)

    def test_latents_without_one(self, model, tmp_path):
        """As of pictures, and of files from before it was written: that of the clips of training."""
        write_png(tmp_path / "a.png", moving(0, 1, 16, 16)[0])
        run("encode", "--from", model, "--video", tmp_path / "a.png", "--out", tmp_path / "picture.safetensors")
        save_file({"latent": torch.zeros(1, 4, 3, 2, 2)}, tmp_path / "old.safetensors")
        shutil.copytree(model / "tokenizer", tmp_path / "alone" / "tokenizer")
        for source in (model, tmp_path / "alone"):
            for name in ("picture", "old"):
                latents = ("--latents", tmp_path / f"{name}.safetensors")
                run("decode", "--from", source, *latents, "--out", tmp_path / "b.mp4")
                assert rate(tmp_path / "b.mp4") == 8

    def test_that_is_none(self, model, tmp_path, capsys):
        for text, message in (("fast", "'fast'"), ("nan", "nan"), ("-24.0", "-24.0"), ("1e9", "1000000000.0")):
            write_tensors(tmp_path / "a.safetensors", {"latent": torch.zeros(1, 4, 3, 2, 2)}, {"fps": text})
            decode = ("decode", "--from", model, "--latents", tmp_path / "a.safetensors", "--out", tmp_path / "b.mp4")
            assert message in fails(capsys, *decode)
        for text, message in (
            ("0", "0 must be from 0.001 to 1000"),
            ("24/0", "'24/0' is not a number"),
            ("PAL", "'PAL' is not a number"),
        ):
            assert message in fails(capsys, *decode, "--fps", text)
        assert "5000 must be from 0.001 to 1000" in fails(capsys, *decode, "--fps", 5000)
        assert not (tmp_path / "b.mp4").exists()

    @pytest.mark.parametrize(("fps", "stride", "expected"), [(float(NTSC), 1, NTSC), (24, 5, 4.8), (0.5, 1, 0.5)])
    def test_of_the_training_data(self, tmp_path, fps, stride, expected):
        (tmp_path / "data").mkdir()
        film(tmp_path / "data" / "a.mp4", fps)
        run = make("base", tmp_path / "data", tmp_path / "run", f"data.stride={stride}")
        assert run.clip.fps == pytest.approx(float(expected), rel=1e-6)

    @pytest.mark.parametrize("fps", [24, 30, 8, 60, 0.5])
    def test_gif(self, tmp_path, fps):
        """Within a tick of its clock, a hundredth of a second, on the whole; browsers show 50 a second at most."""
        write_gif(tmp_path / "a.gif", np.random.default_rng(0).integers(0, 256, (25, 8, 8, 3), np.uint8), fps)
        with image.open(tmp_path / "a.gif") as picture:
            durations = []
            for i in range(picture.n_frames):
                picture.seek(i)
                durations.append(picture.info["duration"])
        assert len(durations) == 25
        assert min(durations) >= 20
        assert sum(durations) == pytest.approx(25_000 / min(fps, 50), abs=10)
        assert frame_rate(tmp_path / "a.gif") == pytest.approx(min(fps, 50), rel=0.01)


class TestBeforeTheWork:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("a.txt", "must end in"),
            ("a", "must end in"),
            (".mp4", "must end in"),
            ("folder.mp4", "it is a folder"),
            ("file/a.mp4", "Not a directory"),
            ("file/new/a.mp4", "Not a directory"),
            ("x" * 300 + ".mp4", "File name too long"),
            ("/proc/nowhere/a.mp4", "No such file or directory"),
        ],
    )
    @pytest.mark.parametrize("command", ["sample", "extend", "upscale", "decode"])
    def test_places(self, unused, tmp_path, capsys, command, name, message):
        (tmp_path / "folder.mp4").mkdir()
        (tmp_path / "file").write_text("")
        more = {"sample": (), "decode": ("--latents", tmp_path)}.get(command, ("--video", tmp_path))
        line = fails(capsys, command, "--from", tmp_path, *more, "--out", tmp_path / name)
        assert "cannot write" in line
        assert message in line
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.mp4"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("extend", "--text", "a", "--text", "b"), "--text: given again; expected one, for the one video"),
            (("upscale", "--class", "a", "--class", "a", "--class", ""), "--class: given again; expected one"),
            (
                ("sample", "--class", "a", "--class", "b", "--class", "a", "--num", 2),
                "--class: given 3 times; expected 2 at most (--num)",
            ),
            (
                ("sample", "--text", "", "--text", "", "--class", "a", "--num", 1),
                "--text: given 2 times; expected 1",
            ),
            (("sample", "--out", "s.png"), "s.png: pictures are made with --images, clips are .mp4 or .gif"),
            (("sample", "--out", "S.PNG", "--num", 4), "S.PNG: pictures are made with --images"),
        ],
    )
    def test_options_that_do_not_fit(self, unused, tmp_path, capsys, arguments, message):
        command, *more = arguments
        video = () if command == "sample" else ("--video", tmp_path)
        assert message in fails(capsys, command, "--from", tmp_path, *video, *more)

    def test_places_of_other_files(self, unused, tmp_path, capsys):
        (tmp_path / "folder.png").mkdir()
        (tmp_path / "folder.safetensors").mkdir()
        source = ("--from", tmp_path)
        line = fails(capsys, "sample", *source, "--images", "--out", tmp_path / "folder.png")
        assert line.endswith("it is a folder")
        line = fails(capsys, "encode", *source, "--video", "a.mp4", "--out", tmp_path / "folder.safetensors")
        assert line.endswith("it is a folder")
        line = fails(capsys, "evaluate", *source, "--data", tmp_path, "--json", tmp_path / "folder.png")
        assert line.endswith("it is a folder")

    def test_capitals_new_folders_and_files_that_are_there(self, model, tmp_path):
        source = ("sample", "--from", model, "--steps", 1, "--class", "up", "--out")
        (tmp_path / "B.GIF").write_text("old")
        run(*source, tmp_path / "new" / "folder" / "A.MP4")
        run(*source, tmp_path / "B.GIF")
        run(*source, tmp_path / "C.PNG", "--images")
        assert len(read_video(tmp_path / "new" / "folder" / "A.MP4")) == len(read_video(tmp_path / "B.GIF")) == 9
        run("encode", "--from", model, "--video", tmp_path / "B.GIF", "--out", tmp_path / "D.SAFETENSORS")
        assert load_file(tmp_path / "D.SAFETENSORS")["latent"].shape == (1, 4, 3, 2, 2)

    @pytest.mark.parametrize("suffix", [".mp4", ".gif"])
    def test_sizes_are_those_that_formats_take(self, tmp_path, suffix):
        """The largest is written; one more is refused by the same words before the work and in writing."""
        write = {".mp4": write_mp4, ".gif": write_gif}[suffix]
        side = {".mp4": 16384, ".gif": 65535}[suffix]
        path = tmp_path / f"a{suffix}"
        for shape in ((2, side), (side, 2)):
            write(path, np.zeros((1, *shape, 3), np.uint8))
            check_size(path, *shape)
        message = rf"a{suffix}: it would have 2x{side + 1} pixels; {suffix} takes at most {side} a side"
        with pytest.raises(WaltError, match=message):
            check_size(path, 2, side + 1)
        with pytest.raises(WaltError, match=message):
            write(path, np.zeros((1, 2, side + 1, 3), np.uint8))

    def test_grids(self, model, tmp_path, capsys, monkeypatch):
        """As square as can be: 4096 clips are 64 in a row. What is too large even so is refused before sampling."""
        source = ("sample", "--from", model, "--steps", 1, "--out")
        run(*source, tmp_path / "a.mp4", "--num", 23)
        assert read_video(tmp_path / "a.mp4").shape == (9, 5 * 18 + 2, 5 * 18 + 2, 3)
        run(*source, tmp_path / "a.png", "--num", 9, "--images")
        assert read_image(tmp_path / "a.png").shape == (2 * 18 + 2, 8 * 18 + 2, 3)
        capsys.readouterr()
        monkeypatch.setattr(WaltPipeline, "generate", lambda *_, **__: pytest.fail("it samples"))
        line = fails(capsys, *source, tmp_path / "b.mp4", "--num", 910 * 910 + 1)
        assert "it would have 16382x16400 pixels; .mp4 takes at most 16384 a side" in line
        for num, pixels in ((100_000_000, "180002x180002"), (744 * 744, "13394x13394")):
            line = fails(capsys, *source, tmp_path / "b.png", "--num", num, "--images")
            assert f"it would have {pixels} pixels; viewers take a .png of at most" in line

    def test_sizes_of_upscaled_and_decoded(self, model, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(check_size.__globals__["SIDES"], ".mp4", 24)
        monkeypatch.setattr(WaltPipeline, "upscale", lambda *_, **__: pytest.fail("it samples"))
        monkeypatch.setattr(codec, "decode_pieces", lambda *_, **__: pytest.fail("it decodes"))
        source = film(tmp_path / "a.mp4", 8)
        line = fails(capsys, "upscale", "--from", model, "--video", source, "--out", tmp_path / "b.mp4")
        assert "32x32 pixels; .mp4 takes at most 24 a side" in line
        save_file({"latent": torch.zeros(1, 4, 1, 2, 4)}, tmp_path / "a.safetensors")
        decode = ("decode", "--from", model, "--latents", tmp_path / "a.safetensors", "--out", tmp_path / "b.mp4")
        assert "16x32 pixels; .mp4 takes at most 24 a side" in fails(capsys, *decode)

    def test_a_demo_whose_videos_would_be_too_large(self, tmp_path):
        with pytest.raises(WaltError, match=r"tokenizer.mp4: it would have .*x16402 pixels"):
            Demo(DemoConfig(size=1024, scenarios=("basic",) * 7), tmp_path)
        with pytest.raises(WaltError, match="cannot write"):
            check_output(tmp_path / "a.webm")


class TestAfterTheWork:
    @pytest.mark.parametrize(
        ("command", "error"),
        [
            ("sample", WaltError("cannot write a.mp4: No space left")),
            ("extend", MemoryError()),
            ("upscale", ValueError("the codec's")),
        ],
    )
    def test_samples_are_kept(self, model, tmp_path, capsys, monkeypatch, command, error):
        made = moving(0, 13, 16, 16)
        monkeypatch.setattr(WaltPipeline, {"sample": "generate"}.get(command, command), lambda *_, **__: made[None])

        def broken(*_, **__):
            raise error

        monkeypatch.setattr(sample, "write_video", broken)
        video = ("--class", "up") if command == "sample" else ("--video", film(tmp_path / "film.mp4", 8))
        out = tmp_path / "a.mp4"
        line = fails(capsys, command, "--from", model, *video, "--out", out)
        assert f"cannot write {'a.mp4' if isinstance(error, WaltError) else out}: " in line
        assert line.endswith(f"; the samples, uint8 [1, 13, 16, 16, 3], are kept in {out}.npy")
        assert np.array_equal(np.load(f"{out}.npy"), made[None])
        assert not out.exists()

    def test_where_there_is_room(self, tmp_path, monkeypatch):
        """Beside the output, or else in the folder for temporary files; where there is none, the error is as it was."""
        samples = np.ones((2, 3), np.uint8)
        monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
        out, error = tmp_path / "out" / "a.mp4", WaltError("cannot write it")
        (tmp_path / "out").write_text("in the way")
        message = r"cannot write it; the samples, uint8 \[2, 3\], are kept in .*temporary/a\.mp4\.npy"
        with pytest.raises(WaltError, match=message), keeping(samples, out):
            raise error
        assert np.array_equal(np.load(tmp_path / "temporary" / "a.mp4.npy"), samples)
        monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "out"))
        with pytest.raises(WaltError, match=r"^cannot write it$"), keeping(samples, out):
            raise error

    def test_a_name_that_is_free(self, tmp_path, monkeypatch):
        """No other file is lost, be it another run's samples or what a link leads to."""
        (tmp_path / "a.mp4.npy").write_text("the first run's")
        (tmp_path / "a.mp4.1.npy").symlink_to(tmp_path / "elsewhere")
        for number in (2, 3):
            kept = rf"kept in .*a\.mp4\.{number}\.npy$"
            with pytest.raises(WaltError, match=kept), keeping(np.ones(number), tmp_path / "a.mp4"):
                raise MemoryError
            assert np.array_equal(np.load(tmp_path / f"a.mp4.{number}.npy"), np.ones(number))
        assert (tmp_path / "a.mp4.npy").read_text() == "the first run's"
        assert not (tmp_path / "elsewhere").exists()

    def test_a_long_name_and_a_new_folder(self, tmp_path):
        out = tmp_path / "new" / ("é" * 125 + ".mp4")  # as long as a name may be
        with pytest.raises(WaltError, match=rf"kept in {tmp_path}/new/é+.*\.npy$"), keeping(np.ones(2), out):
            raise MemoryError

    def test_nothing_is_left_of_samples_that_do_not_fit(self, tmp_path, monkeypatch):
        def half(file, _):
            file.write(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(np, "save", half)
        monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
        with pytest.raises(MemoryError), keeping(np.ones(2), tmp_path / "a.mp4"):
            raise MemoryError
        assert list(tmp_path.iterdir()) == []
