"""What the stages of training share: the run, its data, resuming, previews."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from walt.atomic import read_json, reading, write_json
from walt.checkpoint import checkpoint_folder, load_description
from walt.data.clips import INDEX, ClipStore, read_index
from walt.data.folders import changes
from walt.data.pixels import to_model
from walt.data.prepare import prepare, source_changes
from walt.data.video import tile, write_mp4
from walt.distributed import is_rank0, raise_on_all_ranks, world_size
from walt.errors import WaltError, WaltWarning, say
from walt.locks import locked
from walt.model.config import ClipShape
from walt.model.cost import count
from walt.model.text import TextEncoder, warn_of_cuts
from walt.names import normal
from walt.rates import same_rate
from walt.settings import Settings
from walt.train.precision import bfloat16_speedup
from walt.train.trainer import Trainer

CLIPS = 4  # at a time, for statistics and previews
FILES = ".files.json"  # suffix of a stage's list of its data

Result = TypeVar("Result")


@dataclass(frozen=True)
class Run:
    """One stage's training: what, with which settings, on what data, where."""

    stage: str  # "tokenizer", "base", "sr1" or "sr2"
    settings: Settings
    store: ClipStore
    out: Path
    device: torch.device
    new_settings: bool = False  # go on from a checkpoint although it was trained with other settings

    @property
    def folder(self) -> Path:
        return self.out / ("transformer" if self.stage == "base" else self.stage)

    @property
    def clip(self) -> ClipShape:
        data = self.settings.data
        return ClipShape(data.frames, data.height, data.width, self.store.rate / data.stride or 8)

    def description(self) -> dict[str, Any]:
        """What of the data the result depends on."""
        # fps and held_out are the prepared folder's, as the settings may leave them open.
        prepared = self.store.settings
        taken = {**self.settings.data.to_dict(), "fps": prepared.fps, "held_out": prepared.held_out}
        data = {"content": self.store.fingerprint, **taken}
        if self.settings.data.text:
            data["captions"] = hashlib.sha256(json.dumps(self.store.caption).encode()).hexdigest()
        return {"data": data}


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Rank 0 locks the run's folder, for all ranks."""
    with contextlib.ExitStack() as held:
        with raise_on_all_ranks(f"cannot write {out}"):
            if is_rank0():
                held.enter_context(locked(out))
        yield


def rank0_first(build: Callable[[], Result], load: Callable[[], Result], what: str) -> Result:
    """Rank 0 builds it, then the others load it."""
    built: list[Result] = []
    with raise_on_all_ranks(what):
        if is_rank0():
            built.append(build())
    return built[0] if built else load()


def open_data(data: Path, out: Path, settings: Settings, captions: Path | None = None) -> ClipStore:
    """Open a prepared folder; any other is prepared in `out` first, for the size in the settings."""
    size = settings.data
    with reading(data):
        is_prepared = (data / INDEX).is_file()
    if is_prepared:
        if captions is not None:
            raise WaltError(f"--captions {captions}: {data} is prepared already; give captions to walt prepare")
        store = ClipStore.open(data)
        if size.height > store.height or size.width > store.width:
            wanted = f"{size.height}x{size.width}"
            raise WaltError(
                f"{data} was prepared for {store.height}x{store.width} pixels; {wanted} are wanted: prepare it with"
                f" --size {wanted}"
            )
        if size.fps and not same_rate(size.fps, store.settings.fps):
            rate = f"at {store.settings.fps:g} frames a second" if store.settings.fps else "with every frame"
            raise WaltError(
                f"{data} was prepared {rate}; {size.fps:g} a second are wanted: prepare it with --fps {size.fps:g}"
            )
        if size.held_out and size.held_out != store.settings.held_out:
            raise WaltError(
                f"{data} was prepared with {store.settings.held_out:g} of its files held out; {size.held_out:g} are"
                f" wanted: prepare it with --held-out {size.held_out:g}"
            )
        tell([*store.passed_over.lines(), *store.remarks()])
        tell(source_changes(store))
        return store
    captions = captions_of(data, captions)
    place = out / f"data-{size.height}x{size.width}{f'-{size.fps:.10g}fps' if size.fps else ''}"
    if data.is_dir() and out.resolve().is_relative_to(data.resolve()):
        raise WaltError(f"{out} lies inside {data}: what is written there would be taken for data; name another folder")
    with raise_on_all_ranks(str(place)):
        # Marking it anew here would change the data of the stages that are trained, even if this one is refused.
        if size.held_out and (place / INDEX).is_file():
            marked = read_index(place)[0].held_out
            if marked != size.held_out:
                raise WaltError(
                    f"{place} was prepared with {marked:g} of its files held out; {size.held_out:g} are wanted: delete"
                    " it, or give another --out"
                )
    return rank0_first(
        lambda: prepare(
            data,
            place,
            height=size.height,
            width=size.width,
            captions=captions,
            shots=size.shots,
            fps=size.fps,
            held_out=size.held_out or None,
        ),
        lambda: ClipStore.open(place),
        str(place),
    )


