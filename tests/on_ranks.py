"""Small training runs that one process or several can do, and what each of two ranks does in tests/test_distributed.py.

Run by that test as `python tests/on_ranks.py FOLDER`, once for each rank, in torchrun's environment.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import walt.checkpoint
from walt.distributed import all_max, process_group, rank
from walt.errors import Interrupted, WaltError
from walt.model.config import TransformerConfig
from walt.model.diffusion import Diffusion
from walt.model.transformer import Transformer
from walt.settings import TrainingConfig
from walt.train.losses import DenoiserLoss, r1_penalty
from walt.train.objective import Objective
from walt.train.trainer import Trainer

STEPS = 4


class Block(nn.Module):
    """Like the transformer's layers, it has no forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width + 1), nn.Tanh(), nn.Linear(2 * width + 1, width))

    def attend(self, x):
        return x + torch.tanh(self.attention(x)) + self.mlp(x)


class Net(nn.Module):
    """Widths that two ranks cannot halve; an output layer of one row."""

    def __init__(self, width: int = 5, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(3, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.last = nn.Linear(width, 1)
        self.spare = nn.Parameter(torch.ones(3, 2))  # never used, so it gets no gradient and no optimizer state
        self.unused_parameters = True
        self.dropout = dropout
        self.checkpointing = False
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        h = F.dropout(self.first(x), self.dropout, self.training)
        for layer in self.layers:
            h = checkpoint(layer.attend, h, use_reentrant=False) if self.checkpointing else layer.attend(h)
        return self.last(h)


class Running(nn.Module):
    """A running mean, as LeCAM keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("real", torch.zeros(()))

    def follow(self, values) -> None:
        self.real.lerp_(torch.tensor(values["real"]), 0.1)


BATCH = 8


def source(shared, samples):
    x = torch.stack([torch.randn(3, generator=own) for own in samples.values()])
    return {"x": x, "y": torch.sin(2 * x.sum(1, keepdim=True)) + 3, "exponent": 2}


def regression(model, batch):
    error = model(batch["x"]).float() - batch["y"]
    return error.pow(batch["exponent"]).mean(), {"error": error.abs().mean()}


def trainer_of(objectives, folder: Path, **more) -> Trainer:
    return Trainer(objectives, source, folder, **{"batch": BATCH, "kind": "net", "description": {}, **more})


def fit(
    folder: Path, steps: int = STEPS, *, dropout: float = 0.0, loss=regression, preview=None, **settings
) -> Trainer:
    """One objective."""
    torch.manual_seed(1 + rank())  # all start from the weights of rank 0
    config = TrainingConfig(steps, **{"lr": 0.05, "warmup": 3, "log_every": 1, "clip_norm": 0.5, **settings})
    objective = Objective(Net(dropout=dropout), loss, config, average=True)
    return trainer_of([objective], folder, description={"config": {"width": 5}}, preview=preview)


def adversaries(folder: Path, steps: int = STEPS, **settings) -> Trainer:
    """Two objectives, and a module beside them that changes in training."""
    torch.manual_seed(1)
    judge, running = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)), Running()

    def generate(model, batch):
        made = model(batch["x"])
        return (made - batch["y"]).square().mean() + F.softplus(-judge(made)).mean(), {"made": made.mean()}

    def discriminate(judge, batch):
        real, made = judge(batch["y"]), judge(model(batch["x"]).detach())
        loss = F.softplus(-real).mean() + F.softplus(made).mean() + (made - running.real).square().mean()
        return loss + r1_penalty(judge, batch["y"]), {"real": real.mean()}

    model = Net()
    config = TrainingConfig(steps, **{"lr": 0.02, "warmup": 3, "log_every": 1, "clip_norm": 0.5, **settings})
    objectives = [
        Objective(model, generate, config, average=True),
        Objective(judge, discriminate, config, name="judge", after_step=running.follow),
    ]
    return trainer_of(objectives, folder, extra_modules={"running": running})


TRANSFORMER = TransformerConfig(
    layers=2,
    width=16,
    heads=2,
    latent_channels=4,
    latent_size=(2, 2, 2),
    spatial_window=(1, 2, 2),
    spacetime_window=(2, 2, 2),
    classes=2,
)


def denoise(folder: Path, **settings) -> Trainer:
    """The real transformer and its loss, with two passes through the model.

    In float64: where a gradient is 0 but for rounding, Adam makes steps of the rounding.
    """
    torch.manual_seed(1)
    diffusion = Diffusion()

    def latents(shared, samples):
        generators = [*samples.values()]
        x = torch.stack([torch.randn(4, 2, 2, 2, generator=own, dtype=torch.float64) for own in generators])
        label, image = torch.tensor([i % 2 for i in samples]), torch.tensor([i >= 2 for i in samples])
        return {"latent": x, "label": label, "image": image, "randoms": diffusion.randoms(x.shape[1:], generators)}

    config = TrainingConfig(STEPS, **{"lr": 0.02, "warmup": 2, "log_every": 1, "clip_norm": 0.1, **settings})
    objective = Objective(Transformer(TRANSFORMER).double(), DenoiserLoss(diffusion), config, average=True)
    return Trainer([objective], latents, folder, batch=4, kind="transformer", description={})


# name: (run, what all ranks do alike, what only the run on two ranks does)
RUNS = {
    "ddp": (fit, {"save_every": 2, "keep": 2}, {}),
    "ddp-parts": (adversaries, {}, {"accumulate": 2, "checkpointing": True}),
    "ddp-adafactor": (adversaries, {"optimizer": "adafactor"}, {}),
    "fsdp": (fit, {"save_every": 2, "keep": 2}, {"strategy": "fsdp"}),
    "fsdp-parts": (fit, {"weight_decay": 0.1}, {"strategy": "fsdp", "accumulate": 2, "checkpointing": True}),
    "fsdp-adafactor": (fit, {"optimizer": "adafactor", "save_every": 2, "keep": 2}, {"strategy": "fsdp"}),
    "fsdp-no-average": (fit, {"ema_decay": 0.0, "clip_norm": 0.0}, {"strategy": "fsdp"}),
    "ddp-transformer": (denoise, {}, {"checkpointing": True}),
    "fsdp-transformer": (denoise, {}, {"strategy": "fsdp", "checkpointing": True}),
    "fsdp-transformer-adafactor": (denoise, {"optimizer": "adafactor", "weight_decay": 0.1}, {"strategy": "fsdp"}),
}
RESUMED = ("ddp", "fsdp", "fsdp-adafactor")


def step_two(folder: Path) -> Path:
    """The checkpoint that a run with keep=2, save_every=2 leaves behind at step 2."""
    return folder.with_name(f"{folder.name}.step000000002")


def nan_on_one_rank(model, batch):
    loss, values = regression(model, batch)
    return loss * (float("nan") if rank() == 1 and trainers[-1].step == 2 else 1.0), values


trainers: list[Trainer] = []


def on_ranks(out: Path) -> dict:
    """All that two ranks do; the test looks at the folders and at what is returned."""
    said = {}
    for name, (make, settings, here) in RUNS.items():
        make(out / name, **settings, **here).run()

    # From the checkpoint of one process.
    for name in RESUMED:
        make, settings, here = RUNS[name]
        trainer = make(out / f"{name}-from-one", **settings, **here)
        assert trainer.resume()
        assert trainer.step == 2
        trainer.run()
    fit(out / "bfloat16", strategy="fsdp", precision="bfloat16").run()

    # Dropout differs between ranks, and goes on where it was.
    settings = {"dropout": 0.5, "save_every": 2, "keep": 2, "strategy": "fsdp"}
    fit(out / "dropout", **settings).run()
    if rank() == 0:
        shutil.copytree(step_two(out / "dropout"), out / "dropout-resumed")
    all_max(0.0)  # waits until every rank is here
    resumed = fit(out / "dropout-resumed", **settings)
    torch.manual_seed(99)
    resumed.resume()
    resumed.run()
    said["dropout"] = torch.rand(1).item()

    # A preview gets a whole module, and buffers that are set on one are saved.
    seen = []
    trainer = fit(out / "preview", strategy="fsdp", preview_every=2, preview=lambda *seen_: seen.append(seen_))
    trainer.run()
    said["previews"] = [step for _, step in seen]
    averaged = trainer.averaged
    averaged.scale.fill_(7.0)
    trainer.save()
    said["averaged"] = averaged(torch.ones(1, 3)).item()
    said["training"] = trainer.averaged.training

    # A signal to one rank is one to both.
    def struck(model, batch):
        if rank() == 1 and trainers[-1].step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return regression(model, batch)

    trainers.append(fit(out / "struck", loss=struck))
    try:
        trainers[-1].run()
    except Interrupted as interruption:
        said["struck"] = [interruption.signal, trainers[-1].step]

    # What goes wrong on one rank stops both.
    trainers.append(fit(out / "nan", loss=nan_on_one_rank))
    try:
        trainers[-1].run()
    except WaltError as error:
        said["nan"] = str(error)
    write = walt.checkpoint.write_tensors

    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    walt.checkpoint.write_tensors = full if rank() == 1 else write
    try:
        trainer.save()
    except WaltError as error:
        said["full"] = str(error)

    def healed(model, batch):
        if trainers[-1].step == 2:
            walt.checkpoint.write_tensors = write
        return regression(model, batch)

    trainers.append(fit(out / "outlived", loss=healed, strategy="fsdp", save_every=1))
    trainers[-1].run()
    print("one line")
    return said


def train_forever(folder: str, started) -> None:
    """Save at every step until killed; `started` is an event of multiprocessing."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as sys.stderr:
        trainer = adversaries(Path(folder), steps=10**9, save_every=1, keep=2)
        trainer.resume()
        started.set()
        trainer.run()


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    with process_group():
        said = on_ranks(out)
        (out / f"said-{rank()}.json").write_text(json.dumps(said))
