"""``python -m walt_kernels``: what is built, what would run here for each op, and why not the others.

``python -m walt_kernels aot`` compiles the Triton kernels for every target instead (see ``_aot``).
"""

from __future__ import annotations

import platform
import sys
from importlib import metadata

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from . import __version__, _dispatch, _native
from .testing import sample_call


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _build_lines() -> list[str]:
    if _native.C is None:
        return [f"native module  no: {_native.reason}"]
    info = _native.C.build_info()
    return [
        f"native module  built by {info['compiler']}, {'OpenMP' if info['openmp'] else 'no OpenMP'}",
        f"ISA levels     {', '.join(info['isa_compiled'])}; this processor runs {', '.join(info['isa_runnable'])}; "
        f"in use: {info['isa']}",
        f"CUDA           {', '.join(info['cuda_architectures']) or 'no CUDA kernels built'}",
    ]


def _op_lines(device: str) -> list[str]:
    """One block per op. The backends are asked with tensors that have a device and no memory: no GPU is needed."""
    lines = []
    for op in _dispatch.ops():
        inputs = _dispatch.prepare(op, **sample_call(op, dtype=torch.bfloat16))
        with FakeTensorMode():
            on_device = {
                name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
                if isinstance(value, torch.Tensor)
                else value
                for name, value in inputs.items()
            }
            reasons = _dispatch.reasons(op, on_device)
        chosen = next(name for name, reason in reasons.items() if reason is None)
        lines.append(f"  {op:<24} {chosen}")
        lines += [f"  {'':<24}   not {name}: {reason}" for name, reason in reasons.items() if reason is not None]
    return lines


def report() -> str:
    """The text that ``python -m walt_kernels`` prints."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible"
    versions = f"torch {torch.__version__}, triton {_version('triton')}, flash-attn {_version('flash-attn')}"
    lines = [
        f"walt_kernels   {__version__}",
        f"versions       Python {platform.python_version()}, {versions}, numpy {_version('numpy')}",
        f"GPU            {gpu}; CUDA {torch.version.cuda or 'none'}, cuDNN {cudnn or 'none'}",
        *_build_lines(),
        f"threads        {torch.get_num_threads()}",
    ]
    for device in ("cpu", "cuda"):
        lines += ["", f"for bfloat16 tensors on {device}:", *_op_lines(device)]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["aot"]:
        from . import _aot

        sys.exit(_aot.main(sys.argv[2:]))
    print(report())
