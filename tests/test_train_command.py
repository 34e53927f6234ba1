"""`walt train` as a command: how it begins and ends, prepared folders, and that on bad input it writes nothing."""

from __future__ import annotations

import re
import shlex
import shutil

import pytest
from command_line import fails
from tiny_runs import SHORT, TOKENIZER, TRANSFORMER, moving

from walt.cli import main
from walt.data.video import write_mp4
from walt.sample.pipeline import WaltPipeline
from walt.train.log import read_log

pytest.importorskip("av", reason="PyAV is not installed")


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def left(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def common(films, out) -> list[str]:
    overrides = [f"--{text}" for text in (*TOKENIZER, *TRANSFORMER, *SHORT)]
    return ["--data", str(films), "--out", str(out), *overrides]


def test_both_stages(films, tmp_path, capsys):
    shared = common(films, tmp_path / "run")
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


def test_the_beginning_and_the_end_of_a_run(films, tmp_path, capsys):
    out = tmp_path / "a run"
    shared = [*common(films, out), "--training.preview-every", "null", "--data.held-out", "0.3"]
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


def test_on_a_prepared_folder(films, tmp_path, capsys):
    run("prepare", "--data", films, "--out", tmp_path / "prepared", "--size", "16x24")
    assert "4 videos with 4 shots and 0 images, 36 frames, 2 classes, 4 captions" in capsys.readouterr().out
    run("train", "tokenizer", *common(tmp_path / "prepared", tmp_path / "run"))
    assert "data-16x16" not in left(tmp_path / "run")
    capsys.readouterr()
    source = shutil.copytree(films, tmp_path / "films")
    run("prepare", "--data", source, "--out", tmp_path / "again", "--size", 16)
    (source / "up/0.mp4").unlink()
    run("train", "tokenizer", *common(tmp_path / "again", tmp_path / "c"))
    told = f"{source} has changed since {tmp_path}/again was prepared from it: 1 file fewer: up/0.mp4"
    assert capsys.readouterr().err.splitlines().count(told) == 1
    line = fails(capsys, "train", "tokenizer", *common(tmp_path / "prepared", tmp_path / "b"), "--data.width=32")
    assert "was prepared for 16x24 pixels; 16x32 are wanted: prepare it with --size 16x32" in line
    line = fails(
        capsys,
        *("train", "tokenizer", *common(tmp_path / "prepared", tmp_path / "b")),
        *("--captions", films / "captions.jsonl"),
    )
    assert "is prepared already; give captions to walt prepare" in line
    assert not (tmp_path / "b").exists()


def test_what_is_passed_over_is_told(films, tmp_path, capsys):
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
        run("train", "tokenizer", *common(source, out), "--training.steps=1")
        printed = capsys.readouterr().err.splitlines()
        assert (printed.count(other), printed.count(short)) == (1, 1)
    run("evaluate", "--from", tmp_path / "run-data", "--data", tmp_path / "prepared", "--frames", 5, "--size", 16)
    printed = capsys.readouterr().err.splitlines()
    assert (printed.count(other), printed.count(short)) == (1, 1)


def test_bad_input(films, tmp_path, capsys):
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
    assert "holds no video or image" in fails(capsys, "train", "tokenizer", "--data", tmp_path / "empty", "--out", out)
    assert not out.exists()


def test_a_letter_named_mp4(capsys, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "letter.mp4").write_text("Dear reader,\n" * 50)
    line = fails(capsys, "train", "tokenizer", "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert "none of its 1 videos and images can be used" in line
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_out_is_a_file(films, capsys, tmp_path):
    (tmp_path / "out").write_text("")
    line = fails(capsys, "train", "tokenizer", *common(films, tmp_path / "out"))
    assert "cannot write" in line


def test_frame_rate(films, tmp_path, capsys):
    run("prepare", "--data", films, "--out", tmp_path / "four", "--size", 16, "--fps", 4)
    assert "4 videos with 4 shots and 0 images, 20 frames" in capsys.readouterr().out
    shared = ("tokenizer", *common(tmp_path / "four", tmp_path / "run"))
    run("train", *shared, "--fps", 4)
    capsys.readouterr()
    assert "fps: 4.0" in (tmp_path / "run" / "tokenizer.yaml").read_text()
    assert "was prepared at 4 frames a second; 8 a second are wanted" in fails(capsys, "train", *shared, "--fps", 8)
