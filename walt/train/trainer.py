"""One loop for every stage: it reads data, takes steps, logs where their time goes, and keeps checkpoints.

It runs in one process, or in several under torchrun (`walt.distributed`), with the same result to rounding.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from walt.atomic import read_json
from walt.checkpoint import (
    MADE_BY,
    TensorFiles,
    checkpoint_folder,
    load_description,
    load_optimizer,
    optimizer_tensors,
    save_together,
)
from walt.data.loading import Loader, Source, map_tensors
from walt.distributed import all_max, is_rank0, raise_on_all_ranks, rank, world_size
from walt.errors import Interrupted, WaltError, say
from walt.model.randoms import keyed_seed
from walt.settings import FREE, TrainingConfig
from walt.terminal import progress_bar
from walt.train.ahead import compile_ahead
from walt.train.interrupt import stop_signal
from walt.train.log import RunLog
from walt.train.objective import Objective, Result, frozen
from walt.train.optimizers import learning_rate
from walt.train.timing import PARTS, StepTimes, peak_flops, peak_gib, profiled

PREVIEWS = 4  # of a run, the last one after its last step, where training.preview_every does not say
DATA = ("data", "clip")  # keys of a run's description that are of its data

Model = TypeVar("Model", bound=nn.Module)
Preview = Callable[[nn.Module, int], None]


class Trainer(Generic[Model]):
    """Trains the objectives' networks. The first one's network is the model, and its settings are those of the run.

    A step's batch has `batch` samples over all ranks. `source` makes them from (seed, step, sample) alone
    (`walt.data.loading`), ahead in threads, on each rank its own: to resume, the data needs only the step. torch's
    generator (dropout) begins every step from the seed, the step and the rank.

    All losses of a step see the weights from before it, so that it is taken completely or not at all. A run that was
    interrupted and resumed ends in the same bits as one that was not, on the same machine, number of threads and ranks:
    weights, averages, optimizers, the state of `extra_modules` and the step are in its checkpoint.

    A run has diverged when a loss or a gradient norm is not finite: it stops with a WaltError, and with a checkpoint of
    the step before. Rank 0 calls preview(averaged module, step) every config.preview_every steps; None: PREVIEWS
    times.

    A full disk does not stop a run: a line says that the log, a preview or a checkpoint was not written, and the last
    good checkpoint stays. Only the last checkpoint must be written, or WaltError.

    frames: of a sample. flops(): of a step, over all ranks, for the log's mfu.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        source: Source,
        folder: str | Path,
        *,
        batch: int,
        kind: str,
        description: Mapping[str, Any],
        frames: int = 1,
        flops: Callable[[], float] | None = None,
        extra_modules: Mapping[str, nn.Module] | None = None,
        preview: Preview | None = None,
    ) -> None:
        self.objectives, self.source, self.folder = list(objectives), source, Path(folder)
        self.batch, self.kind, self.description = batch, kind, dict(description)
        self.title = f"train {MADE_BY.get(self.folder.name, kind)}"  # as the command is
        self.frames_per_step, self.flops = batch * frames, flops
        self.extra_modules, self.preview = dict(extra_modules or {}), preview
        self._check_names()
        self.config = self.objectives[0].config
        self._check_strategy()
        self.model = cast(Model, self.objectives[0].network)
        self.device = self.objectives[0].device
        self._switch_checkpointing()
        self.step = self.resumed = 0  # and the step that was resumed from
        self.elapsed = 0.0
        self.finished = False
        self.log_path = self.folder.with_suffix(".jsonl")
        self._log = RunLog(self.log_path, self.config.tensorboard) if is_rank0() else None
        self._times = StepTimes(self.device)
        self._saved: int | None = None  # the step of the checkpoint in the folder
        self._last: dict[str, float] = {}  # the last finite losses

    def _check_names(self) -> None:
        names = [objective.name for objective in self.objectives]
        others = [*names[1:], *self.extra_modules]
        taken = {"model", "ema", "optimizer"}
        if not names or len({*names, *self.extra_modules}) < len(names) + len(self.extra_modules):
            raise ValueError(
                f"objectives: got {names} and {[*self.extra_modules]}; expected one or more, of different names"
            )
        if bad := [name for name in others if name in taken or not name.isidentifier()]:
            raise ValueError(f"objectives: got the name {bad[0]!r}; expected an identifier other than {sorted(taken)}")

    def _check_strategy(self) -> None:
        count = len(self.objectives)
        if self.config.strategy == "fsdp" and count > 1:
            raise ValueError(
                f"strategy: got 'fsdp' with {count} objectives; expected 'ddp', as fsdp trains one network"
            )

    def _switch_checkpointing(self) -> None:
        able = [m for objective in self.objectives for m in objective.network.modules() if hasattr(m, "checkpointing")]
        if self.config.checkpointing and not able:
            raise ValueError("checkpointing: got True; expected False, as no module of the run can do it")
        for module in able:
            module.checkpointing = self.config.checkpointing  # type: ignore[assignment]

    def run(self, *, seconds: float | None = None) -> None:
        """Train to the last step, or until `seconds` of training (over all runs) are used up.

        With `seconds` the cosine follows whichever is further on, steps or time, so that a slow machine, too, ends with
        a small learning rate. Ctrl-C and SIGTERM finish the running step, save and raise Interrupted.
        """
        config = self.config
        with raise_on_all_ranks(str(self.log_path)):
            if self._log is not None:
                self._log.rewind(self.step)
        for objective in self.objectives:
            objective.network.train()
        before, started = self.elapsed, time.monotonic()
        log = nullcontext() if self._log is None else closing(self._log)
        trace = profiled(config.profile if is_rank0() else 0, self.folder.with_suffix(".trace.json.gz"))
        self._times.restart()
        with log, self._bar() as bar, self._loader() as loader, trace as trace_step, stop_signal() as stop:
            while not self.finished:
                lr = self._learning_rate(seconds)
                results = self._step(loader, lr)
                self.elapsed, number = all_max(before + time.monotonic() - started, stop.number)
                self.finished = self.step >= config.steps or (seconds is not None and self.elapsed >= seconds)
                interrupted = bool(number) and not self.finished
                bar.update()
                if self._is_logged(self.step) or self.finished:
                    self._write_row(bar, results, lr)
                with self._times.part("save"):
                    if interrupted or self.finished or self.step % config.save_every == 0:
                        self._save_or_keep(last=interrupted or self.finished)
                    if self._is_previewed() and not interrupted:
                        self._preview()
                    trace_step()
                if interrupted:
                    held = f"{self.folder} holds a checkpoint at step {self.step} of {config.steps}"
                    raise Interrupted(held, int(number))
        for objective in self.objectives:
            objective.network.eval()

    def _step(self, loader: Loader, lr: float) -> list[Result]:
        """One step of every objective."""
        self._times.synchronize = self._is_logged(self.step + 1)
        with self._times.part("data"):
            microbatches = [map_tensors(self._to_device, batch) for batch in loader.take()]
        with self._times.part("compute"):
            if self.step == self.resumed:
                compile_ahead(self.device, lambda: self._backward(microbatches))
            torch.manual_seed(keyed_seed(self.config.seed, self.step, rank(), 1))  # for dropout; 1: apart from the data
            results = self._backward(microbatches)
        self._check_finite(results)
        with self._times.part("optimizer"):
            for objective in self.objectives:
                objective.step(lr)
        self._times.steps += 1
        self.step += 1
        return results

    def _backward(self, microbatches: Sequence[Any]) -> list[Result]:
        if self.config.compile_mode == "reduce-overhead":  # memory of the last step's graphs may be used again
            torch.compiler.cudagraph_mark_step_begin()
        results = []
        for objective in self.objectives:
            with frozen(*(other.network for other in self.objectives if other is not objective)):
                results.append(objective.backward(microbatches))
        return results

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)  # for a GPU from pinned memory

    def _is_logged(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.config.steps

    def _is_previewed(self) -> bool:
        every, steps = self.config.preview_every, self.config.steps
        if every is None:
            return self.step * PREVIEWS // steps > (self.step - 1) * PREVIEWS // steps
        return every > 0 and self.step % every == 0

    def _learning_rate(self, seconds: float | None) -> float:
        progress = self.step / self.config.steps
        if seconds is not None:
            progress = max(progress, self.elapsed / seconds)
        return learning_rate(self.config, self.step, min(progress, 1.0))

    def _bar(self) -> tqdm[Any]:
        total, desc = self.config.steps, self.title
        return progress_bar(total=total, initial=self.step, desc=desc, unit="step", smoothing=0.1, shown=is_rank0())

    def _loader(self) -> Loader:
        config = self.config
        return Loader(
            self.source,
            self.batch,
            config.seed,
            step=self.step,
            accumulate=config.accumulate,
            workers=config.workers,
            pin=self.device.type == "cuda",
        )

    def _write_row(self, bar: tqdm[Any], results: Sequence[Result], lr: float) -> None:
        """Write a row of the log, and show the main numbers on the progress bar or, without one, in a line."""
        if self._log is None:
            return
        row: dict[str, float | None] = {"step": self.step, **results[0].columns()}
        for objective, result in zip(self.objectives[1:], results[1:], strict=True):
            row |= result.columns(f"{objective.name}_")
        seconds = self._times.means()
        row |= {"lr": lr, "frames_s": self.frames_per_step / seconds["step"]}
        row |= {f"{part}_s": seconds[part] for part in PARTS}
        row |= {"peak_gib": peak_gib(self.device), "mfu": self._mfu(seconds["step"]), "seconds": round(self.elapsed, 3)}
        self._log.write({name: value for name, value in row.items() if value is not None})
        shown = {"loss": f"{results[0].loss:.4f}", "frames_s": f"{row['frames_s']:.0f}"}
        if seconds["data"] > 0.1 * seconds["step"]:
            shown["waits_for_data"] = f"{seconds['data'] / seconds['step']:.0%}"
        bar.set_postfix(shown, refresh=False)
        if bar.disable:
            numbers = ", ".join(f"{name}={value}" for name, value in shown.items())
            left = tqdm.format_interval(seconds["step"] * (self.config.steps - self.step))
            say(f"{self.title}: step {self.step} of {self.config.steps}, {numbers}, {left} left")
        self._times.restart()

    def _mfu(self, seconds: float) -> float | None:
        """Model FLOPs utilisation: FLOP/s as a share of the device's peak; None if one of the two is not known."""
        if self.flops is None:
            return None
        stated = self.config.peak_tflops * 1e12
        peak = stated or peak_flops(self.device, self.config.precision)
        return self.flops() / world_size() / seconds / peak if peak else None

    def _check_finite(self, results: Sequence[Result]) -> None:
        """WaltError with the step before saved, if a loss or a gradient is not finite."""
        for objective, result in zip(self.objectives, results, strict=True):
            if what := result.not_finite():
                raise self._diverged(objective.name, what, getattr(result, what))
            self._last[objective.name] = result.loss

    def _diverged(self, name: str, what: str, value: float) -> WaltError:
        """Save the last good step and say what went wrong after it."""
        message = f"the {what} of the {self.kind}, objective {name!r}, became {value} at step {self.step + 1}"
        if name in self._last:
            message += f" (its last finite loss was {self._last[name]:.6g}, at step {self.step})"
        if self.step == 0:
            return WaltError(f"{message}; lower the learning rate")
        try:
            if self._saved != self.step:
                self._save_or_keep(last=True)
        except WaltError as error:
            return WaltError(f"{message}; {error}")
        return WaltError(f"{message}; {self.folder} holds step {self.step}, to go on from with a lower learning rate")

    def _preview(self) -> None:
        """A collective: all ranks gather a sharded module."""
        if self.preview is None:
            return
        averaged = self.averaged
        if is_rank0():
            training = averaged.training
            try:
                self.preview(averaged.eval(), self.step)
            except WaltError as error:
                say(f"{error}; training goes on")
            averaged.train(training)

    @property
    def averaged(self) -> Model:
        """The model with the averaged weights, or itself if there is no average. Under FSDP it is a full copy (a
        collective: all ranks call this)."""
        average = self.objectives[0].average
        return self.model if average is None else cast(Model, average.module())

    def progress(self) -> dict[str, float]:
        return {"done": self.step, "planned": self.config.steps, "seconds": round(self.elapsed, 1)}

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """The groups of tensors that are saved, and loaded in place, beside the optimizers'."""
        modules: dict[str, nn.Module] = {
            "model": self.model,
            **{objective.name: objective.network for objective in self.objectives[1:]},
            **self.extra_modules,
        }
        groups = {name: module.state_dict() for name, module in modules.items()}
        average = self.objectives[0].average
        if average is not None and average.decay:
            groups["ema"] = average.tensors()
        return groups

    def _optimizers(self) -> dict[str, Optimizer]:
        first, *others = self.objectives
        return {"optimizer": first.optimizer, **{f"optimizer-{other.name}": other.optimizer for other in others}}

    def save(self) -> None:
        """Replace the checkpoint in the folder. Every rank must call this."""
        average = self.objectives[0].average
        optimizers = {name: optimizer_tensors(optimizer) for name, optimizer in self._optimizers().items()}
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "finished": self.finished,
            "ema_updates": average.updates if average is not None else 0,
            "training": self.config.to_dict(),
        }
        keep_as = None
        if self.config.keep > 1 and self._saved not in (None, self.step):
            keep_as = self.folder.with_name(f"{self.folder.name}.step{self._saved:09d}")
        groups = {**self._tensors(), **optimizers}
        save_together(self.folder, self.kind, self.description, groups, state, keep_as=keep_as)
        self._saved = self.step
        if is_rank0():
            for old in sorted(self.folder.parent.glob(f"{self.folder.name}.step*"))[: -(self.config.keep - 1) or None]:
                shutil.rmtree(old, ignore_errors=True)

    def _save_or_keep(self, last: bool) -> None:
        """`save`; if that fails, the one before stays, with a line or, for the last one, WaltError on all ranks."""
        try:
            self.save()
        except WaltError as error:
            kept = "it holds no checkpoint yet" if self._saved is None else f"it still holds step {self._saved}"
            if last:
                raise WaltError(f"{error}; {kept}") from error
            say(f"{error}; {kept}, and training goes on")  # every rank, since one of them knows the reason

    def resume(self, *, new_settings: bool = False) -> bool:
        """Go on from the last complete checkpoint in the folder, if there is one. Every rank must call this.

        WaltError if it is another run's: if the description differs, or settings of training other than those in
        `walt.settings.FREE`. With new_settings, training and data (DATA of the description) may differ. The number of
        ranks may always.
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
                go_on = ", or --new-settings to go on with these" if key in ("training", *DATA) else ""
                raise WaltError(
                    f"{folder} belongs to a run with other settings ({_first_difference(key, found.get(key), value)});"
                    f" give the same ones, or another --out{go_on}"
                )
        for name, optimizer in self._optimizers().items():
            load_optimizer(optimizer, folder / f"{name}.safetensors")
        for name, targets in self._tensors().items():
            TensorFiles(folder / f"{name}.safetensors").read_into(targets)
        if self.objectives[0].average is not None:
            self.objectives[0].average.updates = updates
        self.step = self.resumed = self._saved = step
        self.elapsed = elapsed
        self.finished = finished and not (new_settings and step < self.config.steps)
        return True


def _fixed(config: TrainingConfig) -> dict[str, Any]:
    """The settings that must stay the same when a run is resumed."""
    return {name: value for name, value in config.to_dict().items() if name not in FREE}


def _first_difference(key: str, found: Any, asked: Any) -> str:
    """The innermost setting that differs, as "name is 1 there, 2 here"."""
    if isinstance(found, dict) and isinstance(asked, dict):
        for name in sorted({*found, *asked}):
            if found.get(name) != asked.get(name):
                return _first_difference(f"{key}.{name}", found.get(name), asked.get(name))
    return f"{key} is {found!r} there, {asked!r} here"