def tell(lines: Iterable[str]) -> None:
    """Print lines about the data, on rank 0 alone."""
    for line in lines if is_rank0() else ():
        say(line)


def tell_other_rate(what: Path, fps: float, model: Path, trained: float) -> None:
    """A line if clips of `what` have another frame rate than those that the model was trained on; 0 is unknown."""
    if fps and trained and not same_rate(fps, trained):
        tell(
            [
                f"{what}: clips of {fps:.4g} frames a second, but those of {model} have {trained:.4g}"
                " (--fps takes films at one rate)"
            ]
        )


def captions_of(data: Path, captions: Path | None) -> Path | None:
    """The file of captions that was named, else captions.jsonl or captions.csv in the folder, if there is one."""
    if captions is not None:
        return captions
    with reading(data):
        return next((path for path in (data / "captions.jsonl", data / "captions.csv") if path.is_file()), None)


def warn_of_cut_captions(store: ClipStore, encoder: TextEncoder) -> None:
    """WaltWarning on rank 0 if the encoder cuts some of the captions."""
    if is_rank0():
        captions = {item.name: item.caption for item in store.items if item.caption}
        warn_of_cuts("captions", list(captions), list(captions.values()), encoder)


def check(run: Run) -> None:
    """WaltError if the batch cannot be divided, or the data holds no clip for it; a line for clips that are too
    short."""
    data, count = run.settings.data, run.settings.training.accumulate * world_size()
    if data.batch % count:
        below = data.batch // count * count
        nearest = f"{below} or {below + count}" if below else f"{count}"
        raise WaltError(
            f"data.batch: got {data.batch}; expected a multiple of {count} (processes x training.accumulate), such as"
            f" {nearest}"
        )
    if data.frames > 1 and not len(run.store.windows(data.frames, stride=data.stride)):
        if len(run.store.windows(data.frames, stride=data.stride, held_out=True)):
            raise WaltError(
                f"{run.store.folder}: all clips of {data.frames} frames are held out; prepare it with a smaller"
                " --held-out"
            )
        needed = (data.frames - 1) * data.stride + 1
        raise WaltError(
            f"{run.store.folder} holds no clip of {data.frames} frames, for which a shot must have {needed}; give fewer"
            " --frames, and for pictures alone --frames 1"
        )
    if images_of(run) < data.batch:
        tell(run.store.too_short(data.frames, stride=data.stride).lines())


def warn_of_slow_bfloat16(run: Run) -> None:
    """WaltWarning on rank 0 if this CPU trains the stage's layers more slowly in bfloat16 than in float32."""
    if run.settings.training.precision == "float32" or run.device.type != "cpu" or not is_rank0():
        return
    kind = "convolutions" if run.stage == "tokenizer" else "products"
    lowest, highest = bfloat16_speedup(kind)
    if highest < 1:
        speedup = f"{lowest:.1f} to {highest:.1f} times"
        text = f"training.precision bfloat16: this CPU trains {kind} {speedup} as fast as in float32"
        warnings.warn(WaltWarning(f"{text}; --training.precision float32 is better here"), stacklevel=2)


def images_of(run: Run) -> int:
    """Images, or stacks of them, in a batch: all of it if samples have a single frame."""
    return run.settings.data.batch if run.settings.data.frames == 1 else run.settings.data.images


def resume_and_save_settings(run: Run, trainer: Trainer[Any]) -> None:
    """Go on from the run's checkpoint, if there is one, and write the settings beside it."""
    trainer.resume(new_settings=run.new_settings)
    with raise_on_all_ranks(str(run.out)):
        if is_rank0() and not trainer.finished:  # else nothing is trained with them
            data = replace(run.settings.data, held_out=run.store.settings.held_out)  # the settings may leave it open
            replace(run.settings, data=data).save(run.folder.with_suffix(".yaml"))
            write_json(run.folder.with_suffix(FILES), files_of(run))
            say(beginning(run, trainer))


