"""`walt train`: every stage on small films, one folder for all, and samples from what they leave."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import fit, make, write_films
from torch import nn

from walt.checkpoint import fingerprint
from walt.commands.train import train_stage
from walt.data.loading import make_batch
from walt.data.pixels import to_model
from walt.data.video import read_video, write_png
from walt.errors import WaltError, WaltWarning
from walt.model.diffusion import Diffusion
from walt.pretrained import load_tokenizer
from walt.sample.pipeline import WaltPipeline
from walt.settings import load_settings
from walt.train import denoiser
from walt.train import tokenizer as tokenizer_training
from walt.train.log import read_log
from walt.train.run import describe_changes, open_data

pytest.importorskip("av", reason="PyAV is not installed")

QUICK = {"steps": 2, "progress": False}


class Pooled(nn.Module):
    """A perceptual network small enough for tests; counts the frames it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.seen = 0

    def forward(self, frames):
        self.seen += len(frames)
        return [self.conv(frames)]


@pytest.fixture(scope="module")
def model(films, tmp_path_factory):
    """A whole cascade: 5 frames of 16x16 by class or sentence and first frame, then 32x32, then 64x64."""
    out = tmp_path_factory.mktemp("model") / "run"
    fit("tokenizer", films, out)
    text = ("data.text=bytes", "transformer.frame_condition=true", "training.preview_every=2")
    fit("base", films, out, *text)
    sr = ("transformer.patch=2", "transformer.spatial_window=[1, 2, 2]", "transformer.spacetime_window=[2, 2, 2]")
    fit("sr1", films, out, "data.height=32", "data.width=32", *sr)
    fit("sr2", films, out, "data.height=64", "data.width=64", *sr)
    return out


class TestTheWholeModel:
    def test_what_is_in_the_folder(self, model):
        names = {path.name for path in model.iterdir()}
        for stage in ("tokenizer", "transformer", "sr1", "sr2"):
            assert {stage, f"{stage}.yaml", f"{stage}.jsonl"} <= names
            assert [row["step"] for row in read_log(model / f"{stage}.jsonl")] == [1, 2]
        assert {"data-16x16", "data-32x32", "data-64x64", "latents-16x16", "latents-64x64-half", "previews"} <= names
        # One clip of each class, side by side, with margins of 2 pixels.
        assert read_video(model / "previews" / "base-0000002.mp4").shape == (5, 16 + 4, 4 * 18 + 2, 3)

    def test_statistics_of_the_latents(self, model, films):
        """Mean 0 and deviation 1 over the clips they were taken from, which are all there are here."""
        tokenizer = load_tokenizer(model / "tokenizer")
        store = open_data(films, model, load_settings("base", overrides={"data.height": 16, "data.width": 16}))
        rows = store.windows(5)
        assert len(rows) == 4 * 5
        with torch.inference_mode():
            latent = tokenizer.encode(to_model(store.read(rows, 5)))
        torch.testing.assert_close(latent.mean((0, 2, 3, 4)), torch.zeros(4), atol=1e-3, rtol=0)
        torch.testing.assert_close(latent.std((0, 2, 3, 4)), torch.ones(4), atol=1e-3, rtol=0)
        assert not torch.equal(tokenizer.latent_std, torch.ones(4))

    def test_generate(self, model):
        pipeline = WaltPipeline.from_pretrained(model)
        assert pipeline.classes == ("down", "up")
        assert (pipeline.clip.frames, pipeline.clip.fps) == (5, 8)
        by_class = pipeline.generate("up", 2, **QUICK)
        by_text = pipeline.generate(text="stripes go up", num=2, **QUICK)
        assert by_class.shape == by_text.shape == (2, 5, 16, 16, 3)
        first = by_class[0, :1]
        predicted = pipeline.generate(text="stripes go up", frames=first, **QUICK)
        assert predicted.shape == (1, 5, 16, 16, 3)
        assert pipeline.generate("down", 3, images=True, **QUICK).shape == (3, 16, 16, 3)

    def test_extend_and_upscale(self, model):
        pipeline = WaltPipeline.from_pretrained(model)
        clip = pipeline.generate("up", **QUICK)[0]
        longer = pipeline.extend(clip, 2, text="stripes go up", **QUICK)
        assert longer.shape == (13, 16, 16, 3)
        assert np.array_equal(longer[:5], clip)
        assert pipeline.upscale(clip, stages=1, **QUICK).shape == (5, 32, 32, 3)
        assert pipeline.upscale(longer, **QUICK).shape == (13, 64, 64, 3)

    def test_a_tokenizer_from_before_adaptive_norms(self, model, tmp_path):
        """Its config.json lacks the field, and it has no such norms."""
        shutil.copytree(model / "tokenizer", tmp_path / "tokenizer")
        path = tmp_path / "tokenizer" / "config.json"
        document = json.loads(path.read_text())
        assert document["config"].pop("adaptive_norm") is False
        path.write_text(json.dumps(document))
        old, new = load_tokenizer(tmp_path / "tokenizer"), load_tokenizer(model / "tokenizer")
        assert old.config == new.config
        assert all(torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True))

    def test_a_second_call_changes_nothing(self, model, films):
        before = (model / "transformer" / "model.safetensors").read_bytes()
        trainer = fit("base", films, model, "data.text=bytes", "transformer.frame_condition=true")
        assert trainer.step == 2
        assert (model / "transformer" / "model.safetensors").read_bytes() == before


