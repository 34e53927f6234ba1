"""Loads the native module ``_C`` once, and remembers why it could not.

torch is imported first on purpose: its OpenMP runtime then serves ``_C`` too, so both share one thread pool.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
C: Any = None
reason: str | None = None


def hidden() -> Path | None:
    """The package with a native module that this folder of its source, without one, hides."""
    folders = (Path(entry, HERE.name).resolve() for entry in sys.path)
    return next((folder for folder in folders if folder != HERE and any(folder.glob("_C.*"))), None)


try:
    from . import _C as C  # type: ignore[attr-defined,no-redef]

    if os.environ.get("WALT_KERNELS_ISA"):
        C.set_isa(os.environ["WALT_KERNELS_ISA"])
except ImportError as error:
    reason = f"the native module is not built or does not load ({error})"
    if not any(HERE.glob("_C.*")) and (elsewhere := hidden()):
        reason = f"{HERE} is the source, not built, and hides {elsewhere}: run from another folder, or pip install -e ."
        warnings.warn(f"plain PyTorch runs: {reason}", stacklevel=2)


def _processor_flags() -> frozenset[str]:
    """What Linux says that the processor and itself can do ("avx2", "amx_tile")."""
    try:
        with open("/proc/cpuinfo") as lines:
            return frozenset(next((line for line in lines if line.startswith("flags")), "").split()[2:])
    except OSError:
        return frozenset()


PROCESSOR_FLAGS = _processor_flags()

# What the CPU kernels compute in: float64 as it is, everything else in float32.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in (*DTYPES, torch.bool)}


def unsupported(**inputs: Any) -> str | None:
    """Why the native CPU kernels cannot take the tensors among these, or None."""
    if C is None:
        return reason
    for tensor in inputs.values():
        if isinstance(tensor, Tensor):
            if not tensor.is_cpu and tensor.device.type != "cpu":
                return f"runs on CPU tensors; this one is on {tensor.device}"
            if tensor.dtype not in NAMES:
                return f"no native kernel for {tensor.dtype}"
    return None


CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_OPT_IN = "no faster than triton where both were measured, so only where it is forced"


def cuda_unsupported(**inputs: Any) -> str | None:
    """Why the CUDA kernels cannot take the tensors among these, or None."""
    if C is None:
        return reason
    built = C.build_info()["cuda_architectures"]
    if not built:
        return "built without CUDA: nvcc was not found, or WALT_KERNELS_CUDA=0"
    for tensor in inputs.values():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.device.type != "cuda" or torch.version.hip is not None:
            return f"runs on NVIDIA GPUs; this tensor is on {tensor.device}"
        if tensor.dtype not in CUDA_DTYPES:
            return f"no CUDA kernel for {tensor.dtype}"
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability(tensor.device)
            if not any(runs_on(architecture, (major, minor)) for architecture in built):
                return f"built for {', '.join(built)}; {tensor.device} has compute capability {major}.{minor}"
    return None


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``architecture`` (as "80", "90a", "100+PTX") runs on a GPU of this compute capability.

    Machine code runs on its own generation, from its own step on; with an "a" on its own step only. PTX, which the
    driver compiles, runs on everything newer.
    """
    name, _, ptx = architecture.partition("+")
    number = int(name.rstrip("af"))
    major, minor = divmod(number, 10)
    if name.endswith("a"):
        return capability == (major, minor)
    return (capability[0] == major and capability[1] >= minor) or (bool(ptx) and capability >= (major, minor))


def view(tensor: Tensor | None) -> Any:
    """The tensor as ``_C`` sees it: address, dtype, sizes, strides. The caller keeps the tensor alive."""
    if tensor is None:
        return None
    return C.TensorView(tensor.data_ptr(), NAMES[tensor.dtype], tensor.shape, tensor.stride())
