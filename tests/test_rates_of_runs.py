"""The frame rate that a run is trained at: known to evaluation, and told where stages differ."""

from __future__ import annotations

import shutil

import pytest
from command_line import fails
from tiny_runs import fit, moving

from walt.checkpoint import load_description
from walt.cli import main
from walt.data.prepare import prepare
from walt.data.video import write_mp4

pytest.importorskip("av", reason="PyAV is not installed")

OTHER = "(--fps takes films at one rate)"


@pytest.fixture(scope="module")
def prepared(films, tmp_path_factory):
    """The films, 9 frames at 8 a second, by the rate that they are prepared at: 0 is every frame."""
    folder = tmp_path_factory.mktemp("prepared")
    for fps in (0, 4, 8):
        prepare(films, folder / f"{fps}", height=16, width=16, fps=fps, progress=False, say=lambda line: None)
    return folder


def evaluate(model, data, frames: int) -> list[object]:
    return ["evaluate", "--from", model, "--data", data, "--frames", frames, "--size", 16, "--num", 2]


def told(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().err


class TestEvaluate:
    def test_trained_on_a_folder_prepared_at_a_rate(self, films, prepared, tmp_path, capsys):
        """Of 9 frames at 8 a second every second one is left, with data.fps or without."""
        fit("tokenizer", prepared / "4", tmp_path / "run", "training.steps=1")
        assert load_description(tmp_path / "run/tokenizer", "tokenizer")[1]["data"]["fps"] == 4
        for data in (films, films / "up/0.mp4", prepared / "4"):
            assert OTHER not in told(capsys, *evaluate(tmp_path / "run", data, 5))
            line = fails(capsys, *evaluate(tmp_path / "run", data, 9))
            assert "holds no clip of 9" in line or "has 5 frames; clips of 9 are wanted" in line
        for other in ("0", "8"):
            line = fails(capsys, *evaluate(tmp_path / "run", prepared / other, 5))
            assert "4 a second are wanted: prepare it with --fps 4" in line
        assert fit("tokenizer", prepared / "4", tmp_path / "run", "training.steps=1", "data.fps=4").step == 1

    def test_trained_on_every_frame(self, films, prepared, tmp_path, capsys):
        """A folder of another rate is refused where none is known, or where it is another."""
        fit("tokenizer", prepared / "0", tmp_path / "run", "training.steps=1")
        message = "4 was prepared at 4 frames a second, but"
        assert message in fails(capsys, *evaluate(tmp_path / "run", prepared / "4", 5))
        assert OTHER not in told(capsys, *evaluate(tmp_path / "run", prepared / "8", 5))
        fit("base", prepared / "0", tmp_path / "run", "training.steps=1")
        assert message in fails(capsys, *evaluate(tmp_path / "run", prepared / "4", 5))
        for same in (films, prepared / "0", prepared / "8"):
            assert OTHER not in told(capsys, *evaluate(tmp_path / "run", same, 9))

    def test_trained_with_a_stride(self, films, prepared, tmp_path, capsys):
        fit("tokenizer", prepared / "0", tmp_path / "run", "training.steps=1", "data.stride=2")
        for data in (films, films / "up/0.mp4", prepared / "0"):
            told(capsys, *evaluate(tmp_path / "run", data, 5))
            line = fails(capsys, *evaluate(tmp_path / "run", data, 9))
            assert "holds no clip of 9" in line or "has 9 frames; clips of 17 are wanted" in line

    def test_films_of_another_rate(self, films, prepared, tmp_path, capsys):
        """Every frame of both: nothing says which rate is meant."""
        fit("tokenizer", prepared / "4", tmp_path / "run", "training.steps=1")
        fit("base", prepared / "0", tmp_path / "run", "training.steps=1", "data.stride=2")
        capsys.readouterr()
        slow = tmp_path / "slow"
        slow.mkdir()
        write_mp4(slow / "a.mp4", moving(0, 12), fps=4)
        for data in (slow, slow / "a.mp4"):
            line = f"{data}: clips of 2 frames a second, but those of {tmp_path / 'run'} have 4 {OTHER}"
            assert line in told(capsys, *evaluate(tmp_path / "run", data, 5))

    def test_pictures_have_no_rate(self, prepared, tmp_path, capsys):
        fit("tokenizer", prepared / "0", tmp_path / "run", "training.steps=1", "data.frames=1")
        fit("base", prepared / "0", tmp_path / "run", "training.steps=1", "data.frames=1")
        for frames in (1, 5):
            assert OTHER not in told(capsys, *evaluate(tmp_path / "run", prepared / "4", frames))


class TestStages:
    @pytest.mark.parametrize(
        ("tokenizer", "base", "rates"),
        [
            ("4", "4", None),
            ("4", "8", (8, 4)),
            ("4", "0", (8, 4)),
            ("8", "0", None),
            ("0", "8", None),
            ("0", "4", (4, 8)),
        ],
    )
    def test_another_rate_than_the_tokenizer(self, prepared, tmp_path, capsys, tokenizer, base, rates):
        fit("tokenizer", prepared / tokenizer, tmp_path, "training.steps=1")
        capsys.readouterr()
        fit("base", prepared / base, tmp_path, "training.steps=1")
        lines = [line for line in capsys.readouterr().err.splitlines() if OTHER in line]
        stages = tmp_path / "transformer", tmp_path / "tokenizer"
        where = "{}: clips of {{}} frames a second, but those of {} have {{}}".format(*stages)
        assert lines == ([] if rates is None else [f"{where.format(*rates)} {OTHER}"])

    def test_other_films_than_the_tokenizers(self, films, tmp_path, capsys):
        """Its rate is that of the films that it saw, not of those of the next stage."""
        for label in ("up", "down"):
            (tmp_path / "fast" / label).mkdir(parents=True)
            write_mp4(tmp_path / "fast" / label / "0.mp4", moving(0, 18), fps=16)
        out = tmp_path / "run"
        fit("tokenizer", films, out, "training.steps=1")
        assert OTHER in told(capsys, *evaluate(out, tmp_path / "fast/up/0.mp4", 5))
        for override, line in (("data.fps=8", False), ("data.fps=0", True)):
            capsys.readouterr()
            fit("base", tmp_path / "fast", out, "training.steps=1", override)
            assert (f"{out / 'tokenizer'} have 8 {OTHER}" in capsys.readouterr().err) == line
            shutil.rmtree(out / "transformer")

    def test_another_rate_than_the_base_model(self, films, tmp_path, capsys):
        """That of the base model counts, not of the tokenizer; a stride makes a rate, too."""
        fit("tokenizer", films, tmp_path, "training.steps=1")
        fit("base", films, tmp_path, "training.steps=1", "data.fps=4")
        shared = ("training.steps=1", "data.height=32", "data.width=32", "transformer.patch=2")
        line = f"{tmp_path / 'sr1'}: clips of 8 frames a second, but those of {tmp_path / 'transformer'} have 4 {OTHER}"
        for override, told in (("data.fps=4", False), ("data.stride=2", False), ("data.stride=1", True)):
            capsys.readouterr()
            fit("sr1", films, tmp_path, *shared, override)
            assert (line in capsys.readouterr().err.splitlines()) == told
            shutil.rmtree(tmp_path / "sr1")

    def test_pictures_have_no_rate(self, films, tmp_path, capsys):
        fit("tokenizer", films, tmp_path, "training.steps=1", "data.frames=1", "data.fps=4")
        fit("base", films, tmp_path, "training.steps=1")
        assert OTHER not in capsys.readouterr().err
