"""Planned launches by our module: byte for byte what Triton's launcher hands to the driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from walt_kernels import _launches, _native, _triton

if _triton.reason is not None or _triton.INTERPRET:
    pytest.skip("compiles Triton kernels", allow_module_level=True)
if _native.C is None:
    pytest.skip(str(_native.reason), allow_module_level=True)

HERE = Path(__file__).parent
SMALL = "boxes over little memory"
OPS = ("adaln_lora", "adaln_residual_modulate", "causal_conv3d", "video_norm", "window_attention")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["cc", *options, "-o", library, HERE / "recording_driver.c"], check=True)
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    command = [sys.executable, HERE / "recorded_launches.py", *OPS, SMALL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def of_ops(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in told if each["op"] != SMALL]


def test_the_same_launches_with_the_same_parameters(of_ops: list[dict[str, Any]]) -> None:
    assert [(each["op"], each["pass"]) for each in of_ops] == [
        (op, way) for op in OPS for way in ("forward", "backward")
    ]
    for each in of_ops:
        assert each["native"], (each["op"], each["pass"])
        assert each["ours"]
        assert each["ours"] == each["triton's"], (each["op"], each["pass"])
    assert any(len(memory) == 256 for each in of_ops for launch in each["ours"] for memory in launch[5])  # tensor maps


def test_a_thread_without_a_context_is_left_to_triton(of_ops: list[dict[str, Any]]) -> None:
    assert [each["without context"] for each in of_ops if "without context" in each] == [False] * len(OPS)


def test_what_the_driver_refuses_is_an_error(of_ops: list[dict[str, Any]]) -> None:
    for each in of_ops[1::2]:
        assert each["refused"] == "CUDA error 2 at a kernel's launch: recorded as failed"


def test_a_kernel_of_other_parameters_is_left_to_triton(of_ops: list[dict[str, Any]]) -> None:
    assert not any(each["fewer parameters"] for each in of_ops[1::2])


def test_boxes_over_little_memory_are_left_to_triton(told: list[dict[str, Any]]) -> None:
    """From 3.7 on it clears a bit of their maps for some drivers. These overlap: they have more elements than reach."""
    forward, _ = (each for each in told if each["op"] == SMALL)
    assert any(len(memory) == 256 for launch in forward["triton's"] for memory in launch[5])
    assert not forward["native"]


@pytest.mark.parametrize(("value", "bits"), [(1.0, 0x3F800000), (1e39, 0x7F800000), (-1e300, 0xFF800000)])
def test_numbers_beyond_float32_are_infinite(value: float, bits: int) -> None:
    added: list[tuple[int, int]] = []
    _launches._add(SimpleNamespace(constant=lambda *constant: added.append(constant)), "fp32", value, iter(()))
    assert added == [(4, bits)]


@pytest.mark.parametrize("base", [-1, 1 << 16, 2**31 - 1])
def test_a_base_that_no_call_has(base: int) -> None:
    with pytest.raises(ValueError, match="base must be from 0 to 65535"):
        _native.C.Launch(0, (1, 1, 1), 32, 0).pointer(base, 0)
