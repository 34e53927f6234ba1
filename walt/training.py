"""One loop for both stages: AdamW, warm-up and cosine, clipping, EMA, a log, and checkpoints it can go on from."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from walt.checkpoint import (
    checkpoint_folder,
    load_description,
    load_weights,
    pack_optimizer,
    read_tensors,
    save_checkpoint,
    unpack_optimizer,
)
from walt.errors import WaltError
from walt.files import read_json, replacing

Model = TypeVar("Model", bound=nn.Module)
Step = Callable[[nn.Module, torch.Generator], Tensor]
Tensors = tuple[Tensor, ...] | list[Tensor]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training, after the running step was finished and the checkpoint written."""


@dataclass(frozen=True)
class TrainingConfig:
    """lr rises over `warmup` steps and falls to 2 % of itself on a cosine; the EMA is warmed up too (`_warm_ema`)."""

    steps: int
    lr: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 1.0
    ema_decay: float = 0.99
    save_every: int = 200
    log_every: int = 10
    seed: int = 0


class Trainer(Generic[Model]):
    """Trains `model` by `step(model, generator) -> loss`, which draws its batch and its noise from `generator`.

    All that a run depends on is in its checkpoint (weights, EMA, optimizer, step, both random generators), so a run
    that was interrupted and resumed ends in the same bits as one that was not, on the same machine and thread count.
    """

    def __init__(
        self,
        model: Model,
        step: Step,
        config: TrainingConfig,
        folder: str | Path,
        *,
        kind: str,
        description: Mapping[str, Any],
        frames_per_step: int = 1,
    ) -> None:
        self.model, self.step_function, self.config = model, step, config
        self.folder, self.kind, self.description = Path(folder), kind, dict(description)
        self.frames_per_step = frames_per_step
        self.ema = AveragedModel(model, multi_avg_fn=_warm_ema(config.ema_decay))
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0
        self.elapsed = 0.0
        self.finished = False
        self.log_path = self.folder.with_suffix(".jsonl")

    def run(self, *, seconds: float | None = None) -> None:
        """Train to the last step, or until `seconds` of training (over all runs) are used up.

        With `seconds` the cosine follows whichever is further on, steps or time, so that a slow machine, too, ends with
        a small learning rate. Ctrl-C finishes the running step, saves and raises Interrupted.
        """
        self._rewind_log()
        self.model.train()
        bar = tqdm(total=self.config.steps, initial=self.step, desc=f"train {self.kind}", unit="step", smoothing=0.1)
        started, before = time.monotonic(), self.elapsed
        with bar, _interrupt_flag() as interrupted:
            while not self.finished:
                self._one_step(bar, seconds)
                self.elapsed = before + time.monotonic() - started
                out_of_time = seconds is not None and self.elapsed >= seconds
                self.finished = self.step >= self.config.steps or out_of_time
                if interrupted.is_set() or self.finished or self.step % self.config.save_every == 0:
                    self.save()
                if interrupted.is_set() and not self.finished:
                    raise Interrupted(f"{self.folder} holds a checkpoint at step {self.step} of {self.config.steps}")
        self.model.eval()

    def _one_step(self, bar: tqdm[Any], seconds: float | None) -> None:
        config = self.config
        progress = self.step / config.steps
        if seconds is not None:
            progress = max(progress, self.elapsed / seconds)
        rate = learning_rate(config, self.step, min(progress, 1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.step_function(self.model, self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm, foreach=True)
        if not math.isfinite(value := loss.item()):
            raise WaltError(f"the loss of the {self.kind} became {value} at step {self.step}; lower the learning rate")
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        self.step += 1
        bar.update()
        if self.step % config.log_every == 0 or self.step == config.steps:
            steps_per_second = bar.format_dict["rate"] or 0.0
            frames = steps_per_second * self.frames_per_step
            bar.set_postfix(loss=f"{value:.4f}", frames_s=f"{frames:.0f}", refresh=False)
            self._log({"step": self.step, "loss": value, "lr": rate, "grad_norm": norm.item(), "frames_s": frames})

    @property
    def averaged(self) -> Model:
        """The model with the averaged weights."""
        return cast(Model, self.ema.module)

    def progress(self) -> dict[str, float]:
        return {"done": self.step, "planned": self.config.steps, "seconds": round(self.elapsed, 1)}

    def save(self) -> None:
        tensors, groups = pack_optimizer(self.optimizer)
        random = {"generator": self.generator.get_state(), "global": torch.get_rng_state()}
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "finished": self.finished,
            "ema_updates": int(self.ema.n_averaged),
            "training": asdict(self.config),
            "parameter_groups": groups,
        }
        files = {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": tensors,
            "random": random,
        }
        save_checkpoint(self.folder, self.kind, self.description, files, state)

    def resume(self) -> bool:
        """Go on from the last complete checkpoint in the folder, if there is one. WaltError if it is another run's."""
        folder = checkpoint_folder(self.folder)
        if folder is None:
            return False
        _, document = load_description(folder, self.kind)
        state = read_json(folder / "state.json")
        asked = json.loads(json.dumps({**self.description, "training": asdict(self.config)}))
        found = {**{key: document.get(key) for key in self.description}, "training": state.get("training")}
        for key, value in asked.items():
            if found[key] != value:
                raise WaltError(
                    f"{folder} belongs to a run with other settings ({_first_difference(key, found[key], value)});"
                    " give the same ones, or another --out"
                )
        for name, module in (("model", self.model), ("ema", self.ema.module)):
            path = folder / f"{name}.safetensors"
            load_weights(module, read_tensors(path), path)
        random = read_tensors(folder / "random.safetensors")
        try:
            unpack_optimizer(self.optimizer, read_tensors(folder / "optimizer.safetensors"), state["parameter_groups"])
            self.generator.set_state(random["generator"])
            torch.set_rng_state(random["global"])
            self.ema.n_averaged.fill_(state["ema_updates"])
            self.step, self.elapsed, self.finished = state["step"], state["elapsed"], state["finished"]
        except (KeyError, ValueError, RuntimeError) as error:
            raise WaltError(f"{folder} is broken: {error}") from error
        return True

    def _log(self, row: Mapping[str, float]) -> None:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _rewind_log(self) -> None:
        """Drop the rows that were logged after the checkpoint this run goes on from."""
        rows = [row for row in read_log(self.log_path) if row["step"] <= self.step]
        with replacing(self.log_path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def learning_rate(config: TrainingConfig, step: int, progress: float) -> float:
    """Linear warm-up times a cosine from 1 down to 0.02 as progress goes from 0 to 1."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup)) * cosine


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _warm_ema(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """ema += (1 - d)(model - ema) with d = min(decay, (1 + n) / (10 + n)), so the random start is forgotten early."""

    @torch.no_grad()
    def update(averaged: Tensors, current: Tensors, updates: Tensor | int) -> None:
        n = int(updates)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    return update


@contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the flag, so that no step is left half done; the second one stops at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handle(_signal: int, _frame: object) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)


def _first_difference(key: str, found: Any, asked: Any) -> str:
    """The innermost setting that differs, as "name: found, now asked"."""
    if isinstance(found, dict) and isinstance(asked, dict):
        for name in sorted({*found, *asked}):
            if found.get(name) != asked.get(name):
                return _first_difference(f"{key}.{name}", found.get(name), asked.get(name))
    return f"{key} is {found!r} there, {asked!r} here"
