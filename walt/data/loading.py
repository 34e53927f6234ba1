"""The parts of a batch that one process computes, drawn and loaded in a thread while the step before runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from walt.distributed import rank, world_size

# Tensors share their leading dimension, the rows of the global batch; other values (int, str) go to every row.
Batch = dict[str, Any]
Draw = Callable[[torch.Generator], Batch]
Load = Callable[[Batch], Batch]


def part_of(batch: Batch, part: int, parts: int) -> Batch:
    """Rows `part`, `part` + `parts`, ... of the batch's tensors: kinds of rows that stand together (the images of a
    joint batch) are dealt out evenly. ValueError if the parts would not be equal.
    """
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    counts = {name: len(value) for name, value in tensors.items()}
    rows = set(counts.values())
    if len(rows) != 1 or 0 in rows or min(rows) % parts:
        raise ValueError(f"batch: got tensors of {counts} rows; expected the same multiple of {parts} (ranks x parts)")
    return {**batch, **{name: value[part::parts] for name, value in tensors.items()}}


class Loader:
    """This rank's `parts` parts of batch after batch, each part loaded (`load`; None: as it was drawn).

    A batch is drawn from a copy of the generator's state, and the generator moves on when the batch is taken: at no
    time does its state tell of the batch that is being made ready. One that was made ready for another state, because
    a run was resumed or took a step back, is dropped.
    """

    def __init__(self, draw: Draw, load: Load | None, parts: int) -> None:
        self.draw, self.load = draw, load
        self.own = [rank() * parts + part for part in range(parts)]
        self.total = world_size() * parts
        self._pool = ThreadPoolExecutor(1)
        self._ahead: tuple[Tensor, Future[tuple[list[Batch], Tensor]]] | None = None  # what it starts from, and gives

    def take(self, generator: torch.Generator) -> list[Batch]:
        """The parts of the next batch, on the CPU. An error in drawing or loading it is raised here."""
        state = generator.get_state()
        ready = self._ahead is not None and torch.equal(self._ahead[0], state)
        _, future = self._ahead if ready and self._ahead is not None else self._begin(state)
        parts, after = future.result()
        generator.set_state(after)
        self._ahead = self._begin(after)
        return parts

    def _begin(self, state: Tensor) -> tuple[Tensor, Future[tuple[list[Batch], Tensor]]]:
        return state, self._pool.submit(self._work, state)

    def _work(self, state: Tensor) -> tuple[list[Batch], Tensor]:
        generator = torch.Generator()
        generator.set_state(state)
        batch = self.draw(generator)
        parts = [part_of(batch, part, self.total) for part in self.own]
        return parts if self.load is None else [self.load(part) for part in parts], generator.get_state()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