class TestRefused:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("training.lr=1e-4", r"training.lr is 0.001 there, 0.0001 here"),
            ("training.steps=3", "training.steps is 2 there, 3 here"),
            ("data.flip=true", "data.flip is False there, True here"),
            ("diffusion.drop_probability=0.5", "diffusion.drop_probability is 0.1 there, 0.5 here"),
            ("transformer.frame_condition=false", "config.frame_condition is True there, False here"),
            ("data.text=''", "config.text_vocabulary is 256 there, 0 here"),
        ],
    )
    def test_other_settings(self, model, films, override, message):
        before = (model / "transformer.yaml").read_text()
        given = ("data.text=bytes", "transformer.frame_condition=true", override)
        with pytest.raises(WaltError, match=f"transformer belongs to a run with other settings .*{message}") as refused:
            fit("base", films, model, *given)
        ways = "give the same ones, or another --out"
        if override.startswith(("training.", "data.flip")):
            ways += ", or --new-settings to go on with these"
        assert str(refused.value).endswith(ways)
        assert (model / "transformer.yaml").read_text() == before

    def test_more_steps_by_the_option_that_is_named(self, films, tmp_path):
        """Of a run that has had all of its steps."""
        fit("tokenizer", films, tmp_path)
        trainer = fit("tokenizer", films, tmp_path, "training.steps=3", new_settings=True)
        assert [row["step"] for row in read_log(trainer.log_path)] == [1, 2, 3]

    def test_other_data(self, model, films, tmp_path):
        other = write_films(tmp_path / "other")
        (other / "up" / "1.mp4").unlink()
        store = open_data(other, tmp_path / "prepared", load_settings("base", overrides={"data.height": 16}))
        run = make("tokenizer", films, model)
        with pytest.raises(WaltError, match=r"tokenizer was trained on other data than .*1 file fewer: up/1.mp4"):
            train_stage(replace(run, store=store))

    def test_what_changed(self, films, tmp_path):
        """Other times are no change; other bytes, more and fewer files are told by name."""
        data, out = shutil.copytree(films, tmp_path / "data", copy_function=shutil.copyfile), tmp_path / "out"
        fit("tokenizer", data, out)
        os.utime(data / "up/0.mp4", (1, 1))
        assert fit("tokenizer", data, out).step == 2
        for i in range(2):
            shutil.copy(data / "up/0.mp4", data / f"more-{i}.mp4")
        shutil.copy(data / "up/0.mp4", data / "up/1.mp4")
        with pytest.raises(WaltError, match=r"2 files more: more-0.mp4, more-1.mp4; 1 file changed: up/1.mp4.; give"):
            fit("tokenizer", data, out)
        (out / "tokenizer.files.json").unlink()
        with pytest.raises(
            WaltError, match=r"was trained on other data than .*data-16x16 holds, or by an older walt; give"
        ):
            fit("tokenizer", data, out)

    def test_other_preparation(self):
        here = {"prepared": "shots on", "file": {"a": "1"}, "caption": {}}
        assert describe_changes(here, here) == "the same files, read in another way"
        there = {**here, "prepared": "shots off"}
        assert describe_changes(there, here) == "prepared with shots off there, shots on here"

    def test_other_captions(self, model, films, tmp_path):
        captions = tmp_path / "captions.jsonl"
        captions.write_text(json.dumps({"file": "up/0.mp4", "caption": "something else"}) + "\n")
        run = make("base", films, model, "data.text=bytes", "transformer.frame_condition=true")
        try:
            store = open_data(films, model, run.settings, captions)
            changed = "4 captions changed: down/0.mp4, down/1.mp4, up/0.mp4, up/1.mp4"
            with pytest.raises(WaltError, match=f"transformer was trained on other data than .*{changed}"):
                train_stage(replace(run, store=store))
        finally:
            make("base", films, model)  # the folder's own captions again

    def test_sizes_of_a_cascade(self, model, films):
        message = r"data.height: got 16; expected 32, twice those of .*transformer"
        with pytest.raises(WaltError, match=message):
            fit("sr1", films, model, "data.width=32")
        with pytest.raises(WaltError, match=r"data.height: got 32; expected 64, twice those of .*sr1"):
            fit("sr2", films, model, "data.height=32", "data.width=32")
        with pytest.raises(WaltError, match=r"data.frames: got 1; expected 5, those of .*transformer"):
            fit("sr1", films, model, "data.frames=1", "data.height=32", "data.width=32")

    def test_no_clip_is_long_enough(self, films, tmp_path):
        message = r"holds no clip of 13 frames, for which a shot must have 13; .*--frames 1"
        with pytest.raises(WaltError, match=message):
            fit("tokenizer", films, tmp_path / "run", "data.frames=13")

    def test_batches_that_cannot_be_divided(self, films, tmp_path):
        message = "data.batch: got 4; expected a multiple of 3 .processes x training.accumulate., such as 3 or 6"
        with pytest.raises(WaltError, match=message):
            fit("tokenizer", films, tmp_path / "run", "training.accumulate=3")

    def test_text_without_captions_or_encoder(self, model, films, tmp_path):
        with pytest.raises(WaltError, match=r"name an encoder, such as --data.text bytes"):
            fit("base", films, model, "data.text=''", preset="tiny-text")
        run = make("base", films, model, "data.text=bytes")
        run.store.caption = (None,) * 4
        with pytest.raises(WaltError, match=r"data-16x16 has no captions; give --captions"):
            train_stage(run)

    def test_out_inside_the_data(self, films):
        with pytest.raises(WaltError, match=r"run lies inside .*films"):
            fit("tokenizer", films, films / "run")
        assert not (films / "run").exists()

    def test_prepared_for_less(self, model, films):
        with pytest.raises(WaltError, match=r"was prepared for 16x16 pixels; 32x16 are wanted"):
            fit("tokenizer", model / "data-16x16", model, "data.height=32")

    def test_settings_that_the_trainer_refuses(self, films, tmp_path):
        with pytest.raises(WaltError, match=r"training: checkpointing: got True"):
            fit("tokenizer", films, tmp_path / "run", "training.checkpointing=true")


