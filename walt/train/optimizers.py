"""Optimizer and learning rate of a training run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from walt.distributed import all_sum, is_sharded, like_rows_of, local
from walt.settings import TrainingConfig


def learning_rate(config: TrainingConfig, step: int, progress: float) -> float:
    """Linear warm-up times the schedule: 1, or a cosine from 1 down to 0.02 as progress goes from 0 to 1."""
    schedule = 1.0
    if config.schedule == "cosine":
        schedule = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup)) * schedule


def make_optimizer(config: TrainingConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer over the parameters that are trained (`requires_grad`), in their order."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if config.optimizer == "adafactor":
        kind = ShardedAdafactor if any(map(is_sharded, trained)) else torch.optim.Adafactor
        return kind(trained, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True)


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
    """The update of one parameter, in three steps between which ranks exchange sums."""

    def __init__(self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        self.parameter, self.state, self.group = parameter, state, group
        self.weight, self.gradient = local(parameter), local(parameter.grad)  # type: ignore[arg-type]
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
            local(self.state["variance"]).lerp_(self.gradient.square(), self.share)
            return [self.size]
        squares = self.gradient.square()
        row = local(self.state["row_var"]).lerp_(squares.mean(-1, keepdim=True), self.share)
        self.column = squares.sum(-2, keepdim=True)
        self.rows = row.sum(-2, keepdim=True)
        return [self.size, self.column, self.rows] if self.matrix else [self.size]

    def scaled(self) -> list[Tensor]:
        """Squares of the gradient divided by the root of the second moment."""
        least = self.group["eps"][0]
        least = torch.finfo(self.weight.dtype).eps if least is None else least
        if self.factored:
            height = self.parameter.shape[-2]
            column = local(self.state["col_var"]).lerp_(self.column / height, self.share)
            moment = local(self.state["row_var"]) @ column / (self.rows / height).clamp(min=least)
        else:
            moment = local(self.state["variance"])
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
        flat = all_sum(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))
