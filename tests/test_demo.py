"""`walt demo` from one end to the other."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import command, fails

from walt import checkpoint
from walt.checkpoint import load_description, read_tensors
from walt.cli import main
from walt.data.video import read_video
from walt.demo.demo import summary
from walt.demo.report import running_mean
from walt.errors import WaltError
from walt.evaluate.networks import FrameFeatures
from walt.sample.pipeline import WaltPipeline

SMALL = (
    "--scenarios basic --clips 3 --samples 2 --frames 5 --size 16 --sampling-steps 2 --seed 1"
    " --tokenizer-steps {tokenizer} --transformer-steps {transformer}"
)


def demo(out: Path, *extra: str, tokenizer: int = 12, transformer: int = 12) -> list[str]:
    return ["demo", "--out", str(out), *SMALL.format(tokenizer=tokenizer, transformer=transformer).split(), *extra]


@pytest.fixture(scope="module")
def needs_demo() -> None:
    """Skip without the packages of the extra "demo"."""
    for module in ("av", "PIL", "matplotlib", "vizdoom"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    try:
        FrameFeatures()
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


class TestDemo:
    def test_writes_everything(self, demo_run):
        expected = {
            "data",
            "demo.json",
            "held-out",
            "latents-16x16",
            "samples.mp4",
            "samples.gif",
            "reconstructions.mp4",
            "reconstructions.gif",
            "images.png",
            "losses.png",
            "report.html",
            "metrics.json",
            "tokenizer",
            "tokenizer.files.json",
            "tokenizer.jsonl",
            "tokenizer.yaml",
            "transformer",
            "transformer.files.json",
            "transformer.jsonl",
            "transformer.yaml",
        }
        assert {path.name for path in demo_run.iterdir()} == expected

    def test_videos_decode_to_whole_clips(self, demo_run):
        # Two classes: a row of two clips at 3x, and pairs of original and reconstruction at 2x.
        assert read_video(demo_run / "samples.mp4").shape == (5, 3 * 16 + 4, 2 * (3 * 16 + 2) + 2, 3)
        assert read_video(demo_run / "reconstructions.mp4").shape == (5, 2 * (2 * 16 + 2) + 2, 2 * (2 * 16 + 2) + 2, 3)

    def test_frame_rate(self, demo_run):
        """The simulator has 35 tics a second, of which every second one is a frame."""
        for kind in ("tokenizer", "transformer"):
            assert load_description(demo_run / kind, kind)[1]["clip"]["fps"] == 17.5

    def test_metrics_and_report_agree_with_what_was_printed(self, demo_run):
        metrics = json.loads((demo_run / "metrics.json").read_text())
        assert metrics["classes"] == ["basic", "big_buck_bunny"]
        assert metrics["steps"]["tokenizer"]["done"] == metrics["steps"]["transformer"]["done"] == 12
        assert metrics["clips"] == {"train": 6, "held out": 4}
        assert metrics["frechet_clips"] == 4
        assert metrics["frechet_frames"] == 20
        frechet = metrics["frechet"]
        assert frechet.keys() == {"trained", "untrained", "reconstructions", "real training clips"}
        assert metrics["frechet_ratio"] == pytest.approx(frechet["untrained"]["frames"] / frechet["trained"]["frames"])
        assert 5 < metrics["psnr"] < 50
        assert np.mean(list(metrics["psnr_by_class"].values())) == pytest.approx(metrics["psnr"])
        printed = (demo_run.parent / "output.txt").read_text()
        report = (demo_run / "report.html").read_text()
        assert printed.splitlines() == list(summary(metrics, demo_run))
        for text in (f"{metrics['psnr']:.2f} dB", f"{frechet['trained']['frames']:.1f}", metrics["frechet_features"]):
            assert text in printed
            assert text in report
        assert report.count("data:image/gif;base64,") == 2
        assert report.count("data:image/png;base64,") == 2
        assert "http" not in report.replace("https://vizdoom.cs.put.edu.pl", "")

    def test_shows_progress(self, demo_run):
        errors = (demo_run.parent / "errors.txt").read_text()
        for text in ("render", "train tokenizer", "train transformer", "loss=", "step/s", "frames_s="):
            assert text in errors

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
        assert again["psnr"] == pytest.approx(metrics["psnr"], abs=0.01)
        assert again["steps"] == metrics["steps"]

    def test_other_settings_are_refused(self, demo_run, capsys):
        line = fails(capsys, *demo(demo_run, "--clips", "4"))
        assert f"{demo_run} holds a demo of other clips (clips is 3 there, 4 here)" in line
        assert "belongs to a run with other settings (training.steps is 12 there, 13 here)" in fails(
            capsys, *demo(demo_run, tokenizer=13)
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
        assert f"cannot write {tmp_path / 'out' / 'tokenizer'}: No space left on device" in line
        left = {path.name for path in (tmp_path / "out").iterdir()}
        assert left == {
            "data",
            "demo.json",
            "held-out",
            "tokenizer.files.json",
            "tokenizer.jsonl",
            "tokenizer.yaml",
        }

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
        done = json.loads((out / "metrics.json").read_text())["steps"]
        assert done["tokenizer"]["done"] > stopped
        assert done["transformer"]["done"] >= 1
        assert WaltPipeline.from_pretrained(out).generate("basic", steps=1, progress=False).shape == (1, 5, 16, 16, 3)


def test_running_mean():
    assert running_mean(np.array([4.0, 2.0, 6.0, 8.0]), 2).tolist() == [4.0, 3.0, 4.0, 7.0]
