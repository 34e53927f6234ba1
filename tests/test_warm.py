"""``warm``: kernels are noted without running, compiled by other processes, and found on disk by the first launch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import walt_kernels
from walt_kernels import _dispatch, _triton, _warm
from walt_kernels.testing import sample_call

if _triton.reason is not None:
    pytest.skip(str(_triton.reason), allow_module_level=True)
if _triton.INTERPRET:
    pytest.skip("kernels are interpreted, not compiled, under TRITON_INTERPRET=1", allow_module_level=True)

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Hopper:
    """Triton's driver of a GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", Hopper())
    yield tmp_path
    for kernel in kernels():
        kernel.device_caches.clear()


def kernels() -> list[Any]:
    modules = [module for name, module in sys.modules.items() if name.startswith("walt_kernels.adaln_lora")]
    return [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]


def step() -> None:
    inputs = _dispatch.prepare("adaln_residual", **sample_call("adaln_residual", dtype=torch.bfloat16))
    _dispatch.op("adaln_residual").both_passes("triton", inputs)


def collected(launches: Any) -> Any:
    with _triton.record(_triton.TARGETS["sm_90"], launches):
        step()
    return launches


class Compiled(list[_triton.Launch]):
    """Compiles each launch as Triton's launcher does."""

    def append(self, launch: _triton.Launch) -> None:
        tile = launch.tile
        launch.kernel.warmup(**launch.arguments, grid=launch.grid, num_warps=tile.warps, num_stages=tile.stages)


def test_the_first_launch_finds_on_disk_what_other_processes_compiled(cache: Path) -> None:
    found = collected(_warm.Collected()).kernels
    assert {kernel.name for kernel in found} > {"adaln_forward_kernel"}
    assert not any(kernel.on_disk() for kernel in found)
    assert list(cache.rglob("*.cubin")) == []
    told: list[tuple[int, int]] = []
    assert _warm.compile_all(found, 2, lambda *numbers: told.append(numbers)) == len(found)
    assert told == [(done, len(found)) for done in range(len(found) + 1)]
    assert all(kernel.on_disk() for kernel in found)
    before = set(cache.rglob("*"))
    assert len([file for file in before if file.suffix == ".cubin"]) == len(found)
    collected(Compiled())
    assert set(cache.rglob("*")) == before


def test_a_kernel_is_noted_once_and_keeps_no_tensor(cache: Path) -> None:
    noted = _warm.Collected()
    collected(noted)
    once = list(noted.kernels)
    collected(noted)
    assert noted.kernels == once
    assert list(noted) == []
    assert knobs.runtime.jit_cache_hook is None


def test_what_does_not_compile_is_left_to_the_first_launch(cache: Path) -> None:
    kernel = collected(_warm.Collected()).kernels[0]
    broken = [kernel._replace(name="no_such_kernel"), kernel._replace(options={"num_warps": 3})]
    assert _warm.compile_all(broken, 1, lambda *numbers: None) == 0
    unnamed = kernel._replace(constants={(0,): lambda: None})
    assert _warm.compile_all([unnamed], 1, lambda *numbers: None) == 0


def test_a_process_that_dies_ends_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    assert _warm.compile_all(collected(_warm.Collected()).kernels, 2, lambda *numbers: None) == 0


def test_tiles_are_not_timed_meanwhile(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WALT_KERNELS_AUTOTUNE", "1")
    assert collected(_warm.Collected()).kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_called() -> None:
    assert walt_kernels.warm(lambda: pytest.fail("called")) == 0
    with pytest.raises(TypeError, match="step is None, expected a function"):
        walt_kernels.warm(None)  # type: ignore[arg-type]
