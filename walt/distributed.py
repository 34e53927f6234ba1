"""Processes that torchrun starts: ranks, collectives, and the wrappers that average gradients.

Without torchrun there is one process, rank 0, and everything here does nothing.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from walt.errors import WaltError

# Rank 0 may prepare a large data set for days while the others wait; if a rank dies, torchrun ends them all.
TIMEOUT = timedelta(days=7)


@contextlib.contextmanager
def process_group(device: torch.device | None = None) -> Iterator[torch.device]:
    """Join the processes that torchrun started (gloo on CPUs, nccl on GPUs) -> the device of this one.

    device: None for a GPU if there is one. Of several processes each takes a GPU of its own, whatever its number here.
    Inside, only rank 0 prints: the stdout of the others is the null device. With one process there is nothing to join.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    if device is None or processes != "1":
        if device is not None and device.type not in ("cpu", "cuda"):
            raise WaltError(f"--device {device}: processes of torchrun take cpu or cuda")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    if gpu:
        count = torch.cuda.device_count()
        if device.index >= count:
            raise WaltError(
                f"--nproc-per-node: process {device.index + 1} of this machine has no GPU; there are {count}"
            )
        torch.cuda.set_device(device)
    if processes == "1":
        yield device
        return
    try:
        # Imported later, its functions would keep the group as a default argument, and with it gloo's threads. One that
        # frees a tensor of Python's while Python ends aborts the process.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group("nccl" if gpu else "gloo", timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise WaltError(f"WORLD_SIZE={processes}: {error}; start the processes with torchrun") from error
    try:
        with contextlib.ExitStack() as stack:
            if not is_rank0():
                nothing = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nothing))
            yield device
    finally:
        dist.destroy_process_group()
        gc.collect()  # what FSDP leaves in cycles; it must not be freed while Python ends


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if _joined() else 1


def is_rank0() -> bool:
    return rank() == 0


def _device() -> torch.device:
    """Where a tensor must be for the backend to send it."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def all_sum(values: Tensor) -> Tensor:
    """The sum of each rank's values, the same bits on every rank."""
    if world_size() == 1:
        return values
    summed = values.clone()
    dist.all_reduce(summed)
    return summed


def all_mean(values: Tensor) -> Tensor:
    """The mean of each rank's values, the same bits on every rank."""
    return all_sum(values) / world_size()


def all_max(*values: float) -> list[float]:
    """The largest of each rank's values, so that all ranks decide alike."""
    if world_size() == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


@contextlib.contextmanager
def raise_on_all_ranks(what: str) -> Iterator[None]:
    """An OSError or WaltError on one rank becomes a WaltError on all, so that none waits for one that failed."""
    failure: WaltError | None = None
    try:
        yield
    except WaltError as error:
        failure = error
    except OSError as error:
        failure = WaltError(f"{what}: {error.strerror or error}")
    if all_max(float(failure is not None))[0]:
        raise failure or WaltError(f"{what}: another rank failed")


def parallel(loss: nn.Module, module: nn.Module, strategy: str) -> nn.Module:
    """Wrap `loss`, whose forward calls `module`, so that backward leaves the mean gradient over ranks in parameters.

    "ddp": every rank holds everything. "fsdp": every rank holds a shard of each parameter (FSDP2) and gathers one layer
    at a time; the samples of all ranks must then use the same parameters. All ranks start from rank 0's weights. A
    module whose batches may leave parameters without a gradient has an attribute `unused_parameters = True`: "ddp" then
    looks for them in every step, and would wait for them otherwise.
    """
    if world_size() == 1:
        return loss
    for tensor in (*loss.parameters(), *loss.buffers()):
        dist.broadcast(tensor.detach(), 0)
    if strategy == "ddp":
        unused = getattr(module, "unused_parameters", False)
        # Buffers are not trained.
        return DistributedDataParallel(loss, find_unused_parameters=unused, broadcast_buffers=False)
    from torch.distributed.fsdp import fully_shard

    for unit in _units(module):
        fully_shard(unit)
    fully_shard(loss)
    return loss


def _units(module: nn.Module) -> Iterator[nn.Module]:
    """What FSDP gathers one at a time: in lists of layers, the outermost modules that are called (have a forward)."""
    for child in module.children():
        if not isinstance(module, nn.ModuleList):
            yield from _units(child)
        elif _is_called(child):
            yield child
        else:
            yield from filter(_is_called, child.children())


def _is_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


@contextlib.contextmanager
def synchronizing(wrapped: nn.Module, last: bool) -> Iterator[None]:
    """Around forward and backward of a microbatch: ranks exchange gradients only in the last one."""
    if isinstance(wrapped, DistributedDataParallel) and not last:
        with wrapped.no_sync():
            yield
        return
    if world_size() > 1 and not isinstance(wrapped, DistributedDataParallel):
        cast(Any, wrapped).set_requires_gradient_sync(last)
    yield


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this rank holds a shard."""
    if world_size() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def full(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (a collective: all ranks call it); others as they are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor, sharing its memory; others as they are."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like_rows_of(sharded: Tensor, shard: Tensor) -> Tensor:
    """A tensor of which `shard` is this rank's, sharded by rows as `sharded` is."""
    from torch.distributed.tensor import DTensor

    assert isinstance(sharded, DTensor)
    shape = torch.Size((sharded.shape[0], *shard.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    placements = sharded.placements
    return DTensor.from_local(shard, sharded.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def local_rows(tensor: Tensor) -> tuple[int, int] | None:
    """First and last + 1 of the rows that this rank holds; None for a tensor that is not sharded."""
    if not is_sharded(tensor):
        return None
    (placement,) = tensor.placements  # type: ignore[attr-defined]
    if placement.is_replicate():
        return None
    if not placement.is_shard(0):
        raise ValueError(f"tensor: got placement {placement}; expected replicated, or sharded by rows")
    rows = tensor.shape[0]
    chunk = -(-rows // world_size())  # as torch.chunk cuts: the last ranks may get fewer rows, or none
    return min(rank() * chunk, rows), min((rank() + 1) * chunk, rows)
