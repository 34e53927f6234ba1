"""Planned launches by our module: byte for byte what Triton's launcher hands to the driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from walt_kernels import _native, _triton

if _triton.reason is not None or _triton.INTERPRET:
    pytest.skip("compiles Triton kernels", allow_module_level=True)
if _native.C is None:
    pytest.skip(str(_native.reason), allow_module_level=True)

HERE = Path(__file__).parent
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
    command = [sys.executable, HERE / "recorded_launches.py", *OPS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_same_launches_with_the_same_parameters(told: list[dict[str, Any]]) -> None:
    assert [(each["op"], each["pass"]) for each in told] == [(op, way) for op in OPS for way in ("forward", "backward")]
    for each in told:
        assert each["native"], (each["op"], each["pass"])
        assert each["ours"]
        assert each["ours"] == each["triton's"], (each["op"], each["pass"])
    assert any(len(memory) == 256 for each in told for launch in each["ours"] for memory in launch[5])  # tensor maps


def test_a_thread_without_a_context_is_left_to_triton(told: list[dict[str, Any]]) -> None:
    assert [each["without context"] for each in told if "without context" in each] == [False] * len(OPS)


def test_what_the_driver_refuses_is_an_error(told: list[dict[str, Any]]) -> None:
    for each in told[1::2]:
        assert each["refused"] == "CUDA error 2 at a kernel's launch: recorded as failed"


def test_a_kernel_of_other_parameters_is_left_to_triton(told: list[dict[str, Any]]) -> None:
    assert not any(each["fewer parameters"] for each in told[1::2])
