"""Batches as a function of (seed, step, sample); each rank makes its own microbatches ahead, in threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any

import torch
from torch import Tensor

from walt.distributed import rank, world_size
from walt.model.randoms import keyed_generator

# Tensors share their leading dimension, the samples; other values (int, str) hold for all of them.
Batch = dict[str, Any]

# source(generator that the whole batch shares, {number of a wanted sample, 0 .. batch - 1: its generator}) -> batch. It
# uses no other generator and may be called from several threads at once.
Source = Callable[[torch.Generator, Mapping[int, torch.Generator]], Batch]


def make_batch(source: Source, seed: int, step: int, samples: Iterable[int]) -> Batch:
    """The samples with these numbers of a step's batch, always the same ones; and "step"."""
    generators = {sample: keyed_generator(seed, step, 1 + sample) for sample in samples}
    return {"step": step, **source(keyed_generator(seed, step, 0), generators)}


class Loader:
    """This rank's `accumulate` microbatches of every step from `step` on, made ahead by `workers` threads.

    Of n microbatches over all ranks, the i-th is made of the samples i, i + n, i + 2n, ...: kinds of samples that stand
    together (the images of a joint batch) are dealt out evenly. ValueError if they would not be equal.
    With pin, tensors lie in pinned memory, from which a GPU copies without blocking the host.
    """

    def __init__(
        self,
        source: Source,
        batch: int,
        seed: int,
        *,
        step: int = 0,
        accumulate: int = 1,
        workers: int = 1,
        pin: bool = False,
    ) -> None:
        total = world_size() * accumulate
        if batch < 1 or batch % total:
            raise ValueError(f"batch: got {batch}; expected a multiple of {total} (ranks x microbatches)")
        self.source, self.seed, self.pin = source, seed, pin
        self._samples = [range(rank() * accumulate + i, batch, total) for i in range(accumulate)]
        self._ahead = -(-workers // accumulate)  # steps
        self._steps = count(step)
        self._pool = ThreadPoolExecutor(workers)
        self._ready: deque[list[Future[Batch]]] = deque()

    def take(self) -> list[Batch]:
        """The microbatches of the next step, on the CPU. An error in making them is raised here."""
        while len(self._ready) <= self._ahead:
            step = next(self._steps)
            self._ready.append([self._pool.submit(self._make, step, samples) for samples in self._samples])
        return [future.result() for future in self._ready.popleft()]

    def _make(self, step: int, samples: range) -> Batch:
        batch = make_batch(self.source, self.seed, step, samples)
        return map_tensors(Tensor.pin_memory, batch) if self.pin else batch

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """The batch with function(tensor) for each tensor, also in nested dicts."""

    def mapped(value: Any) -> Any:
        if isinstance(value, dict):
            return map_tensors(function, value)
        return function(value) if isinstance(value, Tensor) else value

    return {name: mapped(value) for name, value in batch.items()}
