"""The command `walt` in a process of its own, or in this one where it fails."""

from __future__ import annotations

import os
import subprocess
import sys

from walt.cli import main


def command(*arguments: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    return subprocess.Popen(
        [sys.executable, "-m", "walt", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def fails(capsys, *arguments: object) -> str:
    """Run in this process; exit code 2 and exactly one line on stderr, which is returned."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error: " in line]
    assert code == 2, captured.err
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return lines[0]
