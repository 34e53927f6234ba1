"""The CUDA build: what it was compiled for, what its kernels take of a multiprocessor, and how setup.py chooses.

The kernels are compiled once, with the installation; here their machine code is read.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from walt_kernels import _native

ROOT = Path(__file__).resolve().parent.parent

# By kernel: registers of a thread and bytes of shared memory (1 KB of which the system takes from sm_90 on). Registers
# times threads decide how many blocks share a multiprocessor; the launch bounds of csrc count on no more than this.
BUDGET = {
    r"adaln_forward_kernelI.*Li1E": (112, 2048),  # without vectors
    r"adaln_forward_kernelI.*Li8E": (136, 2048),
    r"adaln_forward_kernelI.*Li4E": (176, 2048),  # float32
    r"adaln_backward_kernelILb.ELb.Ef": (168, 10240),
    r"adaln_backward_kernelILb.ELb.EN": (128, 10240),
    r"adaln_finish_kernel": (64, 6144),
    r"adaln_zero_kernel": (32, 1024),
    r"lora_forward_kernel": (128, 3072),
    r"lora_up_kernel": (128, 2048),
    r"lora_down_kernel": (64, 3072),
}


@pytest.fixture(scope="module")
def setup() -> dict[str, Any]:
    """The functions of setup.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **arguments: None)
        return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture
def architectures(setup: dict[str, Any]) -> list[str]:
    """What the native module was compiled for. No CUDA kernels although nvcc is here is a failure."""
    if _native.C is None:
        pytest.skip(f"native kernels: {_native.reason}")
    built = _native.C.build_info()["cuda_architectures"]
    if not built:
        if os.environ.get("WALT_KERNELS_CUDA") == "0" or setup["find_nvcc"]() is None:
            pytest.skip("built without CUDA: nvcc was not found, or WALT_KERNELS_CUDA=0")
        pytest.fail("nvcc is here, but walt_kernels was built without it: install again, or set WALT_KERNELS_CUDA=0")
    return built


def cuobjdump() -> str | None:
    try:
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.is_file():
            return str(tool)
    except ImportError:
        pass
    return shutil.which("cuobjdump")


