"""``python -m benchmarks memory``: two peaks of the same step."""

from __future__ import annotations

import re

import pytest
import torch
from found_ops import needs_native

from benchmarks import __main__ as benchmark
from benchmarks import memory, training_memory, training_step
from walt_kernels import _native, causal_conv3d


def test_it_measures_ours_and_the_reference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = training_step.build
    built: list[tuple[object, ...]] = []

    def small(stage: str, *arguments: object) -> object:
        built.append((stage, *arguments))
        return build("tokenizer tiny", 1, 5, 16, torch.float32, "cpu")

    monkeypatch.setattr(training_memory, "build", small)
    assert benchmark.main(["memory", "--frames", "5", "--size", "16", "--dtype", "bfloat16"]) == 0
    assert built[0] == ("tokenizer L", 1, 5, 16, torch.bfloat16, "cpu")
    found = dict(re.findall(r"^(ours|eager reference) +(\d+ MiB|unknown)$", capsys.readouterr().out, re.M))
    assert set(found) == {"ours", "eager reference"}


@pytest.mark.parametrize("arguments", [["--frames", "0"], ["--frames", "6"], ["--size", "15"], ["--size", "0"]])
def test_clips_that_the_tokenizer_cannot_take_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        training_memory.main(arguments)
    assert f"{arguments[0]} {arguments[1]}, expected" in capsys.readouterr().err


@needs_native
def test_the_kernels_kept_memory_counts_at_every_call() -> None:
    x, weight = torch.randn(1, 64, 9, 32, 32), torch.randn(64, 64, 3, 3, 3)

    def call() -> None:
        causal_conv3d(x, weight)

    first = memory.peak(call)
    if first is None:
        pytest.skip("this system does not tell")
    second = memory.peak(call)
    assert second is not None
    least = x.nbytes / 2**20 + 2  # the output, and what the kernel works in
    assert min(first, second) > least
    _native.C.free_scratch()  # twice in a row, and without anything kept
    _native.C.free_scratch()
    causal_conv3d(x, weight)
