"""The command `walt`: help, one-line errors and exit codes. The commands' work is in test_commands.py, test_demo.py."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
from command_line import command, fails

from walt.cli import COMMANDS, main, parse
from walt.commands import info
from walt.commands.data import Prepare
from walt.commands.options import SHORT, Command
from walt.demo.config import DemoConfig
from walt.errors import WaltError
from walt.settings import SECTIONS

NAMES = (
    *("demo", "demo-data", "prepare", "train", "sample", "extend", "upscale", "encode", "decode", "evaluate"),
    *("info", "doctor"),
)


def help_of(capsys, *arguments: str) -> str:
    assert main([*arguments, "--help"]) == 0
    return capsys.readouterr().out


def options_of(text: str) -> dict[str, str]:
    """The options in a help text, by their last name, and what is said of them."""
    entries = re.split(r"^  (?=-|\{|\[)", text, flags=re.MULTILINE)[1:]
    found = {}
    for entry in entries:
        names = re.match(r"((?:-{1,2}[\w.-]+(?: [^\s,]+(?: \.\.\.)?)?(?:, )?)+)", entry)
        if names:
            name = re.findall(r"-{1,2}[\w.-]+", names[1])[-1]
            found[name] = " ".join(entry[names.end() :].partition("\n\n")[0].split())
    return found


class TestHelp:
    def test_top_lists_every_command(self, capsys):
        text = help_of(capsys)
        assert tuple(re.findall(r"^    ([a-z-]+)\b", text, re.MULTILINE)) == NAMES

    def test_the_bare_command_prints_it_too(self, capsys):
        assert main([]) == 0
        assert capsys.readouterr().out == help_of(capsys)

    def test_top_imports_nothing_heavy(self):
        """Neither PyTorch nor what reads the options, and so within a second."""
        heavy = {"torch", "tyro", "numpy", "yaml", "walt_kernels", "walt.settings"}
        code = f"import sys; from walt.cli import main; main(['--help']); print({heavy} & sys.modules.keys())"
        began = sum(os.times()[2:4])
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert sum(os.times()[2:4]) - began < 1  # seconds of work, whatever else runs here
        assert done.stdout.endswith("\nset()\n")

    @pytest.mark.parametrize("name", NAMES)
    def test_examples_are_commands(self, name, capsys, tmp_path, monkeypatch):
        """Every example parses, and would run the command whose help it is in."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "base.yaml").write_text("training: {lr: 3e-4}")
        text = help_of(capsys, name)
        examples = text[text.index("example:  ") + len("example:  ") :].splitlines()
        assert examples
        for line in examples:
            words = shlex.split(line)
            start = words.index("walt") + 1
            assert " ".join(words[:start]) in ("walt", "torchrun --nproc-per-node 2 -m walt")
            assert words[start] == name
            assert isinstance(parse(name, words[start + 1 :]), Command)

    @pytest.mark.parametrize("name", NAMES)
    def test_every_option_is_explained(self, name, capsys):
        options = options_of(help_of(capsys, name))
        place, _ = COMMANDS[name]
        module, _, kind = place.partition(".")
        fields = dataclasses.fields(getattr(importlib.import_module(f"walt.commands.{module}"), kind))
        assert len(options) >= len(fields)
        for option, text in options.items():
            assert text.partition(" (default: ")[0].partition("(required)")[0], f"{name} {option}"

    def test_train_lists_every_setting(self, capsys):
        """With the default of the stage and the preset."""
        options = options_of(help_of(capsys, "train", "base", "--preset", "L"))
        for section, name in SECTIONS.items():
            for field in dataclasses.fields(section):
                option = f"--{name}.{field.name}".replace("_", "-")
                assert "(default: " in options[option], option
        assert options["--training.steps"].endswith("(default: 60000)")
        assert options["--transformer.latent-size"].endswith("(default: 5 16 16)")
        assert options["--data.flip"] == "mirror half of the clips (default: false)"
        options = options_of(help_of(capsys, "train", "tokenizer"))
        assert options["--data.batch"].endswith("(default: 2)")
        assert SHORT.keys() <= options.keys()

    def test_fits_a_narrow_terminal(self, capsys):
        for name in NAMES:
            _usage, *lines = help_of(capsys, name).partition("example:")[0].splitlines()
            assert max(map(len, lines)) <= 100, name

    def test_demo_options_cover_the_settings(self, capsys):
        text = help_of(capsys, "demo")
        assert f"default: {DemoConfig().minutes:g}" in text
        for option in ("--minutes", "--seed", "--tokenizer-steps", "--transformer-steps", "--scenarios"):
            assert option in text