def resources() -> Iterator[tuple[str, str, dict[str, int]]]:
    """Architecture, mangled name and resources of every kernel in the native module."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump (Triton's package has one)")
    text = subprocess.run([tool, "-res-usage", _native.C.__file__], capture_output=True, text=True, check=True).stdout
    architecture = name = ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            yield architecture, name, {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}


def test_kernels_keep_to_their_budget(architectures: list[str]) -> None:
    seen, problems = set(), []
    for architecture, name, used in resources():
        matches = [pattern for pattern in BUDGET if re.search(pattern, name)]
        assert len(matches) == 1, f"{name} has no budget of its own: {matches}"
        seen.add((architecture, matches[0]))
        registers, shared = BUDGET[matches[0]]
        if used["STACK"] or used["LOCAL"]:
            problems.append(f"{architecture} {name} spills: {used}")
        if used["REG"] > registers or used["SHARED"] > shared:
            problems.append(f"{architecture} {name} takes {used}, budget {registers} registers, {shared} bytes shared")
    assert not problems, "\n".join(problems)
    expected = {f"sm_{name.removesuffix('+PTX')}" for name in architectures}
    assert seen == {(architecture, pattern) for architecture in expected for pattern in BUDGET}


def test_module_needs_no_driver(architectures: list[str]) -> None:
    """It loads alone: no torch, no CUDA library. What it brings of CUDA's runtime is hidden from everybody else."""
    code = f"""
import ctypes, importlib.util
spec = importlib.util.spec_from_file_location("_C", {_native.C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.build_info()["cuda_architectures"] == {architectures!r}
assert "libcuda" not in open("/proc/self/maps").read()
assert not hasattr(ctypes.CDLL({_native.C.__file__!r}), "cudaLaunchKernel")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_error_codes_become_messages(architectures: list[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the launch would not fail")
    x, statistics = torch.zeros(1, 4, 8), torch.zeros(1, 4)
    tensors = {"x": x, "shift": x[:, :1], "scale": x[:, :1], "h": x, "mean": statistics, "rstd": statistics}
    views = {name: _native.view(tensor) for name, tensor in tensors.items()}
    call = _native.C.CudaCall(stream=0, processors=1, workspace=0, workspace_bytes=0)
    with pytest.raises(RuntimeError, match=r"adaln_forward: .*CUDA.* \(cudaError\w+\)"):
        _native.C.cuda_adaln_forward(call, **views, eps=1e-6)


# ---- how setup.py chooses --------------------------------------------------------------------------------------------

KNOWN = {75, 80, 86, 89, 90, 100, 103, 120, 121}


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("", ["80", "90a", "100+PTX"]),
        ("8.0;9.0a+PTX", ["80", "90a+PTX"]),
        ("7.0 7.5 8.6 9.0+PTX", ["86", "90+PTX"]),
        ("8.0, 8.0;12.0", ["80", "120"]),
        ("Ampere;Hopper", ["80", "86+PTX", "90+PTX"]),
        ("10.0f", ["100f"]),
    ],
)
def test_architectures(
    listed: str, expected: list[str], setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert setup["cuda_architectures"](KNOWN) == expected


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("9", "TORCH_CUDA_ARCH_LIST has '9', expected numbers like 8.0;9.0a+PTX"),
        ("8.0;Volta", "TORCH_CUDA_ARCH_LIST has 'Volta', expected numbers like 8.0;9.0a+PTX"),
        ("13.0", "TORCH_CUDA_ARCH_LIST has '13.0', which this nvcc does not know"),
        ("7.0;7.5", "TORCH_CUDA_ARCH_LIST is '7.0;7.5', expected at least one architecture from 8.0 on"),
    ],
)
def test_architectures_that_cannot_be(
    listed: str, message: str, setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(ValueError, match=re.escape(message)):
        setup["cuda_architectures"](KNOWN)


def test_an_older_nvcc_compiles_what_it_knows(setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert setup["cuda_architectures"]({80, 86, 90}) == ["80+PTX", "90a"]


def test_choice_of_cuda(
    setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, without_nvcc: Callable[[], None]
) -> None:
    monkeypatch.setenv("WALT_KERNELS_CUDA", "0")
    assert setup["choose_cuda"](["c++"]) == "WALT_KERNELS_CUDA=0"
    without_nvcc()
    monkeypatch.setenv("WALT_KERNELS_CUDA", "auto")
    assert setup["choose_cuda"](["c++"]).startswith("nvcc was not found")
    monkeypatch.setenv("WALT_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="WALT_KERNELS_CUDA=1, but nvcc was not found"):
        setup["choose_cuda"](["c++"])


@pytest.fixture
def without_nvcc(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def hide() -> None:
        monkeypatch.setattr(shutil, "which", lambda *arguments, **options: None)

    return hide


# ---- which tensors the backend takes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),
        ("86", (8, 0), False),
        ("80", (9, 0), False),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("90a+PTX", (10, 0), False),
        ("100", (10, 3), True),
        ("100", (12, 0), False),
        ("100+PTX", (12, 0), True),
        ("100+PTX", (9, 0), False),
    ],
)
def test_architecture_runs_on(architecture: str, capability: tuple[int, int], runs: bool) -> None:
    assert _native.runs_on(architecture, capability) == runs


class Built:
    """A native module that was compiled for some architectures."""

    def __init__(self, *architectures: str) -> None:
        self.architectures = list(architectures)

    def build_info(self) -> dict[str, list[str]]:
        return {"cuda_architectures": self.architectures}


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(2)
    monkeypatch.setattr(_native, "C", Built())
    assert _native.cuda_unsupported(x=x) == "built without CUDA: nvcc was not found, or WALT_KERNELS_CUDA=0"
    monkeypatch.setattr(_native, "C", Built("80", "90a"))
    assert _native.cuda_unsupported(x=x) == "runs on NVIDIA GPUs; this tensor is on cpu"
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert _native.cuda_unsupported(x=x, y=None) is None
        assert _native.cuda_unsupported(x=x.double()) == "no CUDA kernel for torch.float64"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
        assert _native.cuda_unsupported(x=x) == "built for 80, 90a; cuda:0 has compute capability 12.0"
