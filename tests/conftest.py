"""Uninitialised memory is NaN while tests run: a kernel that leaves an output unwritten fails, never passes by luck."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors

# For `benchmarks`, which is not installed. At the end, so that an installed walt_kernels is the one that is tested.
sys.path.append(str(Path(__file__).resolve().parent.parent))

# `with torch.device(...)` knows the constructors by identity and looks once: let it see the real ones.
_device_constructors()


def pytest_collection_finish() -> None:
    """What was imported for all tests stays: no later garbage collection has to walk through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(make):
        def empty(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point() and tensor.device.type != "meta" and not torch.compiler.is_compiling():
                tensor.fill_(float("nan"))
            return tensor

        return empty

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four films of two classes with captions (`tiny_runs.write_films`)."""
    pytest.importorskip("av", reason="PyAV is not installed")
    from tiny_runs import write_films

    return write_films(tmp_path_factory.mktemp("films") / "films")
