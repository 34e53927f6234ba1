"""An objective: a network, its loss and its optimizer. A training step is `backward` and then `step` of each."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from walt.data.loading import Batch
from walt.distributed import all_mean, full, parallel, synchronizing, world_size
from walt.settings import TrainingConfig
from walt.train.averaging import WeightAverage
from walt.train.optimizers import make_optimizer
from walt.train.timing import PARTS

Values = Mapping[str, Tensor]
Loss = Callable[[Any, Batch], tuple[Tensor, Values]]

TIMES = (*(f"{part}_s" for part in PARTS), "peak_gib", "mfu")
COLUMNS = frozenset(
    ("step", "loss", "grad_norm", "lr", "frames_s", "seconds", *TIMES)
)  # taken: names that a loss's values may not have


def compile_blocks(network: nn.Module, mode: str = "default") -> None:
    """Compile each block of the network's lists by itself; of a network without lists, itself and its children.

    Equal blocks share a graph, while a graph of all layers takes minutes to compile. In place, so that names in the
    state dict stay. `mode` is torch.compile's.
    """
    lists = [part for part in network.modules() if isinstance(part, nn.ModuleList)]
    blocks = _callable(block for part in lists for block in part) or _callable([network, *network.children()])
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(blocks))  # widths and sizes that one class may have
    for block in blocks:
        block.compile(dynamic=False, mode=mode)


def _callable(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if type(module).forward is not nn.Module.forward]


@dataclass
class Result:
    """Means over the global batch: of the loss, of the values to log; and the norm of the gradient before clipping."""

    loss: float
    grad_norm: float
    values: dict[str, float]

    def not_finite(self) -> str | None:
        """The name of what is not finite, or None."""
        return next((name for name in ("loss", "grad_norm") if not math.isfinite(getattr(self, name))), None)

    def columns(self, prefix: str = "") -> dict[str, float]:
        """Columns of the log."""
        columns = {"loss": self.loss, "grad_norm": self.grad_norm, **self.values}
        return {prefix + name: value for name, value in columns.items()}


class Objective:
    """A network spread over the ranks, its loss and its optimizer; with `average`, also the average of its weights.

    loss(network, batch) -> (scalar, values to log), both means over the samples, so that the mean over equal
    microbatches is that of the full batch. It may call any method of the network, and other networks, which it does not
    train. The names in the network's state dict stay.
    after_step(values): called after a step with the values' means over the global batch, to update running statistics
    (LeCAM's) that are then the same on every rank and however the batch is cut.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        config: TrainingConfig,
        *,
        name: str = "model",
        average: bool = False,
        after_step: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        self.network, self.config, self.name, self.after_step = network, config, name, after_step
        self.device = next(network.parameters()).device
        sharded = config.strategy == "fsdp" and world_size() > 1
        keeps = sharded or (average and config.ema_decay > 0)
        self.average = WeightAverage(network, config.ema_decay) if keeps else None
        if config.compile:
            compile_blocks(network, config.compile_mode)
        self.forward = parallel(LossModule(network, loss, config.precision), network, config.strategy)
        self.optimizer = make_optimizer(config, network.parameters())
        self.result: Result | None = None  # of the last backward
        if sharded and self.average is not None:
            self.average.shard()

    def backward(self, microbatches: Sequence[Batch]) -> Result:
        """Put the clipped gradient of the mean loss over the global batch into the parameters' `grad`.

        microbatches: this rank's share of that batch, on the device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(microbatches, 1):
            with synchronizing(self.forward, number == len(microbatches)):
                loss, values = self.forward(batch)
                (loss / len(microbatches)).backward()
            if taken := COLUMNS & values.keys():
                raise ValueError(f"values of objective {self.name!r}: got {sorted(taken)}; expected other names")
            for name, value in {"loss": loss, **values}.items():
                sums[name] = sums.get(name, 0) + value.detach().double() / len(microbatches)
        trained = [parameter for parameter in self.network.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in trained], foreach=True)
        if self.config.clip_norm:
            nn.utils.clip_grads_with_norm_(trained, self.config.clip_norm, norm, foreach=True)
        numbers = torch.stack([*sums.values(), full(norm).to(self.device, torch.float64)])
        mean_loss, *means, grad_norm = all_mean(numbers).tolist()
        self.result = Result(mean_loss, grad_norm, dict(zip([*sums][1:], means, strict=True)))
        return self.result

    def step(self, lr: float) -> None:
        """Take the step that `backward` prepared, and have averages and running statistics follow it."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        if self.after_step is not None and self.result is not None:
            self.after_step(self.result.values)


@contextlib.contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Inside, gradients go through the modules but not to their parameters."""
    trained = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class LossModule(nn.Module):
    """What DDP and FSDP wrap: its forward computes the loss, which may call any method of the network."""

    def __init__(self, network: nn.Module, loss: Loss, precision: str) -> None:
        super().__init__()
        self.network, self.loss, self.precision = network, loss, precision

    def forward(self, batch: Batch) -> tuple[Tensor, Values]:
        device = next(self.network.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            loss, values = self.loss(self.network, batch)
        return loss, {name: value.detach() for name, value in values.items()}
