"""walt.settings: presets with the paper's recipes, a file over them, overrides over both, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from walt.errors import WaltError
from walt.presets import PRESETS
from walt.settings import DataConfig, load_settings


def given(*texts: str) -> dict[str, Any]:
    """ "training.lr=1e-4" as a YAML file has it."""
    return {name: yaml.safe_load(value) for name, _, value in (text.partition("=") for text in texts)}


class TestPresets:
    def test_each_has_clips_that_fit_its_models(self):
        for name, (tokenizer, transformer) in PRESETS.items():
            stage = "sr1" if transformer.low_resolution else "base"
            settings = load_settings(stage, preset=name)
            data = settings.data
            assert tokenizer.latent_shape(data.frames, data.height, data.width)[1:] == transformer.latent_size
            assert (settings.preset, settings.tokenizer, settings.transformer) == (name, tokenizer, transformer)

    def test_the_paper(self):
        settings = load_settings("base", preset="L")
        assert settings.data == DataConfig(17, 128, 128, batch=256, images=0)
        training = settings.training
        assert (training.steps, training.lr, training.optimizer) == (60_000, 5e-4, "adamw")
        assert training.ema_decay > 0.999
        training = load_settings("base", preset="L-T2V").training
        assert (training.steps, training.lr, training.optimizer, training.ema_decay) == (550_000, 2e-4, "adafactor", 0)
        assert load_settings("sr1", preset="sr-1.3B").data == DataConfig(17, 256, 448, batch=512, images=0)

    def test_tokenizer(self):
        settings = load_settings("tokenizer", preset="L")
        assert (settings.losses.perceptual, settings.losses.adversarial, settings.losses.r1) == (0.1, 0.1, 10.0)
        assert settings.training.betas == (0.0, 0.99)
        small = load_settings("tokenizer")
        assert small.preset == "tiny"
        assert (small.losses.perceptual, small.losses.adversarial, small.data.frames) == (0, 0, 17)

    def test_defaults_of_the_stages(self):
        assert load_settings("base").preset == "tiny"
        assert load_settings("sr2").preset == "tiny-sr"
        assert load_settings("sr1").data.images == 0
        assert load_settings("base", preset="tiny-text").data.text == "bytes"
        assert load_settings("tokenizer", preset="tiny-text").data.text == ""


class TestValues:
    def test_floats_by_any_spelling(self):
        for text in ("1e-4", "0.0001", "'1e-4'", "1.0e-4"):
            assert load_settings("base", overrides=given(f"training.lr={text}")).training.lr == 1e-4
        settings = load_settings("base", overrides=given("training.clip_norm=2", "losses.r1=1"))
        assert repr(settings.training.clip_norm) == "2.0"
        assert repr(settings.losses.r1) == "1.0"

    def test_lists_are_tuples(self):
        settings = load_settings(
            "base", overrides=given("transformer.spatial_window=[1, 2, 2]", "training.betas=[0, 9e-1]")
        )
        assert settings.transformer.spatial_window == (1, 2, 2)
        assert settings.training.betas == (0.0, 0.9)

    def test_of_several_overrides_the_last_counts(self):
        settings = load_settings("base", overrides=given("training.steps=5", "training.seed=3", "training.steps=6"))
        assert (settings.training.steps, settings.training.seed) == (6, 3)

    def test_fields_that_must_fit_one_another(self):
        changes = ["transformer.width=60", "transformer.heads=5"]
        for overrides in (changes, changes[::-1]):
            settings = load_settings("base", overrides=given(*overrides))
            assert (settings.transformer.width, settings.transformer.heads) == (60, 5)
        with pytest.raises(WaltError, match=r"^transformer.heads: got 7; expected a divisor of width=60"):
            load_settings("base", overrides=given("training.lr=1", changes[0], "transformer.heads=7"))

    def test_null_and_booleans(self):
        settings = load_settings("base", overrides=given("training.tensorboard=null", "data.flip=true", "data.text=''"))
        assert settings.training.tensorboard is None
        assert settings.data.flip is True
        assert settings.data.text == ""


class TestFile:
    def test_over_the_preset_and_under_the_overrides(self, tmp_path):
        file = tmp_path / "run.yaml"
        file.write_text("preset: tiny-text\ntraining: {lr: 1e-4, steps: 7}\ndata:\n  batch: 8\n")
        settings = load_settings("base", file=file, overrides=given("training.steps=9"))
        assert settings.preset == "tiny-text"
        assert (settings.training.lr, settings.training.steps, settings.data.batch) == (1e-4, 9, 8)
        assert settings.data.text == "bytes"
        assert load_settings("base", preset="tiny", file=file).transformer.classes == 8

    @pytest.mark.parametrize(("stage", "preset"), [("tokenizer", "L"), ("base", "L-T2V"), ("sr1", "tiny-sr")])
    def test_saved_settings_load_back(self, tmp_path, stage, preset):
        overrides = ["training.lr=3e-5", "training.betas=[0.5, 0.9]", "data.flip=true"]
        settings = load_settings(stage, preset=preset, overrides=given(*overrides))
        settings.save(tmp_path / "saved.yaml")
        assert load_settings(stage, file=tmp_path / "saved.yaml") == settings
        document = yaml.safe_load((tmp_path / "saved.yaml").read_text())
        assert document["preset"] == preset
        assert document["training"]["lr"] == 3e-5

    def test_of_one_stage_for_another(self, tmp_path):
        """The file's sections count, also where the recipe of the stage would have others."""
        first = load_settings("tokenizer", overrides=given("tokenizer.channels=4"))
        first.save(tmp_path / "tokenizer.yaml")
        second = load_settings("base", file=tmp_path / "tokenizer.yaml", overrides=given("data.frames=9"))
        assert second.tokenizer == first.tokenizer
        assert second.training == first.training
        assert second.data.frames == 9
        with pytest.raises(WaltError, match=r"transformer.low_resolution is false, which does not fit the stage sr1"):
            load_settings("sr1", file=tmp_path / "tokenizer.yaml")


