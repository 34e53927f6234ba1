"""Adafactor for parameters that are sharded by rows: torch's refuses them (its in-place squares of partial norms)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from walt.distributed import like_rows_of, own, total


class ShardedAdafactor(torch.optim.Adafactor):
    """torch.optim.Adafactor's algorithm (and settings, and state) on the shards that FSDP2 makes.

    A factored second moment is that of the last two dimensions. Of a matrix, the rows are spread over the ranks: their
    moments are each rank's own, and the sums over them, like all norms, are reduced, all parameters' together.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("closure: got a function; expected None")
        for group in self.param_groups:
            tasks = [_Task(p, self.state[p], group) for p in group["params"] if p.grad is not None]
            _reduce([task.sums() for task in tasks])
            _reduce([task.scaled() for task in tasks])
            for task in tasks:
                task.apply()


class _Task:
    """The update of one parameter, in the three parts between which ranks exchange sums."""

    def __init__(self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        self.parameter, self.state, self.group = parameter, state, group
        self.weight, self.gradient = own(parameter), own(parameter.grad)  # type: ignore[arg-type]
        self.matrix, self.factored = parameter.ndim == 2, parameter.ndim > 1
        if not state:
            state["step"] = torch.tensor(0.0)
            if not self.factored:
                state["variance"] = like_rows_of(parameter, torch.zeros_like(self.weight))
            else:
                row = torch.zeros_like(self.weight[..., :1])
                state["row_var"] = like_rows_of(parameter, row)
                column = self.weight.new_zeros((*self.weight.shape[:-2], 1, self.weight.shape[-1]))
                state["col_var"] = column if self.matrix else like_rows_of(parameter, column)
        state["step"] += 1
        self.count = float(state["step"])
        self.share = self.count ** group["beta2_decay"]

    def sums(self) -> list[Tensor]:
        """Squares of the weights; of a matrix, also the row moments and, by column, the squares of the gradient."""
        self.size = self.weight.square().sum()[None]
        if not self.factored:
            own(self.state["variance"]).lerp_(self.gradient.square(), self.share)
            return [self.size]
        squares = self.gradient.square()
        row = own(self.state["row_var"]).lerp_(squares.mean(-1, keepdim=True), self.share)
        self.column = squares.sum(-2, keepdim=True)
        self.rows = row.sum(-2, keepdim=True)
        return [self.size, self.column, self.rows] if self.matrix else [self.size]

    def scaled(self) -> list[Tensor]:
        """Squares of the gradient divided by the root of the second moment."""
        least = self.group["eps"][0]
        least = torch.finfo(self.weight.dtype).eps if least is None else least
        if self.factored:
            height = self.parameter.shape[-2]
            column = own(self.state["col_var"]).lerp_(self.column / height, self.share)
            moment = own(self.state["row_var"]) @ column / (self.rows / height).clamp(min=least)
        else:
            moment = own(self.state["variance"])
        self.update = moment.clamp(min=least**2).rsqrt() * self.gradient
        self.change = self.update.square().sum()[None]
        return [self.change]

    def apply(self) -> None:
        count, lr = self.parameter.numel(), self.group["lr"]
        size, change = (math.sqrt(tensor.item() / count) for tensor in (self.size, self.change))
        rate = max(self.group["eps"][1], size) * min(lr, self.count**-0.5) / max(1.0, change / self.group["d"])
        self.weight.mul_(1 - lr * self.group["weight_decay"]).add_(self.update, alpha=-rate)


def _reduce(groups: list[list[Tensor]]) -> None:
    """Replace each tensor by its sum over the ranks, in one exchange."""
    tensors = [tensor for group in groups for tensor in group]
    if tensors:
        flat = total(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, part in zip(tensors, _cut(flat, tensors), strict=True):
            tensor.copy_(part)


def _cut(flat: Tensor, tensors: list[Tensor]) -> Iterator[Tensor]:
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        yield part.view_as(tensor)
