"""The command `walt`: help, one-line errors and exit codes. The commands' work is in test_commands.py, test_demo.py."""

from __future__ import annotations

import re
import shlex
import sys

import pytest
from command_line import command, fails

from walt import commands
from walt.cli import main, parser
from walt.demo.demo import DemoConfig
from walt.errors import WaltError

COMMANDS = (
    *("demo", "demo-data", "prepare", "train", "sample", "extend", "upscale", "encode", "decode", "evaluate"),
    *("info", "doctor"),
)


def help_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


class TestHelp:
    def test_top_lists_every_command(self, capsys):
        text = help_of(capsys)
        assert tuple(re.findall(r"^    ([a-z-]+)\b", text, re.MULTILINE)) == COMMANDS

    @pytest.mark.parametrize("name", COMMANDS)
    def test_examples_are_commands(self, name, capsys):
        """Every example parses, and would run the command whose help it is in."""
        text = help_of(capsys, name)
        examples = text[text.index("example:  ") + len("example:  ") :].splitlines()
        assert examples
        for line in examples:
            words = shlex.split(line)
            start = words.index("walt") + 1
            assert " ".join(words[:start]) in ("walt", "torchrun --nproc-per-node 2 -m walt")
            arguments = parser().parse_args(words[start:])
            assert arguments.command == name
            assert callable(arguments.run)

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_option_is_explained(self, name, capsys):
        help_of(capsys, name)
        choices = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
        for action in choices[name]._actions:
            assert action.help, f"{name} {action.dest}"

    def test_defaults_are_told_as_numbers(self, capsys):
        for name in COMMANDS:
            assert "%(" not in help_of(capsys, name)

    def test_demo_options_cover_the_settings(self, capsys):
        text = help_of(capsys, "demo")
        assert f"default: {DemoConfig().minutes}" in text
        for option in ("--minutes", "--seed", "--tokenizer-steps", "--transformer-steps", "--scenarios"):
            assert option in text


class TestInfo:
    def test_of_a_preset(self, capsys):
        assert main(["info", "L"]) == 0
        text = capsys.readouterr().out
        assert text.startswith("L\n")
        assert "313.2 M" in text

    def test_all(self, capsys, monkeypatch):
        monkeypatch.setattr(commands, "table", lambda batch: f"the table for {batch}")  # takes seconds: test_info.py
        assert main(["info", "--all", "--batch", "3"]) == 0
        assert capsys.readouterr().out == "the table for 3\n"

    def test_unknown(self, capsys):
        assert "unknown preset 'S'; there are tiny, L" in fails(capsys, "info", "S")


class TestBadInput:
    def test_unknown_command_and_option(self, capsys):
        assert "invalid choice: 'dance'" in fails(capsys, "dance")
        assert "--steps: 'many' is not a whole number" in fails(capsys, "sample", "--from", "x", "--steps", "many")
        assert "--minutes: -1 must be above 0" in fails(capsys, "demo", "--minutes", "-1")
        assert "--num: 0 must be at least 1" in fails(capsys, "sample", "--from", "x", "--num", "0")
        assert "--seed: -1 must not be negative" in fails(capsys, "sample", "--from", "x", "--seed", "-1")
        assert "--size: 'big' is not a whole number" in fails(capsys, "prepare", "--data", "x", "--size", "big")
        assert "required: --from" in fails(capsys, "sample")

    def test_sizes_of_the_demo(self, capsys, tmp_path):
        line = fails(capsys, "demo", "--out", tmp_path / "out", "--frames", "16")
        assert "16" in line
        assert "1 + 4k" in line
        assert "height: got 60" in fails(capsys, "demo", "--out", tmp_path / "out", "--size", "60")
        assert "unknown scenario 'chess'; there are basic" in fails(
            capsys, "demo", "--out", tmp_path / "out", "--scenarios", "chess"
        )
        assert not (tmp_path / "out").exists()

    def test_a_package_of_no_extra(self, capsys, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
        line = fails(capsys, "demo", "--out", tmp_path / "out")
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

        monkeypatch.setattr(commands, "info", broken)
        assert fails(capsys, "info").endswith("error: first second third")

    def test_interrupted(self, capsys, monkeypatch):
        def interrupt(_):
            raise KeyboardInterrupt("halfway")

        monkeypatch.setattr(commands, "prepare", interrupt)
        assert main(["prepare", "--data", "x", "--out", "y"]) == 130
        assert "interrupted: halfway; run the same command again to go on" in capsys.readouterr().err


def test_no_traceback_from_the_real_process(tmp_path):
    process = command("sample", "--from", str(tmp_path / "nowhere"))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output == ""
    assert errors == f"walt: error: no such folder: {tmp_path / 'nowhere'}\n"
