"""Old kernels against new ones: ``python -m benchmarks.compare --base REF``.

REF is checked out into a temporary git worktree and built there. The op tests of both sides run first, and where one
fails no speed is reported. Then child processes time the same cases (those of this tree) on either side in turn; a
round is one child of each, and the spread of the rounds' ratios is the noise. Nothing is left behind, also on Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .case import Case
from .cases import CASES, FILE_OF, chosen
from .machine import ROOT, machine, sentence
from .say import say

Times = dict[str, float | None]  # case, dtype and mode -> ms; None where that side cannot run it
LEAST_NOISE = 0.02  # below this, nothing is called faster or slower


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, metavar="REF", help="the git revision to compare with")
    parser.add_argument("--op", choices=sorted({case.op for case in CASES}), help="only this op")
    parser.add_argument("--case", metavar="NAME", help="only cases whose name contains this text")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    options = parser.parse_args(arguments)
    cases = chosen(options.op, options.case, options.quick)
    if not cases:
        parser.error(f"--case {options.case!r} matches nothing; cases: {', '.join(case.name for case in CASES)}")
    found = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{options.base}^{{commit}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if found.returncode:
        parser.error(f"--base {options.base!r} is no revision of {ROOT}")
    # A plain kill, too, must run the clean-up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with checked_out(found.stdout.strip()) as base:
            return compare(base, ROOT, cases, rounds=3 if options.quick else 7)
    except KeyboardInterrupt:
        print("interrupted; the temporary worktree is gone", file=sys.stderr)
        return 130


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A temporary worktree of ``commit``, removed afterwards whatever happens."""
    with tempfile.TemporaryDirectory(prefix="walt-compare-") as folder:
        tree = Path(folder) / "base"
        try:
            git("worktree", "add", "--quiet", "--detach", str(tree), commit)
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))
            git("worktree", "prune")


def git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=ROOT, check=False, stdout=subprocess.DEVNULL)


def build(tree: Path) -> bool:
    say(f"building {tree}")
    return not subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree).returncode


def passes(tree: Path, ops: list[str]) -> bool:
    """Whether the tests of these ops pass in ``tree``, with that tree's own tests and packages."""
    files = [f"tests/test_{name}.py" for name in dict.fromkeys(map(test_file, ops))]
    files = [file for file in files if (tree / file).exists()]
    say(f"testing {tree}: {' '.join(files)}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    return bool(files) and not subprocess.run(command, cwd=tree, env=environment(tree)).returncode


def test_file(op: str) -> str:
    return "training" if op == "training_step" else FILE_OF[op].__name__.split(".")[-1]


def environment(tree: Path) -> dict[str, str]:
    """Python finds the packages of ``tree`` before any that are installed."""
    return {**os.environ, "PYTHONPATH": str(tree)}


def compare(
    base: Path,
    new: Path,
    cases: list[Case],
    rounds: int,
    *,
    build: Callable[[Path], bool] = build,
    passes: Callable[[Path, list[str]], bool] = passes,
    measure: Callable[[Path, list[Case]], Times] | None = None,
) -> int:
    """Builds, tests, times and prints; 1 where a side does not build or does not pass."""
    measure = measure or time_tree
    ops = list(dict.fromkeys(case.op for case in cases))
    for name, tree in (("base", base), ("new", new)):
        if not build(tree):
            say(f"{name} does not build: no times")
            return 1
        if not passes(tree, ops):
            say(f"{name} fails its tests: no times")
            return 1
    times: dict[str, list[Times]] = {"base": [], "new": []}
    for i in range(rounds):
        say(f"round {i + 1} of {rounds}")
        # The order changes from round to round, so that neither side always comes first.
        for name, tree in sorted({"base": base, "new": new}.items(), reverse=bool(i % 2)):
            times[name].append(measure(tree, cases))
    print(table(times["base"], times["new"]))
    return 0


def table(base: list[Times], new: list[Times]) -> str:
    """Markdown: per case the medians of the rounds, the ratio new / base, and the noise of that ratio."""
    lines = [
        "| case | base ms | new ms | new / base | noise | |",
        "|---|---|---|---|---|---|",
    ]
    for key in new[0]:
        pairs = [(b.get(key), n.get(key)) for b, n in zip(base, new, strict=True)]
        both = [(b, n) for b, n in pairs if b is not None and n is not None]
        if not both:
            side = "base" if all(b is None for b, _ in pairs) else "new"
            lines.append(f"| {key} | | | | | does not run in {side} |")
            continue
        ratio, noise = ratio_of(both)
        verdict = "same" if abs(ratio - 1) <= max(noise, LEAST_NOISE) else "faster" if ratio < 1 else "SLOWER"
        before, after = (statistics.median(values) for values in zip(*both, strict=True))
        lines.append(f"| {key} | {before:.3f} | {after:.3f} | {ratio:.3f} | ±{noise:.3f} | {verdict} |")
    return "\n".join(lines)


def ratio_of(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """The median of the rounds' ratios new / base, and half the distance from their smallest to their largest."""
    ratios = [new / base for base, new in pairs]
    return statistics.median(ratios), (max(ratios) - min(ratios)) / 2


def time_tree(tree: Path, cases: list[Case]) -> Times:
    """A child process with the packages of ``tree`` and the benchmark of this one."""
    with tempfile.TemporaryDirectory(prefix="walt-compare-") as folder:
        # Python puts the folder it starts in first: only the benchmark may be found there.
        (Path(folder) / "benchmarks").symlink_to(ROOT / "benchmarks")
        command = [sys.executable, "-m", "benchmarks.compare_child", str(tree)]
        wanted = json.dumps([CASES.index(case) for case in cases])
        child = subprocess.run(
            command, cwd=folder, env=environment(tree), input=wanted, text=True, stdout=subprocess.PIPE, check=True
        )
        result: Any = json.loads(child.stdout)
        return dict(result)


if __name__ == "__main__":
    say(sentence(machine("cpu")))
    sys.exit(main())
