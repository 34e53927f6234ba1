"""The kernels of csrc/adaln_lora/*.cu: native.py's calls on a stream of a GPU, with memory from torch's allocator."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from .._native import C
from .native import Kernels


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@contextlib.contextmanager
def _running_on(device: torch.device) -> Iterator[tuple[int, int]]:
    """Makes the device current; the address of its current stream, and the number of its multiprocessors."""
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        yield torch.cuda.current_stream(index).cuda_stream, _processors(index)


def _call(name: str, device: torch.device, arguments: dict[str, Any]) -> None:
    with _running_on(device) as (stream, processors):
        address = size = 0
        if hasattr(C, f"cuda_{name}_workspace"):
            size = getattr(C, f"cuda_{name}_workspace")(processors, **arguments)
            workspace = torch.empty(
                size // 4, dtype=torch.float32, device=device
            )  # the next user is on this stream too
            address = workspace.data_ptr()
        call = C.CudaCall(stream=stream, processors=processors, workspace=address, workspace_bytes=size)
        getattr(C, f"cuda_{name}")(call, **arguments)


KERNELS: Kernels = Kernels(_call)
