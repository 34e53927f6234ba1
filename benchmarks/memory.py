"""Peak memory of one call, beyond what was there before it: outputs and scratch, MiB; and what is kept for backward.

On a GPU the allocator counts. On Linux the kernel does: writing 5 to /proc/self/clear_refs resets a process's
high-water mark (VmHWM, proc(5)), so the mark after the call minus the resident set before it is what the call added.
Memory that malloc and our kernels keep from earlier calls is given back first, otherwise it would be used again and not
be seen.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from walt_kernels import _native

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(call: Callable[[], object], device: str = "cpu") -> float | None:
    """MiB, or None where the system does not tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if _native.C is not None:
        _native.C.free_scratch()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        RESET.write_text("5")
        kib = _status("VmRSS")
        call()
        return max(_status("VmHWM") - kib, 0) / 1024
    except (OSError, AttributeError):
        return None


def kept(call: Callable[[], Tensor]) -> float:
    """MiB of all tensors that a call keeps for its backward pass, parameters among them."""
    found = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()  # while it is there, so is what it was made of
    del result
    return sum(found.values()) / 2**20


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.M)
    if found is None:
        raise OSError(f"{STATUS} has no {field}")
    return int(found[1])
