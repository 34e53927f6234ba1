"""`walt demo` from one end to the other."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import command, fails

from walt import checkpoint
from walt.checkpoint import load_description, read_tensors
from walt.cli import main
from walt.data.simulator import film_path
from walt.data.video import read_video
from walt.demo.curves import running_mean
from walt.demo.demo import summary
from walt.demo.report import Report
from walt.demo.trained import OPS, Trained
from walt.errors import WaltError
from walt.sample.pipeline import WaltPipeline
from walt.train.log import read_log

STEPS = 40
SMALL = (
    "--scenarios basic --clips 3 --samples 2 --frames 5 --size 16 --sampling-steps 2 --seed 1 --preview-seconds 0.001"
    " --tokenizer-steps {tokenizer} --transformer-steps {transformer}"
)


def demo(out: Path, *extra: str, tokenizer: int = STEPS, transformer: int = STEPS) -> list[str]:
    return ["demo", "--out", str(out), *SMALL.format(tokenizer=tokenizer, transformer=transformer).split(), *extra]


@pytest.fixture(scope="module")
def needs_demo() -> None:
    """Skip without the packages of the extra "demo"."""
    for module in ("av", "PIL", "matplotlib", "vizdoom"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    try:
        film_path()
    except WaltError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def demo_run(needs_demo, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "run"
    process = command(*demo(out))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (out.parent / "output.txt").write_text(output)
    (out.parent / "errors.txt").write_text(errors)
    return out


def test_a_page_of_what_failed_and_what_was_not_reached(tmp_path):
    report = Report(tmp_path, "title", "intro", ["first", "second", "third"])
    with report.section("first"):
        raise RuntimeError("not enough memory")
    with pytest.raises(KeyboardInterrupt), report.section("second"):
        raise KeyboardInterrupt
    assert report.failed() == ["first: not enough memory"]
    page = tmp_path / "report.html"
    assert "refresh" in page.read_text()
    report.finish()
    text = page.read_text()
    assert "refresh" not in text
    for note in ("This failed: not enough memory", "Was interrupted.", "Was not reached."):
        assert text.count(note) == 1


def test_the_cost_of_no_step(tmp_path):
    with pytest.raises(WaltError, match="no step of the tokenizer was logged"):
        Trained.cost(SimpleNamespace(out=tmp_path))


class TestDemo:
    def test_writes_everything(self, demo_run):
        expected = {
            "data",
            "demo.json",
            "held-out",
            "latents-16x16",
            "media",
            "report.html",
            "metrics.json",
            "tokenizer",
            "tokenizer.files.json",
            "tokenizer.held-out.jsonl",
            "tokenizer.jsonl",
            "tokenizer.yaml",
            "transformer",
            "transformer.files.json",
            "transformer.jsonl",
            "transformer.yaml",
        }
        assert {path.name for path in demo_run.iterdir()} == expected
        videos = {"samples", "longer", "sentence", "larger", "reconstructions", "tokenizer", "transformer"}
        media = {*(f"{name}.mp4" for name in videos), "tokenizer.svg", "transformer.svg"}
        assert {path.name for path in (demo_run / "media").iterdir()} == media

    def test_videos_decode_to_whole_clips(self, demo_run):
        """Of the model in the package, clips of 17 frames, 41 made longer; of the demo, two classes at 5 frames."""
        shapes = {
            "samples": (17, 2 * (3 * 64 + 2) + 2, 4 * (3 * 64 + 2) + 2, 3),
            "longer": (41, 3 * 64 + 4, 4 * (3 * 64 + 2) + 2, 3),
            "larger": (17, 3 * 128 + 4, 2 * (3 * 128 + 2) + 2, 3),
            "reconstructions": (5, 2 * (2 * 16 + 2) + 2, 2 * (2 * 16 + 2) + 2, 3),
            "transformer": (5, 3 * 16 + 4, 4 * (3 * 16 + 2) + 2, 3),
        }
        for name, shape in shapes.items():
            assert read_video(demo_run / "media" / f"{name}.mp4").shape == shape

    def test_frame_rate(self, demo_run):
        """The simulator has 35 tics a second, of which every second one is a frame."""
        for kind in ("tokenizer", "transformer"):
            assert load_description(demo_run / kind, kind)[1]["clip"]["fps"] == 17.5

    def test_metrics_and_report_agree_with_what_was_printed(self, demo_run):
        metrics = json.loads((demo_run / "metrics.json").read_text())
        assert metrics["tokenizer"]["done"] == metrics["transformer"]["done"] == STEPS
        assert metrics["kernels"].keys() == set(OPS)
        assert all(metrics["cost"][stage]["compute_s"] > 0 for stage in ("tokenizer", "transformer"))
        printed = (demo_run.parent / "output.txt").read_text()
        report = (demo_run / "report.html").read_text()
        assert printed.splitlines() == list(summary(metrics, demo_run))
        for name in ("packaged", "trained"):
            figures = metrics[name]
            assert 5 < figures["psnr"] < 50
            assert figures["clips"] == 4
            assert figures["psnr_by_class"].keys() == {"basic", "big_buck_bunny"}
            assert np.mean(list(figures["psnr_by_class"].values())) == pytest.approx(figures["psnr"])
            assert f"{figures['psnr']:.2f} dB" in printed
            assert f"{figures['psnr']:.2f} dB" in report

    def test_previews_are_rows_and_pictures_of_the_training(self, demo_run):
        rows = read_log(demo_run / "tokenizer.held-out.jsonl")
        assert [row["step"] for row in rows] == [20, 40]
        assert all(5 < row["psnr"] < 50 and 0 < row["colour"] < 2 for row in rows)

    def test_the_page_needs_nothing_from_elsewhere(self, demo_run):
        report = (demo_run / "report.html").read_text()
        assert "http" not in report.replace("http-equiv", "")
        assert "refresh" not in re.sub(r"refreshes itself", "", report)  # at the end it stays as it is
        sources = re.findall(r'src="([^"?]*)', report)
        assert len(sources) == 9
        assert all((demo_run / source).is_file() for source in sources)

    def test_shows_progress(self, demo_run):
        errors = (demo_run.parent / "errors.txt").read_text()
        for text in ("train tokenizer: step ", "train base: step ", "loss=", "frames_s=", " left\n"):
            assert text in errors
        assert "step/s" not in errors  # no bars in a file

    def test_sample_from_it(self, demo_run, tmp_path, capsys):
        out = tmp_path / "basic.mp4"
        assert main(["sample", "--from", str(demo_run), "--class", "basic", "--num", "3", "--out", str(out)]) == 0
        assert read_video(out).shape == (5, 16 + 4, 3 * 18 + 2, 3)
        assert "3 clips of basic" in capsys.readouterr().out
        pictures = ["--images", "--num", "2", "--steps", "2", "--out", str(tmp_path / "two.png")]
        assert main(["sample", "--from", str(demo_run), *pictures]) == 0
        assert (tmp_path / "two.png").stat().st_size > 100

    def test_bad_samples(self, demo_run, tmp_path, capsys):
        source = ("sample", "--from", demo_run)
        assert "unknown class 'chess'; the classes are basic, big_buck_bunny" in fails(
            capsys, *source, "--class", "chess"
        )
        assert "must end in .mp4 or .gif" in fails(capsys, *source, "--out", tmp_path / "x.txt")
        assert "must end in .png" in fails(capsys, *source, "--images", "--out", tmp_path / "x.mp4")
        (tmp_path / "file").write_text("")
        assert "cannot write" in fails(capsys, *source, "--steps", "1", "--out", tmp_path / "file" / "x.gif")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_a_second_run_keeps_the_training(self, demo_run, capsys):
        before = (demo_run / "transformer" / "model.safetensors").read_bytes()
        metrics = json.loads((demo_run / "metrics.json").read_text())
        assert main(demo(demo_run)) == 0
        again = json.loads((demo_run / "metrics.json").read_text())
        assert (demo_run / "transformer" / "model.safetensors").read_bytes() == before
        for name in ("packaged", "trained"):
            assert again[name]["psnr"] == pytest.approx(metrics[name]["psnr"], abs=0.01)
        assert [again[stage]["done"] for stage in ("tokenizer", "transformer")] == [STEPS, STEPS]
        for said in ((demo_run / "report.html").read_text(), capsys.readouterr().err):
            assert said.count("to train for longer, give another folder") == 2

    def test_info_tells_its_networks(self, demo_run, capsys):
        assert main(["info", str(demo_run)]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"{demo_run}\n  video            5 x 16 x 16 (frames x height x width), RGB\n")
        assert "conditions       2 classes\n" in text
        assert f"{demo_run / 'base'}'; there are" in fails(capsys, "info", demo_run / "base")

    def test_other_settings_are_refused(self, demo_run, capsys):
        line = fails(capsys, *demo(demo_run, "--clips", "4"))
        assert f"{demo_run} holds a demo of other clips (clips is 3 there, 4 here)" in line
        assert "belongs to a run with other settings (training.steps is 40 there, 41 here)" in fails(
            capsys, *demo(demo_run, tokenizer=41)
        )

    @pytest.mark.parametrize("name", ["tokenizer", "data"])
    def test_a_folder_that_is_not_a_demos_is_refused(self, demo_run, tmp_path, capsys, name):
        """Such as that of a demo from before it wrote its clips there; and data of the user's are not replaced."""
        shutil.copytree(demo_run / name, tmp_path / "old" / name)
        line = fails(capsys, *demo(tmp_path / "old"))
        assert f"{tmp_path / 'old' / name} is there already, of an older demo or from elsewhere" in line
        assert [path.name for path in (tmp_path / "old").iterdir()] == [name]

    def test_a_preset_without_classes_is_refused(self, needs_demo, tmp_path, capsys):
        line = fails(capsys, *demo(tmp_path / "out", "--preset", "tiny-text"))
        assert "--preset tiny-text has no classes, which the demo's has to have; give tiny" in line
        assert not (tmp_path / "out").exists()

    def test_full_disk(self, needs_demo, tmp_path, capsys, monkeypatch):
        def no_space(path, _tensors):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint, "write_tensors", no_space)
        line = fails(capsys, *demo(tmp_path / "out"))
        assert line.startswith(
            "walt: error: not all of the demo worked: A tokenizer, trained from nothing: cannot write"
        )
        reason = f"cannot write {tmp_path / 'out' / 'tokenizer'}: No space left on device"
        assert reason in line
        report = (tmp_path / "out" / "report.html").read_text()
        assert f"This failed: {reason}" in report
        assert "media/samples.mp4" in report

    def test_interrupt_leaves_a_checkpoint_that_a_second_run_resumes(self, needs_demo, tmp_path):
        out = tmp_path / "run"
        many = {"tokenizer": 10**6, "transformer": 10**6}  # only the clock can end these stages
        process = command(*demo(out, "--minutes", "10", **many))
        deadline = time.monotonic() + 90
        while not (out / "tokenizer.jsonl").exists() or not (out / "tokenizer.jsonl").read_text():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        page = (out / "report.html").read_text()
        assert 'http-equiv="refresh"' not in page
        assert page.count("Was interrupted.") == 1
        assert process.returncode == 130
        assert f"interrupted: {out / 'tokenizer'} holds a checkpoint at step" in errors
        assert "Traceback" not in errors
        _, document = load_description(out / "tokenizer", "tokenizer")
        assert document["kind"] == "tokenizer"
        assert read_tensors(out / "tokenizer" / "ema.safetensors")
        stopped = json.loads((out / "tokenizer" / "state.json").read_text())["step"]
        assert stopped >= 10

        process = command(*demo(out, "--minutes", "0.01", **many))
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        done = json.loads((out / "metrics.json").read_text())
        assert done["tokenizer"]["done"] > stopped
        assert done["transformer"]["done"] >= 1
        assert WaltPipeline.from_pretrained(out).generate("basic", steps=1, progress=False).shape == (1, 5, 16, 16, 3)


def test_running_mean():
    assert running_mean(np.array([4.0, 2.0, 6.0, 8.0]), 2).tolist() == [4.0, 3.0, 4.0, 7.0]