def beginning(run: Run, trainer: Trainer[Any]) -> str:
    """What is trained, where, and on what: the line at the start of a run."""
    data, training = run.settings.data, run.settings.training
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    return (
        f"{trainer.title}: {count(trainer.model) / 1e6:.3g} M parameters, {training.precision} on"
        f" {run.device}{processes}; batches of {data.batch} samples of {data.frames} frames,"
        f" {data.height}x{data.width} pixels; steps {trainer.step + 1} to {training.steps}; log in {trainer.log_path}"
    )


def files_of(run: Run) -> dict[str, Any]:
    """The data of `Run.description`, file by file, to tell what changed."""
    items = {normal(item.name): item for item in run.store.items}
    return {
        "content": run.store.fingerprint,
        "prepared": str(run.store.settings),
        "file": {name: item.digest for name, item in items.items()},
        "caption": {name: item.caption for name, item in items.items() if run.settings.data.text},
    }


def check_same_data(run: Run, kind: str) -> None:
    """WaltError that says what changed, if the run's checkpoint was trained on other data (unless new_settings).

    To be called before latents are encoded anew.
    """
    folder = checkpoint_folder(run.folder)
    if folder is None:
        return
    before, now = load_description(folder, kind)[1].get("data", {}), run.description()["data"]
    if all(before.get(key) == now[key] for key in ("content", "captions") if key in before and key in now):
        return
    if run.new_settings:
        state = read_json(folder / "state.json")
        if state["finished"] and state["step"] >= run.settings.training.steps:
            raise WaltError(f"{folder} has its {state['step']} steps; give more --steps to go on with other data")
        return
    path = run.folder.with_suffix(FILES)
    files = read_json(path) if path.is_file() else {}
    # A run that was killed before its first checkpoint may have left the list of other data than the checkpoint's.
    known = files.get("content") == before.get("content")
    changed = f" ({describe_changes(files, files_of(run))})" if known else ", or by an older walt"
    raise WaltError(
        f"{folder} was trained on other data than {run.store.folder} holds{changed}; give the same data, another --out,"
        " or --new-settings to go on with this"
    )


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The difference of two results of `files_of`: "2 files more: c.mp4, d.mp4; 1 file changed: a.mp4"."""
    old, new = before.get("caption", {}), now["caption"]
    both = old.keys() & new.keys()
    lines = [*changes(before.get("file", {}), now["file"])]
    lines += changes({name: old[name] for name in both}, {name: new[name] for name in both}, "caption")
    if before.get("prepared") != now["prepared"]:
        lines.append(f"prepared with {before.get('prepared')} there, {now['prepared']} here")
    return "; ".join(lines) or "the same files, read in another way"


def clip_indices(run: Run, *, held_out: bool = False) -> tuple[np.ndarray, int]:
    """The store's clips for training or those that are held out, or images if there is none; and their frames."""
    data = run.settings.data
    indices = run.store.windows(data.frames, stride=data.stride, held_out=held_out)
    return (indices, data.frames) if len(indices) else (run.store.images(held_out=held_out), 1)


def some_clips(run: Run, count: int, *, held_out: bool = False) -> Iterator[Tensor]:
    """Up to `count` clips spread over the data (images, if there is none), CLIPS at a time: float32 [N, 3, T, H, W].

    They are of the files for training or, with `held_out`, of those that are held out, if they have some.
    """
    data = run.settings.data
    indices, frames = clip_indices(run, held_out=held_out)
    if not len(indices):
        indices, frames = clip_indices(run)
    chosen = indices[np.linspace(0, len(indices) - 1, min(count, len(indices))).astype(int)]
    for first in range(0, len(chosen), CLIPS):
        batch = chosen[first : first + CLIPS]
        yield to_model(run.store.read(batch, frames, stride=data.stride, crop=(data.height, data.width)))


def write_preview(run: Run, step: int, videos: np.ndarray, columns: int) -> None:
    write_mp4(run.out / "previews" / f"{run.stage}-{step:07d}.mp4", tile(videos, columns), run.clip.fps)
