"""The settings of a training run, and what follows from them: optimizer, learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from walt.adafactor import ShardedAdafactor
from walt.config import Config
from walt.distributed import is_sharded
from walt_kernels.values import is_int

CHOICES = {
    "schedule": ("cosine", "constant"),
    "optimizer": ("adamw", "adafactor"),
    "precision": ("float32", "bfloat16"),
    "strategy": ("ddp", "fsdp"),
    "tensorboard": (None, True, False),
}
COUNTS = {"steps": 1, "warmup": 0, "accumulate": 1, "save_every": 1, "log_every": 1, "preview_every": 0, "keep": 1}
# How a run is spread over memory and devices, and what it writes: free to change when it is resumed.
SPREAD = ("accumulate", "compile", "checkpointing", "strategy")
FREE = frozenset((*SPREAD, "save_every", "log_every", "preview_every", "keep", "tensorboard"))


@dataclass(frozen=True)
class TrainingConfig(Config):
    """How to train. Rates and weights are per step, whatever the batch.

    lr rises linearly over `warmup` steps; "cosine" then takes it down to 2 % of itself at the last step.
    weight_decay is decoupled, for every parameter. "adafactor" is torch's: its step is min(lr, 1 / sqrt(step)) times
    the root mean square of the parameter (Shazeer and Stern 2018), so lr is relative; it has no betas.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0  # of the gradient of each phase; 0: no clipping
    ema_decay: float = 0.99  # of the averaged weights, which are kept in float32; 0: none
    save_every: int = 200
    log_every: int = 10
    seed: int = 0
    schedule: str = "cosine"  # or "constant"
    optimizer: str = "adamw"  # or "adafactor"
    accumulate: int = 1  # parts into which each process cuts its rows, one after the other
    precision: str = "float32"  # or "bfloat16": autocast; parameters and optimizer stay as they are
    compile: bool = False
    checkpointing: bool = False  # set on every module that has an attribute of this name
    strategy: str = "ddp"  # or "fsdp": parameters, optimizer and averages sharded; for one process both are the same
    preview_every: int = 0  # 0: never
    keep: int = 1  # checkpoints that stay on the disk, the last one included
    tensorboard: bool | None = None  # None: if it is installed

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in COUNTS.items():
            value = getattr(self, name)
            good = is_int(value) and value >= least
            self._expect(good, name, f"an int >= {least}")
        self._expect(is_int(self.seed), "seed", "an int")
        for name, choices in CHOICES.items():
            self._expect(getattr(self, name) in choices, name, " or ".join(map(str, choices)))
        for name in ("compile", "checkpointing"):
            self._expect(isinstance(getattr(self, name), bool), name, "true or false")
        self._expect(_is_number(self.lr) and self.lr > 0, "lr", "a number > 0")
        for name in ("weight_decay", "clip_norm"):
            value = getattr(self, name)
            self._expect(_is_number(value) and value >= 0, name, "a number >= 0")
        self._expect(_is_number(self.ema_decay) and 0 <= self.ema_decay < 1, "ema_decay", "a number in [0, 1)")
        good = isinstance(self.betas, tuple) and len(self.betas) == 2
        good = good and all(_is_number(beta) and 0 <= beta < 1 for beta in self.betas)
        self._expect(good, "betas", "two numbers in [0, 1)")

    def _expect(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise ValueError(f"{name}: got {getattr(self, name)!r}; expected {expected}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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
