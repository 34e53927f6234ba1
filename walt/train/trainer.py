"""One loop for every stage: optimizers, schedule, clipping, averages, a log, and checkpoints it can go on from.

It runs in one process, or in several under torchrun (`walt.distributed`), with the same result to rounding.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from walt.atomic import read_json
from walt.checkpoint import (
    TensorFiles,
    checkpoint_folder,
    load_description,
    load_optimizer,
    optimizer_tensors,
    read_tensors,
    save_together,
)
from walt.data.loading import Batch, Draw, Load, Loader
from walt.distributed import all_max, is_main, raise_on_all_ranks, world_size
from walt.errors import WaltError, say
from walt.settings import FREE, TrainingConfig
from walt.train.averaging import WeightAverage
from walt.train.log import RunLog
from walt.train.objective import Phase, PhaseOptimizer, PhaseResult, frozen
from walt.train.optimizers import learning_rate
from walt.train.random_state import RandomState

DATA = ("data", "clip")  # what of a run's description is of its data

Model = TypeVar("Model", bound=nn.Module)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training, after the running step was finished and the checkpoint written."""


class Trainer(Generic[Model]):
    """Trains the phases' modules; the averaged weights follow those of the first.

    draw(generator) makes the random numbers and the indices of data of the whole global batch, the same on every rank.
    Part i of n (n = ranks x config.accumulate) is made of the rows i, i + n, i + 2n, ...; load(part) makes of it what
    losses get, once for all phases, and tensors of that are moved to the device of the first module. Both are called
    in a thread while the step before runs, and draw from no other generator. All losses of a step see the weights from
    before it (the phases are simultaneous), so that a step is taken whole or not at all.

    All that a run depends on is in its checkpoint (weights, averages, optimizers, step, random generators, the state of
    `extra_modules`), so a run that was interrupted and resumed ends in the same bits as one that was not, on the same
    machine, number of threads and ranks. The data's position is the generator's. Other ranks than the main one have a
    global generator of their own (dropout).

    A run has diverged when a loss or a gradient norm is not finite: it stops with a WaltError, and with a checkpoint of
    the step before. preview(averaged module, step) is called on the main rank every config.preview_every steps.

    A disk that is full stops no run: what the log, a preview or a checkpoint in between cannot write is told, and the
    last good checkpoint stays. Only the last checkpoint must be written, or WaltError.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        draw: Draw,
        config: TrainingConfig,
        folder: str | Path,
        *,
        kind: str,
        description: Mapping[str, Any],
        load: Load | None = None,
        frames_per_step: int = 1,
        extra_modules: Mapping[str, nn.Module] | None = None,
        preview: Callable[[nn.Module, int], None] | None = None,
    ) -> None:
        self.phases, self.draw, self.load, self.config = list(phases), draw, load, config
        self.folder, self.kind, self.description = Path(folder), kind, dict(description)
        self.frames_per_step, self.extra_modules, self.preview = frames_per_step, dict(extra_modules or {}), preview
        self._check()
        self.model = cast(Model, self.phases[0].module)
        self.device = next(self.model.parameters()).device
        self._switch_checkpointing()
        sharded = config.strategy == "fsdp" and world_size() > 1
        self._average = WeightAverage(self.model, config.ema_decay) if config.ema_decay or sharded else None
        self._parts = [PhaseOptimizer(phase, config, self.device) for phase in self.phases]
        self.optimizers = [part.optimizer for part in self._parts]
        if sharded and self._average is not None:
            self._average.shard()
        self.random = RandomState(config.seed, self.device)
        self.step = 0
        self.elapsed = 0.0
        self.finished = False
        self.log_path = self.folder.with_suffix(".jsonl")
        self._log = RunLog(self.log_path, config.tensorboard) if is_main() else None
        self._saved: int | None = None  # the step of the checkpoint in the folder
        self._last: dict[str, float] = {}  # the last finite losses

    def _check(self) -> None:
        names = [phase.name for phase in self.phases]
        others = [*names[1:], *self.extra_modules]
        taken = {"model", "ema", "optimizer", "random"}
        if not names or len({*names, *self.extra_modules}) < len(names) + len(self.extra_modules):
            raise ValueError(
                f"phases: got {names} and {[*self.extra_modules]}; expected one or more, of different names"
            )
        if bad := [name for name in others if name in taken or not name.isidentifier()]:
            raise ValueError(f"phases: got the name {bad[0]!r}; expected an identifier other than {sorted(taken)}")
        if self.config.strategy == "fsdp" and len(names) > 1:
            raise ValueError(
                f"strategy: got 'fsdp' with {len(names)} phases; expected 'ddp', as fsdp trains one module"
            )

    def _switch_checkpointing(self) -> None:
        able = [m for phase in self.phases for m in phase.module.modules() if hasattr(m, "checkpointing")]
        if self.config.checkpointing and not able:
            raise ValueError("checkpointing: got True; expected False, as no module of the run can do it")
        for module in able:
            module.checkpointing = self.config.checkpointing  # type: ignore[assignment]

    def run(self, *, seconds: float | None = None) -> None:
        """Train to the last step, or until `seconds` of training (over all runs) are used up.

        With `seconds` the cosine follows whichever is further on, steps or time, so that a slow machine, too, ends with
        a small learning rate. Ctrl-C finishes the running step, saves and raises Interrupted.
        """
        with raise_on_all_ranks(str(self.log_path)):
            if self._log is not None:
                self._log.rewind(self.step)
        for phase in self.phases:
            phase.module.train()
        bar = tqdm(
            total=self.config.steps,
            initial=self.step,
            desc=f"train {self.kind}",
            unit="step",
            smoothing=0.1,
            disable=not is_main(),
        )
        started, before = time.monotonic(), self.elapsed
        loader = Loader(self.draw, self.load, self.config.accumulate)
        log = nullcontext() if self._log is None else closing(self._log)
        with log, bar, loader, _interrupt_flag() as flag:
            while not self.finished:
                self._one_step(bar, loader, seconds)
                self.elapsed, interrupted = all_max(before + time.monotonic() - started, flag.is_set())
                out_of_time = seconds is not None and self.elapsed >= seconds
                self.finished = self.step >= self.config.steps or out_of_time
                if interrupted or self.finished or self.step % self.config.save_every == 0:
                    self._save_or_keep(last=bool(interrupted or self.finished))
                if interrupted and not self.finished:
                    raise Interrupted(f"{self.folder} holds a checkpoint at step {self.step} of {self.config.steps}")
                if self.config.preview_every and self.step % self.config.preview_every == 0:
                    self._preview()
        for phase in self.phases:
            phase.module.eval()

    def _one_step(self, bar: tqdm[Any], loader: Loader, seconds: float | None) -> None:
        config = self.config
        progress = self.step / config.steps
        if seconds is not None:
            progress = max(progress, self.elapsed / seconds)
        rate = learning_rate(config, self.step, min(progress, 1.0))
        random = self.random.get()
        parts = [self._on_device(part) for part in loader.take(self.random.generator)]
        results = [self._gradients(phase, parts) for phase in self._parts]
        for phase, result in zip(self.phases, results, strict=True):
            if broken := result.broken():
                self.random.set(random)
                raise self._diverged(phase.name, broken, result)
            self._last[phase.name] = result.loss
        for part in self._parts:
            part.step(rate)
        if self._average is not None:
            self._average.update()
        for phase, result in zip(self.phases, results, strict=True):
            if phase.after is not None:
                phase.after(result.values)
        self.step += 1
        bar.update()
        if self._log is not None and (self.step % config.log_every == 0 or self.step == config.steps):
            frames = (bar.format_dict["rate"] or 0.0) * self.frames_per_step
            bar.set_postfix(loss=f"{results[0].loss:.4f}", frames_s=f"{frames:.0f}", refresh=False)
            row = {"step": self.step, **results[0].columns()}
            for phase, result in zip(self.phases[1:], results[1:], strict=True):
                row |= result.columns(f"{phase.name}_")
            self._log.write({**row, "lr": rate, "frames_s": frames, "seconds": round(self.elapsed, 3)})

    def _on_device(self, part: Batch) -> Batch:
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in part.items()}

    def _gradients(self, part: PhaseOptimizer, parts: Sequence[Batch]) -> PhaseResult:
        with frozen([phase.module for phase in self.phases if phase is not part.phase]):
            return part.gradients(parts)

    def _diverged(self, phase: str, what: str, result: PhaseResult) -> WaltError:
        """Save the last good step and say what went wrong after it."""
        where = f"{self.kind}, phase {phase!r},"
        message = f"the {what} of the {where} became {getattr(result, what)} at step {self.step + 1}"
        if phase in self._last:
            message += f" (its last finite loss was {self._last[phase]:.6g}, at step {self.step})"
        if self.step == 0:
            return WaltError(f"{message}; lower the learning rate")
        try:
            if self._saved != self.step:
                self._save_or_keep(last=True)
        except WaltError as error:
            return WaltError(f"{message}; {error}")
        return WaltError(f"{message}; {self.folder} holds step {self.step}, to go on from with a lower learning rate")

    def _preview(self) -> None:
        """All ranks take part in gathering a sharded module. The preview leaves the random state as it was."""
        if self.preview is None:
            return
        averaged, random = self.averaged, self.random.get()
        if is_main():
            training = averaged.training
            try:
                self.preview(averaged.eval(), self.step)
            except WaltError as error:
                say(f"{error}; training goes on")
            averaged.train(training)
        self.random.set(random)

    @property
    def averaged(self) -> Model:
        """The first module with the averaged weights, or itself if there is no average. Under FSDP it is a whole copy,
        and every rank must ask for it."""
        return self.model if self._average is None else cast(Model, self._average.module())

    def progress(self) -> dict[str, float]:
        return {"done": self.step, "planned": self.config.steps, "seconds": round(self.elapsed, 1)}

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """The groups of tensors that are saved and loaded in place, beside optimizers and random states."""
        modules: dict[str, nn.Module] = {
            "model": self.model,
            **{phase.name: phase.module for phase in self.phases[1:]},
            **self.extra_modules,
        }
        groups = {name: module.state_dict() for name, module in modules.items()}
        if self._average is not None and self.config.ema_decay:
            groups["ema"] = self._average.tensors()
        return groups

    def _optimizers(self) -> dict[str, Optimizer]:
        names = ["optimizer", *(f"optimizer-{phase.name}" for phase in self.phases[1:])]
        return dict(zip(names, self.optimizers, strict=True))

    def save(self) -> None:
        """Replace the checkpoint in the folder. Every rank must call this."""
        optimizers = {name: optimizer_tensors(optimizer) for name, optimizer in self._optimizers().items()}
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "finished": self.finished,
            "ema_updates": self._average.updates if self._average is not None else 0,
            "training": self.config.to_dict(),
        }
        keep_as = None
        if self.config.keep > 1 and self._saved not in (None, self.step):
            keep_as = self.folder.with_name(f"{self.folder.name}.step{self._saved:09d}")
        groups = {**self._tensors(), **optimizers, "random": self.random.of_all_ranks()}
        save_together(self.folder, self.kind, self.description, groups, state, keep_as=keep_as)
        self._saved = self.step
        if is_main():
            for old in sorted(self.folder.parent.glob(f"{self.folder.name}.step*"))[: -(self.config.keep - 1) or None]:
                shutil.rmtree(old, ignore_errors=True)

    def _save_or_keep(self, last: bool) -> None:
        """`save`; where that fails, the checkpoint before stays: told and, for the last one, WaltError on all ranks."""
        try:
            self.save()
        except WaltError as error:
            kept = "it holds no checkpoint yet" if self._saved is None else f"it still holds step {self._saved}"
            if last:
                raise WaltError(f"{error}; {kept}") from error
            say(f"{error}; {kept}, and training goes on")  # every rank, since one of them knows the reason

    def resume(self, *, new_settings: bool = False) -> bool:
        """Go on from the last complete checkpoint in the folder, if there is one. Every rank must call this.

        WaltError if it is another run's: of another description, or (unless new_settings) of other settings for
        training than those that may always change (`walt.train.optimizers.FREE`), as the number of ranks may. With
        new_settings the data may be another, too (DATA of the description).
        """
        folder = checkpoint_folder(self.folder)
        if folder is None:
            return False
        _, document = load_description(folder, self.kind)
        state = read_json(folder / "state.json")
        try:
            theirs = _fixed(TrainingConfig.from_dict(state["training"]))
            step, elapsed, finished, updates = (state[key] for key in ("step", "elapsed", "finished", "ema_updates"))
        except (KeyError, ValueError, TypeError) as error:
            raise WaltError(f"{folder} is broken: {error}") from error
        free = {"training", *DATA} if new_settings else ()
        asked = {**self.description, "training": _fixed(self.config)}
        found = {**document, "training": theirs}
        for key, value in json.loads(json.dumps(asked)).items():
            if found.get(key) != value and key not in free:
                raise WaltError(
                    f"{folder} belongs to a run with other settings ({_first_difference(key, found.get(key), value)});"
                    " give the same ones, or another --out"
                )
        for name, optimizer in self._optimizers().items():
            load_optimizer(optimizer, folder / f"{name}.safetensors")
        for name, targets in self._tensors().items():
            TensorFiles(folder / f"{name}.safetensors").read_into(targets)
        path = folder / "random.safetensors"
        self.random.restore(read_tensors(path), path)
        if self._average is not None:
            self._average.updates = updates
        self.step, self.elapsed, self._saved = step, elapsed, step
        self.finished = finished and not (new_settings and step < self.config.steps)
        return True


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


def _fixed(config: TrainingConfig) -> dict[str, Any]:
    """The settings that make a run what it is."""
    return {name: value for name, value in config.to_dict().items() if name not in FREE}


def _first_difference(key: str, found: Any, asked: Any) -> str:
    """The innermost setting that differs, as "name: found, now asked"."""
    if isinstance(found, dict) and isinstance(asked, dict):
        for name in sorted({*found, *asked}):
            if found.get(name) != asked.get(name):
                return _first_difference(f"{key}.{name}", found.get(name), asked.get(name))
    return f"{key} is {found!r} there, {asked!r} here"