class TestInfo:
    def test_of_a_preset(self, capsys):
        assert main(["info", "L"]) == 0
        text = capsys.readouterr().out
        assert text.startswith("L\n")
        assert "313.2 M" in text

    def test_all(self, capsys, monkeypatch):
        monkeypatch.setattr(
            "walt.commands.info.table", lambda batch: f"the table for {batch}"
        )  # takes seconds: test_cost.py
        assert main(["info", "--all", "--batch", "3"]) == 0
        assert capsys.readouterr().out == "the table for 3\n"

    def test_unknown(self, capsys):
        assert "unknown preset or folder 'S'; there are tiny, L" in fails(capsys, "info", "S")
        assert "unknown preset or folder 'tiny-dom'; did you mean tiny-doom?" in fails(capsys, "info", "tiny-dom")


class TestBadInput:
    def test_unknown_command_and_option(self, capsys):
        assert "unknown command 'dance'; there are demo, demo-data, prepare, " in fails(capsys, "dance")
        assert fails(capsys, "evaluat").endswith("unknown command 'evaluat'; did you mean evaluate?")
        line = fails(capsys, "sample", "--from", "x", "--guidence", 3)
        assert line == "walt sample: error: unknown option --guidence; did you mean --guidance?"
        assert fails(capsys, "info", "L", "XL").endswith("error: unknown argument 'XL'")
        assert fails(capsys, "prepare", "--data", "x", "--out").endswith("error: --out: expected a value")
        assert fails(capsys, "prepare", "--data", "--out", "y").endswith("error: --data: expected a value")
        assert "--steps: 'many' is not a whole number" in fails(capsys, "sample", "--from", "x", "--steps", "many")
        assert "--minutes: -1 must be above 0" in fails(capsys, "demo", "--minutes", "-1")
        assert "--num: 0 must be at least 1" in fails(capsys, "sample", "--from", "x", "--num", "0")
        assert "--seed: -1 must not be negative" in fails(capsys, "sample", "--from", "x", "--seed", "-1")
        assert "--size: 'big' is not a whole number" in fails(capsys, "train", "base", "--size", "big")
        assert "required: --data" in fails(capsys, "evaluate")
        assert "unknown option --form; did you mean --from?" in fails(capsys, "sample", "--form", "x")
        assert "--seed: 9223372036854775808 must be below 2^63" in fails(
            capsys, "sample", "--from", "x", "--seed", 2**63
        )

    def test_sizes_of_the_demo(self, capsys, tmp_path):
        line = fails(capsys, "demo", "--out", tmp_path / "out", "--frames", "16")
        assert "16" in line
        assert "1 + 4k" in line
        assert "height: got 60" in fails(capsys, "demo", "--out", tmp_path / "out", "--size", "60")
        assert "unknown scenario 'chess'; there are basic" in fails(
            capsys, "demo", "--out", tmp_path / "out", "--scenarios", "chess"
        )
        assert not (tmp_path / "out").exists()

    def test_a_release_has_no_options_of_the_demo(self, capsys, tmp_path):
        for option in (("--minutes", "10"), ("--tokenizer-steps", "4"), ("--out", tmp_path)):  # a default, too
            line = fails(capsys, "demo", "--release", tmp_path / "out", *option)
            assert line.endswith(f"error: {option[0]}: --release takes no option but --seed; leave it out")

    def test_a_package_of_no_extra(self, capsys, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
        line = fails(capsys, "demo", "--release", tmp_path / "out")
        assert "efficientnet_lite_pytorch cannot be imported" in line
        assert line.endswith("install it with: pip install --no-deps efficientnet-lite-pytorch==0.1.0")
        assert not (tmp_path / "out").exists()

    def test_a_package_of_an_extra(self, capsys, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        line = fails(capsys, "sample", "--from", "hub:someone/something")
        assert 'install it with: pip install "walt-kernels[hub]"' in line

    def test_long_messages_are_one_line(self, capsys, monkeypatch):
        def broken(_):
            raise WaltError("first\n   second\n\nthird")

        monkeypatch.setattr(info.Info, "run", broken)
        assert fails(capsys, "info").endswith("error: first second third")

    @pytest.mark.parametrize(("number", "code"), [(None, 130), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_interrupted(self, capsys, monkeypatch, number, code):
        def interrupt(_):
            interruption = KeyboardInterrupt("halfway")
            if number is not None:
                interruption.signal = number
            raise interruption

        monkeypatch.setattr(Prepare, "run", interrupt)
        assert main(["prepare", "--data", "x", "--out", "y"]) == code
        assert "interrupted: halfway; run the same command again to go on" in capsys.readouterr().err

    def test_sigterm_ends_any_command_as_ctrl_c_does(self, capsys, monkeypatch):
        before = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(info.Info, "run", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert main(["info"]) == 143
        assert capsys.readouterr().err == "\nwalt: interrupted\n"
        assert signal.getsignal(signal.SIGTERM) == before


class TestSettings:
    """Of `walt train`: one line that names the setting."""

    def parse(self, *words: object):
        return parse("train", ["base", "--data", "x", "--out", "y", *map(str, words)]).settings

    def test_whole_numbers_are_those_of_python(self, capsys):
        """010 is 10, as an array job writes it, and not YAML's octal 8."""
        assert self.parse("--seed", "010", "--steps", "0008").training.seed == 10
        for word in ("1:30", "0x10", "1e3"):
            assert f"got '{word}'; expected a whole number" in fails(
                capsys, "train", "base", "--data", "x", "--out", "y", "--steps", word
            )

    def test_over_the_file_and_the_preset(self, tmp_path):
        (tmp_path / "a.yaml").write_text("preset: tiny-text\ntraining: {lr: 1e-4, steps: 7, warmup: 3}\n")
        made = self.parse(
            "--config", tmp_path / "a.yaml", "--steps", 9, "--training.save-every=5", "--training.lr", "2e-4"
        )
        assert (made.preset, made.training.steps, made.training.warmup) == ("tiny-text", 9, 3)
        assert (made.training.save_every, made.training.lr) == (5, 2e-4)
        assert self.parse("--config", tmp_path / "a.yaml", "--preset", "tiny").transformer.text_vocabulary == 0

    def test_spellings(self):
        made = self.parse("--training.save_every", 5, "--training.betas", 0, "9e-1", "--data.flip", "true")
        assert (made.training.save_every, made.training.betas, made.data.flip) == (5, (0.0, 0.9), True)
        made = self.parse("--transformer.spatial-window=[1, 2, 2]", "--training.tensorboard", "null", "--data.text", "")
        assert (made.transformer.spatial_window, made.training.tensorboard, made.data.text) == ((1, 2, 2), None, "")

    def test_short_names(self):
        made = self.parse("--steps", 3, "--batch", 2, "--frames", 9, "--fps", 12, "--lr", "1e-5", "--seed", 4)
        assert (made.training.steps, made.training.lr, made.training.seed) == (3, 1e-5, 4)
        assert (made.data.batch, made.data.frames, made.data.fps) == (2, 9, 12.0)
        made = self.parse("--size", "16x24", "--data.width", 32)
        assert (made.data.height, made.data.width) == (16, 32)

    def test_fields_that_must_fit_one_another(self):
        for words in (("--transformer.width=60", "--transformer.heads=5"),) * 2:
            made = self.parse(*words)
            assert (made.transformer.width, made.transformer.heads) == (60, 5)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--training.lrr", "3"], "unknown option --training.lrr; did you mean --training.lr?"),
            (["--trainng.lr", "3"], "unknown option --trainng.lr; did you mean --training.lr?"),
            (["--warmup", "3"], "unknown option --warmup; did you mean --training.warmup?"),
            (["--training.save_evry=3"], "unknown option --training.save-evry; did you mean --training.save-every?"),
            (["--zzz"], "unknown option --zzz"),
            (["--training.lr", "fast"], "--training.lr: got 'fast'; expected a number"),
            (["--lr", "-1"], "--training.lr: got -1.0; expected a number > 0"),
            (["--lr"], "--lr: expected a value"),
            (["--training.lr", "--steps", "3"], "--training.lr: expected a value"),
            (["--transformer.heads", "5"], "--transformer.heads: got 5; expected a divisor of width=192"),
            (["--transformer.latent-size", "5", "8"], "--transformer.latent_size: got (5, 8); expected 3 ints >= 1"),
            (["--data.flip", "maybe"], "--data.flip: got 'maybe'; expected true or false"),
            (["--preset", "huge"], "unknown preset 'huge'; there are tiny, L, "),
            (["--set=training.lr=3"], "--set training.lr=3 is now an option of its own: --training.lr 3"),
            (["-s", "training.lr=3"], "-s training.lr=3 is now an option of its own: --training.lr 3"),
            (["--set", "data.flip=true"], "--set data.flip=true is now an option of its own: --data.flip true"),
        ],
    )
    def test_bad_ones(self, capsys, tmp_path, words, message):
        line = fails(capsys, "train", "base", "--data", tmp_path, "--out", tmp_path / "out", *words)
        assert line.startswith(f"walt train: error: {message}")
        assert not (tmp_path / "out").exists()

    def test_a_stage_comes_first(self, capsys):
        for words in ((), ("--data", "x", "base"), ("bass",)):
            line = fails(capsys, "train", *words)
            assert line.startswith(
                f"walt train: error: got {(words or ('',))[0]!r}; expected a stage first: tokenizer, base"
            )
        assert line.endswith("tokenizer, base, sr; did you mean base?")


def test_no_traceback_from_the_real_process(tmp_path):
    process = command("sample", "--from", str(tmp_path / "nowhere"))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output == ""
    assert errors == f"walt: error: no such folder: {tmp_path / 'nowhere'}\n"
