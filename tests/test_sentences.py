"""Captions and sentences: what is cut is told, and what an empty sentence means."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from command_line import fails
from tiny_runs import SHORT, TOKENIZER, TRANSFORMER, fit

from walt.cli import main
from walt.data.video import read_image, read_video
from walt.errors import WaltError, WaltWarning
from walt.model.text import ByteEncoder, encode_sentences
from walt.sample.pipeline import WaltPipeline

pytest.importorskip("av", reason="PyAV is not installed")

LENGTH = 16  # bytes that the model reads
TEXT = ("data.text=bytes", f"transformer.text_length={LENGTH}")
LONG = "stripes go up and then down"
CUT = f"longer than the {LENGTH} bytes that the text encoder 'bytes' reads (transformer.text_length), and"


@pytest.fixture(scope="module")
def model(films, tmp_path_factory):
    """Classes and sentences."""
    out = tmp_path_factory.mktemp("model") / "run"
    fit("tokenizer", films, out)
    fit("base", films, out, *TEXT, "training.steps=6", "training.lr=1e-2", "training.warmup=1")
    return out


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def rewrite(folder, caption: str):
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    rows[0]["caption"] = caption
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class TestCuts:
    def test_sample_warns(self, model, tmp_path, capsys):
        """Two sentences that differ behind the cut give the same clip: not without a word."""
        for name, end in (("a", "and then down"), ("b", "and then left")):
            run(
                "sample",
                "--from",
                model,
                "--steps",
                1,
                "--text",
                f"stripes go up\n{end}",
                "--out",
                tmp_path / f"{name}.gif",
            )
            captured = capsys.readouterr()
            warnings = [line for line in captured.err.splitlines() if "warning" in line]
            assert warnings == [f"walt: warning: the sentence is {CUT} is cut: 'stripes go up {end}'"]
            assert f"1 clip of stripes go up {end}\n" in captured.out
        assert np.array_equal(read_video(tmp_path / "a.gif"), read_video(tmp_path / "b.gif"))
        run("sample", "--from", model, "--steps", 1, "--text", "stripes go up", "--out", tmp_path / "c.gif")
        assert "warning" not in capsys.readouterr().err

    def test_train_counts(self, films, model, tmp_path, capsys):
        shutil.copytree(films, tmp_path / "films")
        rewrite(tmp_path / "films", LONG)
        (tmp_path / "run").mkdir()
        shutil.copytree(model / "tokenizer", tmp_path / "run" / "tokenizer")
        overrides = [f"--{text}" for text in (*TOKENIZER, *TRANSFORMER, *SHORT, *TEXT)]
        run("train", "base", "--data", tmp_path / "films", "--out", tmp_path / "run", *overrides)
        lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        assert lines == [f"walt: warning: 1 of 4 captions is {CUT} is cut: up/0.mp4"]

    def test_prepare_counts(self, films, tmp_path, capsys):
        """By the default length, since the model is not known yet."""
        shutil.copytree(films, tmp_path / "films")
        rewrite(tmp_path / "films", "é" * 128)
        prepare = ("prepare", "--data", tmp_path / "films", "--size", 16)
        run(*prepare, "--out", tmp_path / "fits")
        assert "warning" not in capsys.readouterr().err
        rewrite(tmp_path / "films", "é" * 128 + "e")
        run(*prepare, "--out", tmp_path / "long")
        assert (
            "1 of 4 captions is longer than the 256 bytes that the text encoder 'bytes' reads"
            in capsys.readouterr().err
        )

    def test_in_python(self, model):
        pipeline = WaltPipeline.from_pretrained(model)
        with pytest.warns(WaltWarning, match="2 of 3 sentences are longer than the 16 bytes"):
            pipeline.generate(text=[LONG, "short", "", LONG + "!"], num=4, steps=1, progress=False)

    @pytest.mark.parametrize("sentence", ["x" * 61, "é" * 61, "A rot" * 20, "子供が走る。" * 11, "\U0001f388" * 70])
    def test_the_beginning_is_named(self, sentence):
        """Of a text without spaces too, by characters."""
        with pytest.warns(WaltWarning) as warned:
            encode_sentences(ByteEncoder(LENGTH), [sentence, "a\n b"])
        assert str(warned[0].message).endswith(f"1 of 2 sentences is {CUT} is cut: {sentence[:57] + '...'!r}")
        with pytest.warns(WaltWarning, match=f"^the sentence is .* is cut: '{sentence[:60]}'$"):
            encode_sentences(ByteEncoder(LENGTH), [sentence[:60]])


class TestPadding:
    def test_training_reads_no_more_than_the_longest_caption(self, model, films, monkeypatch):
        seen = []
        forward = torch.nn.Module.__call__

        def spy(module, *arguments, **given):
            if "text_mask" in given:
                seen.append(given["text_mask"].shape[1])
            return forward(module, *arguments, **given)

        monkeypatch.setattr(torch.nn.Module, "__call__", spy)
        fit("base", films, model, *TEXT, "training.steps=7", "training.lr=1e-2", "training.warmup=1", new_settings=True)
        assert set(seen) == {len("stripes go down")}

    def test_it_changes_nothing(self, model):
        """A short sentence alone, and beside a long one."""
        pipeline = WaltPipeline.from_pretrained(model)
        options = {"num": 2, "steps": 2, "progress": False}
        together = pipeline.generate_latents(text=["up", "stripes go down"], **options)
        alone = pipeline.generate_latents(text="up", **options)
        torch.testing.assert_close(alone[0], together[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(alone[1], together[1], rtol=1e-2, atol=1e-2)


class TestEmpty:
    @pytest.mark.parametrize("text", ["", " ", "\n\t"])
    def test_no_text(self, model, tmp_path, capsys, text):
        """The same as no text and no class, and called so."""
        run("sample", "--from", model, "--steps", 1, "--text", text, "--images", "--out", tmp_path / "a.png")
        assert capsys.readouterr().out.endswith("1 picture of no text\n")
        expected = WaltPipeline.from_pretrained(model).generate(images=True, steps=1, progress=False)[0]
        assert np.abs(read_image(tmp_path / "a.png")[2:-2, 2:-2].astype(int) - expected).max() <= 1

    def test_with_a_class(self, model, tmp_path, capsys):
        for text, what in (("", "up, no text"), ("stripes go up", "up, stripes go up")):
            source = ("sample", "--from", model, "--steps", 1, "--class", "up", "--text", text)
            run(*source, "--out", tmp_path / "a.mp4")
            assert capsys.readouterr().out.endswith(f"1 clip of {what}\n")

    def test_several(self, model, tmp_path, capsys):
        """A clip of each, in turn; not the last one alone."""
        source = ("sample", "--from", model, "--steps", 1, "--images", "--out", tmp_path / "a.png")
        run(*source, "--text", "go up", "--text", "stripes")
        assert "2 pictures of go up, stripes\n" in capsys.readouterr().out
        first, second = read_image(tmp_path / "a.png")[2:-2, 2:18], read_image(tmp_path / "a.png")[2:-2, 20:-2]
        run(*source, "--text", "stripes", "--text", "go up")
        other = read_image(tmp_path / "a.png")[2:-2, 2:18]
        assert (first != other).any() or (second != other).any()
        run(*source, "--class", "up", "--class", "down", "--text", "stripes", "--num", 3)
        assert "3 pictures of up, down, stripes\n" in capsys.readouterr().out

    def test_bad_input(self, model, films, tmp_path, capsys):
        source = ("sample", "--from", model, "--out", tmp_path / "a.mp4")
        for arguments, message in (
            (["--class", ""], "unknown class ''; the classes are down, up"),
            (["--class", " "], "unknown class ' '"),
            (["--class", "-1"], "unknown class '-1'"),
            (["--class", "2"], "unknown class '2'"),
            (["--class", "up", "--class", "left"], "unknown class 'left'"),
            (["--text", "\udcff"], "text: 'utf-8' codec can't encode character"),
        ):
            assert message in fails(capsys, *source, *arguments), arguments
        long = ("extend", "--from", model, "--video", films / "up/0.mp4", "--out", tmp_path / "a.mp4")
        assert "has frames of 64x64 pixels; the model takes 16x16" in fails(
            capsys, *long, "--text", "a", "--frames", 12
        )
        assert list(tmp_path.iterdir()) == []

    def test_a_model_without_text(self, model, films, tmp_path, capsys):
        """A sentence is refused, an empty one too: it may be a variable that was not set."""
        shutil.copytree(model / "tokenizer", tmp_path / "run" / "tokenizer")
        fit("base", films, tmp_path / "run")
        for text in ("", " ", "up"):
            line = fails(capsys, "sample", "--from", tmp_path / "run", "--text", text, "--out", tmp_path / "a.mp4")
            assert line.endswith("text: the model was trained without text; train one with --data.text bytes")

    def test_an_encoder_that_is_gone(self, model, tmp_path):
        shutil.copytree(model, tmp_path / "run")
        place = tmp_path / "run" / "transformer" / "config.json"
        place.write_text(place.read_text().replace('"text": "bytes"', '"text": "hf:/nowhere"'))
        with pytest.raises(
            WaltError, match=r'/nowhere .*has no config.json .the model\'s text encoder, by "text" in .*'
        ):
            WaltPipeline.from_pretrained(tmp_path / "run")
