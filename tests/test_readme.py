"""The README's claims that a machine can check."""

from __future__ import annotations

import re
from pathlib import Path

import walt_kernels

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_drop_in_example_runs() -> None:
    (example,) = re.findall(r"## Drop-in use\n+```python\n(.*?)```", README, re.S)
    assert "torch.equal" in example  # it checks itself: chunked == whole
    exec(compile(example, "README.md", "exec"), {})


def test_every_op_is_introduced() -> None:
    for name in walt_kernels._dispatch.ops():
        assert name in README


def test_length() -> None:
    assert len(README.splitlines()) < 200
