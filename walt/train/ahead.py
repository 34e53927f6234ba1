"""Compiling ahead: the GPU kernels of a training step, in parallel, in place of one by one in the first step."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

import walt_kernels
from walt.distributed import all_max
from walt.terminal import progress_bar


def compile_ahead(device: torch.device, backward: Callable[[], object]) -> None:
    """Compile the kernels that `backward` launches on a GPU. It is called once; its numbers and gradients are noise.

    A collective: one rank of each machine compiles, and the others wait for what it leaves on disk.
    """
    if device.type != "cuda":
        return
    compiles = int(os.environ.get("LOCAL_RANK", "0")) == 0
    with progress_bar(desc="compiling kernels", unit="kernel", shown=compiles, leave=False, delay=1) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        walt_kernels.warm(backward, processes=None if compiles else 0, progress=show)
    all_max(0.0)
