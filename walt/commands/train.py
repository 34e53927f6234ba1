"""`walt train`: which stage, with which settings, on what data."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from walt.checkpoint import checkpoint_folder, load_description
from walt.commands.data import contents
from walt.commands.model import find_device
from walt.commands.options import Command, Size, one_of, read, value
from walt.data.pixels import to_pixels
from walt.distributed import is_rank0, process_group
from walt.errors import WaltError, did_you_mean
from walt.evaluate.evaluate import reconstructions
from walt.evaluate.metrics import psnr
from walt.pretrained import check_run_folder, load_tokenizer
from walt.sample.preview import denoiser_preview
from walt.settings import Settings, merge_settings
from walt.train.denoiser import train_denoiser
from walt.train.log import read_log
from walt.train.run import CLIPS, Run, alone, check, clip_indices, open_data, some_clips, warn_of_slow_bfloat16
from walt.train.tokenizer import train_tokenizer
from walt.train.trainer import Trainer

STAGES = ("tokenizer", "base", "sr")


@dataclass(kw_only=True)
class SettingsSource(Command):
    """Options that the defaults of the settings depend on."""

    preset: str | None = None  # sizes of the models (default: tiny, for sr tiny-sr); see walt info --all
    config: Path | None = None  # YAML file of settings, such as the one that a run leaves in --out
    size: Size | None = None  # height and width of the clips: --data.height and --data.width
    level: Annotated[int, value(one_of(1, 2), "{1,2}")] = 1  # of sr; 2 goes on from 1


@dataclass(kw_only=True)
class Train(SettingsSource):
    stage: tyro.conf.Positional[Annotated[str, value(one_of(*STAGES), "{tokenizer,base,sr}")]]  # in this order
    data: Path  # folder of videos and images, or a prepared one
    out: Path  # folder for checkpoints, latents and logs
    captions: Path | None = None  # CSV or JSONL of file, caption (default: one in the folder)
    device: str | None = None  # such as cpu (default: a GPU if there is one; with torchrun a GPU for each process)
    new_settings: bool = False  # go on from the checkpoint with other settings of training
    settings: Annotated[Settings, tyro.conf.arg(name="")]

    examples = (
        "walt train tokenizer --data clips --out runs/mine --steps 500",
        "walt train base --data clips --out runs/mine --config base.yaml --training.warmup 100",
        "torchrun --nproc-per-node 2 -m walt train base --data clips --out runs/mine",
    )

    @classmethod
    def default(cls, arguments: Sequence[str]) -> Train:
        """Settings by the stage (the first argument), the preset, the file and the size."""
        stage = arguments[0] if arguments else ""
        if {"-h", "--help"} & set(arguments) and stage not in STAGES:
            stage = "base"
        if stage not in STAGES:
            raise WaltError(f"got {stage!r}; expected a stage first: {', '.join(STAGES)}{did_you_mean(stage, STAGES)}")
        source = read(SettingsSource, arguments, rest=True)
        sizes = {"data.height": source.size[0], "data.width": source.size[1]} if source.size else {}
        settings = merge_settings(stage_name(stage, source.level), source.preset, source.config, sizes)
        return cls(stage=tyro.MISSING, data=tyro.MISSING, out=tyro.MISSING, settings=settings, **vars(source))

    def run(self) -> None:
        device = None if self.device is None else find_device(self.device)
        stage = stage_name(self.stage, self.level)
        self.settings.check(stage)
        check_run_folder(self.out)
        if stage != "tokenizer":
            load_description(self.out / "tokenizer", "tokenizer")  # before the data is prepared, which may take long
        with process_group(device) as device, alone(self.out):
            store = open_data(self.data, self.out, self.settings, self.captions)
            print(f"data: {contents(store)}")
            run = Run(stage, self.settings, store, self.out, device, self.new_settings)
            trainer = train_stage(run)
            for line in ending(run, trainer, self.data) if is_rank0() else ():
                print(line)


def ending(run: Run, trainer: Trainer[Any], data: Path) -> Iterator[str]:
    """What came of a run, and the commands that make use of it."""
    if trainer.step == trainer.resumed:
        yield f"{trainer.folder} is finished; to train it further give more --steps, and --new-settings"
    rows = read_log(trainer.log_path)
    loss = f", loss {rows[-1]['loss']:.4g}" if rows else ""
    yield f"{trainer.folder}: {trainer.step} steps in {trainer.elapsed:.0f} s{loss}; losses in {trainer.log_path}"
    if run.stage == "tokenizer":
        clips = to_pixels(next(some_clips(run, CLIPS, held_out=True)))
        made = reconstructions(load_tokenizer(trainer.folder).to(run.device), clips)
        held_out = "held-out" if len(clip_indices(run, held_out=True)[0]) else "training"
        yield f"PSNR of {len(clips)} {held_out} clips: {psnr(made, clips).mean():.2f} dB"
    if previews := sorted((run.out / "previews").glob(f"{run.stage}-*.mp4")):
        yield f"picture: {previews[-1]}"
    for command in next_commands(run, data):
        yield f"next: {shlex.join(map(str, command))}"


def next_commands(run: Run, data: Path) -> Iterator[list[object]]:
    """After the tokenizer the training of a base model, after that samples."""
    if run.stage == "tokenizer" or checkpoint_folder(run.out / "transformer") is None:
        here, scale = run.settings.data, {"sr1": 2, "sr2": 4}.get(run.stage, 1)
        size = f"{here.height // scale}x{here.width // scale}"
        preset = ["--preset", run.settings.preset] if run.stage == "tokenizer" else []
        options = ["--data", data, "--out", run.out, "--size", size, "--frames", here.frames, *preset]
        yield ["walt", "train", "base", *options]
        return
    yield ["walt", "sample", "--from", run.out, "--num", 1, "--out", "sample.mp4"]
    if run.stage.startswith("sr"):
        yield ["walt", "upscale", "--from", run.out, "--video", "sample.mp4", "--out", "large.mp4"]


def stage_name(stage: str, level: int) -> str:
    return f"sr{level}" if stage == "sr" else stage


def train_stage(run: Run) -> Trainer[Any]:
    """Train the stage, from its checkpoint if there is one, to its last step.

    `training.accumulate` and the number of processes change rounding alone, except in the tokenizer's decorrelation
    loss: it is a statistic of a microbatch, and its mean over smaller ones differs.
    """
    check(run)
    warn_of_slow_bfloat16(run)
    return train_tokenizer(run) if run.stage == "tokenizer" else train_denoiser(run, preview=denoiser_preview)
