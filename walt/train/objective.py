"""What a training step is made of: the phases, each with its loss and optimizer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from walt.data.loading import Batch
from walt.distributed import all_mean, full, parallel, synchronizing
from walt.settings import TrainingConfig
from walt.train.optimizers import make_optimizer

Values = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], tuple[Tensor, Values]]

COLUMNS = frozenset(("step", "loss", "grad_norm", "lr", "frames_s", "seconds"))  # of the log, with a meaning of its own


@dataclass
class Phase:
    """One optimizer's share of a step.

    loss(module, rows) -> (scalar, values to log), both means over the rows it is given, so that the mean over equal
    parts is that of the whole. It may call any method of `module`, and other phases' modules, which it does not train.
    after(values): called after a step with the values' means over the global batch; the place to follow them with
    running statistics (LeCAM's), which are then the same on every rank and however the batch is cut.
    """

    name: str
    module: nn.Module
    loss: Loss
    after: Callable[[dict[str, float]], None] | None = None


@dataclass
class PhaseResult:
    """Means over the global batch: of the loss, of the values to log; and the norm of the gradient before clipping."""

    loss: float
    grad_norm: float
    values: dict[str, float]

    def broken(self) -> str | None:
        """The name of what is not finite any more."""
        return next((name for name in ("loss", "grad_norm") if not math.isfinite(getattr(self, name))), None)

    def columns(self, prefix: str = "") -> dict[str, float]:
        """Columns of the log."""
        columns = {"loss": self.loss, "grad_norm": self.grad_norm, **self.values}
        return {prefix + name: value for name, value in columns.items()}


class PhaseOptimizer:
    """A phase, spread over the ranks, and its optimizer. The names in the module's state dict stay what they are."""

    def __init__(self, phase: Phase, config: TrainingConfig, device: torch.device) -> None:
        self.phase, self.config, self.device = phase, config, device
        if config.compile:  # in place, for the sake of the names
            for module in (phase.module, *phase.module.children()):
                if type(module).forward is not nn.Module.forward:
                    module.compile()
        loss = _Loss(phase, device.type, config.precision == "bfloat16")
        self.wrapped = parallel(loss, phase.module, config.strategy)
        self.optimizer = make_optimizer(config, phase.module.parameters())

    def gradients(self, parts: Sequence[Batch]) -> PhaseResult:
        """Leave the clipped gradient of the mean loss over the global batch in the parameters; of it, this rank's parts
        are given, on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for number, rows in enumerate(parts, 1):
            with synchronizing(self.wrapped, number == len(parts)):
                loss, values = self.wrapped(rows)
                (loss / len(parts)).backward()
            if taken := COLUMNS & values.keys():
                raise ValueError(f"values of phase {self.phase.name!r}: got {sorted(taken)}; expected other names")
            for name, value in {"loss": loss, **values}.items():
                sums[name] = sums.get(name, 0) + value.detach().double() / len(parts)
        trained = [parameter for parameter in self.phase.module.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in trained], foreach=True)
        if self.config.clip_norm:
            nn.utils.clip_grads_with_norm_(trained, self.config.clip_norm, norm, foreach=True)
        numbers = torch.stack([*sums.values(), full(norm).to(self.device, torch.float64)])
        loss_value, *others, norm_value = all_mean(numbers).tolist()
        return PhaseResult(loss_value, norm_value, dict(zip([*sums][1:], others, strict=True)))

    def step(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def frozen(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Their parameters take no gradient within."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class _Loss(nn.Module):
    """What DDP and FSDP wrap: a forward that is the whole loss, so that it may call any methods of the module."""

    def __init__(self, phase: Phase, device_type: str, narrow: bool) -> None:
        super().__init__()
        self.module, self.function = phase.module, phase.loss
        self.device_type, self.narrow = device_type, narrow

    def forward(self, rows: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.narrow):
            loss, values = self.function(self.module, rows)
        return loss, {name: value.detach() for name, value in values.items()}