class TestTokenizer:
    def test_with_all_losses(self, films, tmp_path, monkeypatch):
        network = Pooled()
        monkeypatch.setattr(tokenizer_training, "efficientnet_features", lambda: network)
        full = ("losses.perceptual=0.1", "losses.adversarial=0.1", "losses.r1_every=1", "losses.perceptual_frames=3")
        fit("tokenizer", films, tmp_path, *full, "data.images=0", "training.preview_every=1")
        # Of 2 steps, 3 frames of 4 clips and of their reconstructions.
        assert network.seen == 2 * 2 * 3 * 4
        row = read_log(tmp_path / "tokenizer.jsonl")[-1]
        names = {"reconstruction", "perceptual", "adversarial", "decorrelation"}
        names |= {"discriminator_loss", "discriminator_real_logit", "discriminator_lecam", "discriminator_r1"}
        assert names <= row.keys()
        lecam = load_file(tmp_path / "tokenizer" / "lecam.safetensors")
        assert all(bool(value != 0) for value in lecam.values())
        assert {path.name for path in (tmp_path / "previews").iterdir()} == {
            f"tokenizer-{step:07d}.mp4" for step in (1, 2)
        }

    @pytest.mark.parametrize("images", [0, 2, 4])
    def test_share_of_steps_with_images(self, films, tmp_path, images):
        source = tokenizer_training.TokenizerSource(make("tokenizer", films, tmp_path, f"data.images={images}"))
        drawn = [make_batch(source, 0, step, range(1))["video"].shape[2] for step in range(40)]
        assert set(drawn) == {0: {5}, 2: {1, 5}, 4: {1}}[images]
        assert images != 2 or 10 < drawn.count(1) < 30

    def test_base_wants_a_tokenizer_that_is_done(self, films, tmp_path, monkeypatch):
        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(tokenizer_training, "set_statistics", stop)
        with pytest.raises(KeyboardInterrupt):
            fit("tokenizer", films, tmp_path)
        with pytest.raises(WaltError, match=r"tokenizer was not trained to its end .*run walt train tokenizer again"):
            fit("base", films, tmp_path)
        monkeypatch.undo()
        assert fit("tokenizer", films, tmp_path).step == 2
        assert fit("base", films, tmp_path).step == 2