class TestRefused:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("lr=3", "unknown section 'lr'; there are tokenizer, transformer"),
            ("sampling.steps=3", "unknown section 'sampling'; there are tokenizer, transformer"),
            ("training.rate=3", "unknown setting training.rate"),
            ("training.lrr=3", "unknown setting training.lrr; did you mean training.lr?"),
            ("training.zzz=3", "unknown setting training.zzz; walt train --help lists all"),
            ("training.=3", "unknown setting training."),
            ("training.lr=fast", "^training.lr: got 'fast'; expected a number"),
            ("training.lr=true", "training.lr: got True; expected a number"),
            ("training.lr=null", "training.lr: got None; expected a number"),
            ("training.lr=-1", "^training.lr: got -1.0; expected a number > 0"),
            ("training.steps=many", "training.steps: got 'many'; expected a whole number"),
            ("training.steps=1.5", "training.steps: got 1.5; expected a whole number"),
            ("training.betas=[a, b]", "training.betas: got 'a'; expected a number"),
            ("training.betas=0.9", "betas: got 0.9; expected two numbers"),
            ("training.precision=float16", "precision: got 'float16'; expected float32 or bfloat16"),
            ("transformer.latent_size=[5, 8, x]", "transformer.latent_size: got 'x'; expected a whole number"),
            ("transformer.heads=5", "heads: got 5; expected a divisor of width=192"),
            ("diffusion.drop_probability=lots", "diffusion.drop_probability: got 'lots'; expected a number"),
            ("diffusion.steps=few", "diffusion.steps: got 'few'; expected a whole number"),
            ("data.flip=sometimes", "flip: got 'sometimes'; expected true or false"),
            ("data.text=3", "text: got 3; expected the name of a text encoder"),
            ("data.images=5", "images: got 5; expected an int from 0 to batch=4"),
            ("data.frames=16", "data: video: got 16 frames; expected 1 \\+ 4k, the nearest being 13 or 17"),
            ("data.height=60", "data: height: got 60 pixels; expected a multiple of 8, such as 56 or 64"),
        ],
    )
    def test_overrides(self, override, message):
        with pytest.raises(WaltError, match=message):
            load_settings("base", overrides=given(override))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("training: {lr: fast}", "run.yaml: training.lr: got 'fast'; expected a number"),
            ("diffusion: {beta_end: high}", "run.yaml: diffusion.beta_end: got 'high'"),
            ("training: {pace: 1}", "run.yaml: unknown setting training.pace"),
            ("training: {batchsize: 1, 3: 4}", "run.yaml: unknown setting training.batchsize; walt train --help"),
            ("data: {batchs: 1}", "run.yaml: unknown setting data.batchs; did you mean data.batch?"),
            ("speed: {}", "run.yaml: unknown section 'speed'"),
            ("training: 3", "run.yaml: section training holds 3, expected fields"),
            ("preset: [tiny]", r"run.yaml: unknown preset \['tiny'\]; did you mean tiny\?"),
            ("preset: tinny", r"run.yaml: unknown preset 'tinny'; did you mean tiny\?"),
            ("trainng: {lr: 1}", r"run.yaml: unknown section 'trainng'; did you mean training\?"),
            ("preset: huge", "unknown preset 'huge'; there are tiny, L"),
            ("- 1", "run.yaml holds a list, expected sections"),
            ("", "run.yaml holds a NoneType, expected sections"),
            ("a: [", "run.yaml is not YAML"),
            ("!!python/object/apply:os.system ['true']", "run.yaml is not YAML"),
        ],
    )
    def test_files(self, tmp_path, text, message):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(WaltError, match=message):
            load_settings("base", file=tmp_path / "run.yaml")

    def test_missing_file(self, tmp_path):
        with pytest.raises(WaltError, match=r"cannot read .*none.yaml: No such file"):
            load_settings("base", file=tmp_path / "none.yaml")

    def test_a_preset_of_another_stage(self):
        with pytest.raises(WaltError, match=r"low_resolution is true, which does not fit the stage base; .*tiny-sr"):
            load_settings("base", preset="tiny-sr")
