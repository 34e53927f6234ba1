"""``python -m benchmarks blocks``: the blocks of docs/kernels.md, of which its tables are; and a page as a program."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as benchmark
from benchmarks import blocks, memory, models, page
from benchmarks.machine import ROOT

TINY = [
    blocks.block("Block", "causal block, tiny", (32,), (1, 32, 2, 6, 6), channels_last=True, quick=True),
    blocks.block("Windows", "windows, tiny", (16, 2, (2, 2, 2)), (1, 2, 4, 4, 16), quick=True),
    blocks.block("Transformer", "transformer block, tiny", (16, 2), (2, 4, 16), run=blocks.call_with_condition),
]
EVERY = {model.name: model for model in blocks.blocks()}


def test_a_table_for_each_block(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(blocks, "blocks", lambda: [replace(model, quick=True) for model in TINY])
    monkeypatch.setattr(models, "peaks_apart", models.peaks)  # another process imports for seconds
    out, text = tmp_path / "rows.json", tmp_path / "page.md"
    text.write_text("".join("{}\nold\n{}\nbetween\n".format(*blocks.marks(name)) for name in blocks.BLOCKS))
    assert benchmark.main(["blocks", "--quick", "--json", str(out), "--page", str(text)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["model"] for row in rows] == [model.name for _ in models.DTYPES for model in TINY for _ in models.MODES]
    for row in rows:
        assert row["ms"].keys() == row["mib"].keys() == {"before", "after"}  # nothing is compiled by --quick
        assert 0 < row["error_ratio"] <= 1
        assert row["replaced"] in ("PlainBlock -> Block", "PlainWindows -> Windows", "PlainTransformer -> Transformer")
        if row["mode"] == "forward+backward":
            assert 0 < row["kept"]["after"] < row["kept"]["before"]
    written = text.read_text()
    assert len(re.findall(r"^\| tiny \| (?:fp32|bf16) \| [\d.]+x \| [\d.]+x \|", written, re.M)) == 6
    assert written.count("between") == 3
    assert "old" not in written
    assert "float32, forward: geometric mean" in capsys.readouterr().out


def test_under_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "peaks_apart", models.peaks)
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(type(module).__name__))
    rows = list(models.rows_of(TINY[1], torch.float32, "cpu", 0.01))
    assert set(compiled) == {"PlainWindows"}
    assert all([*row["ms"]] == [*row["mib"]] == ["before", "compiled", "after"] for row in rows)
    assert re.fullmatch(
        r"\| tiny \| fp32 (\| [\d.]+x, [\d.]+x ){2}(\| \d+, \d+, \d+ ){3}\|",
        blocks.section(rows, "windows").splitlines()[2],
    )


@pytest.mark.parametrize("name", EVERY)
def test_blocks_run_at_their_sizes(name: str) -> None:
    model = EVERY[name]
    assert name.startswith(blocks.BLOCKS)
    with torch.device("meta"), torch.no_grad():
        plain = model.make().eval()
        for block in (plain, model.change(plain)[0]):
            assert block.state_dict().keys() == plain.state_dict().keys()
            assert model.run(block, torch.empty(model.shape)).shape == model.shape


def test_another_result_has_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def changed(plain: torch.nn.Module) -> tuple[torch.nn.Module, str]:
        with torch.no_grad():
            plain.proj.bias += 0.01
        return plain, ""

    monkeypatch.setattr(blocks, "blocks", lambda: [replace(TINY[1], change=changed)])
    assert blocks.main(["--quick", "--dtype", "float32"]) == 1
    assert "windows, tiny, float32: another result, not timed: output: largest error" in capsys.readouterr().out


def test_what_is_kept_is_what_the_page_counts() -> None:
    for model in TINY:
        for way in ("before", "after"):
            module, x, _ = models.build(model, torch.float32, "cpu", way)
            mib = memory.kept(lambda module=module, x=x, run=model.run: run(module, x))
            assert (
                mib == page.definitions(blocks.PAGE).kept(lambda module=module, x=x, run=model.run: run(module, x)) > 0
            )


def test_definitions_of_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "ROOT", tmp_path)
    program = "import math\n\nclass A:\n    def area(self):\n        return math.pi\n\nraise SystemExit\n"
    (tmp_path / "a page.md").write_text(
        f"```python\n{program}```\n```diff\n-class A:\n+class B:\n```\n```text\n?\n```\n"
    )
    found = page.definitions("a page.md")
    assert found.A().area() == found.B().area()
    with pytest.raises(AssertionError, match="no single"):
        page.patched("a = 1\n", "-b = 1\n+b = 2\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "nothing"], "matches nothing; blocks: causal block"),
        (["--page", str(ROOT / "pyproject.toml")], "has no single pair of lines"),
        (["--page", "no such file"], "No such file"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        blocks.main(arguments)
    assert message in capsys.readouterr().err