def test_a_budget_of_time(films, tmp_path):
    """Each stage ends when its seconds are used up, with a small learning rate, statistics and all."""
    endless = ("training.steps=1000000", "training.save_every=1000000")
    for stage, train in (("tokenizer", tokenizer_training.train_tokenizer), ("base", denoiser.train_denoiser)):
        trainer = train(make(stage, films, tmp_path, *endless), seconds=0.4)
        assert trainer.finished
        assert 0.4 <= trainer.elapsed < 20
        assert read_log(trainer.log_path)[-1]["lr"] < 0.2 * trainer.config.lr
    assert WaltPipeline.from_pretrained(tmp_path).generate("up", **QUICK).shape == (1, 5, 16, 16, 3)


def test_a_preview_is_handed_in(films, tmp_path):
    """Training itself makes no samples."""
    fit("tokenizer", films, tmp_path)
    seen = []

    def make_preview(run, tokenizer, diffusion, encoder):
        assert (run.out, encoder) == (tmp_path, None)
        return lambda module, step: seen.append((step, module.training))

    options = ("training.preview_every=1", "training.steps=2")
    denoiser.train_denoiser(make("base", films, tmp_path, *options), preview=make_preview)
    assert seen == [(1, False), (2, False)]
    shutil.rmtree(tmp_path / "transformer")
    denoiser.train_denoiser(make("base", films, tmp_path, *options))
    assert not (tmp_path / "previews").exists()


class TestImagesOnly:
    def test_stages(self, tmp_path):
        (tmp_path / "data" / "a").mkdir(parents=True)
        for i in range(3):
            picture = np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)
            write_png(tmp_path / "data" / "a" / f"{i}.png", picture)
        data, out = tmp_path / "data", tmp_path / "out"
        with pytest.raises(WaltError, match=r"holds no clip of 5 frames.* for pictures alone --frames 1"):
            fit("tokenizer", data, out)
        fit("tokenizer", data, out, "data.frames=1")
        fit("base", data, out, "data.frames=1")
        pipeline = WaltPipeline.from_pretrained(out)
        assert pipeline.clip.frames == 1
        assert pipeline.generate("a", 2, images=True, **QUICK).shape == (2, 16, 16, 3)
        assert pipeline.generate("a", 2, **QUICK).shape == (2, 1, 16, 16, 3)


def test_features_of_captions_are_computed_once(model, films, tmp_path, monkeypatch):
    """An encoder with features of its own, as those from Hugging Face folders have."""
    calls: list[str] = []

    class Lengths:
        name, length, width, vocabulary, unit = "lengths", 4, 3, 0, "letters"

        def encode(self, texts):
            calls.extend(texts)
            mask = torch.tensor([[bool(text)] * 4 for text in texts])
            return torch.tensor([[[float(len(text))] * 3] * 4 for text in texts]), mask

        def count(self, texts):
            return [len(text) for text in texts]

    monkeypatch.setattr(denoiser, "text_encoder", lambda name, length: Lengths())
    (tmp_path / "tokenizer").symlink_to(model / "tokenizer")
    with pytest.warns(WaltWarning, match="4 of 4 captions are longer than the 4 letters that .* 'lengths' reads"):
        trainer = fit("base", films, tmp_path, "data.text=lengths", "transformer.classes=0")
    assert trainer.model.config.text_width == 3
    assert sorted(calls) == ["", "stripes go down", "stripes go up"]
    coder = load_tokenizer(model / "tokenizer")
    source = denoiser.denoiser_source(
        make("base", films, tmp_path, "data.text=lengths"),
        coder,
        fingerprint(coder),
        trainer.model.config,
        Diffusion(),
        Lengths(),
    )
    loaded = make_batch(source, 0, 0, range(4))
    assert set(loaded) == {"latent", "image", "text", "text_mask", "randoms", "step"}
    assert "low_noise" not in loaded["randoms"]
    assert loaded["text"].unique().tolist() in ([13.0], [15.0], [13.0, 15.0])
    assert len(calls) == 3
