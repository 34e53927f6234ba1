"""Options of commands that use a trained model: where it is, and the device."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

import torch

from walt.commands.options import Command
from walt.errors import WaltError
from walt.model.tokenizer import Tokenizer
from walt.pretrained import TINY_DOOM, load_tokenizer, model_folder
from walt.sample.pipeline import WaltPipeline

DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass(kw_only=True)
class ModelCommand(Command):
    from_: str = TINY_DOOM  # folder of a trained model, hub:OWNER/NAME, or a model in this package
    device: str | None = None  # such as cuda (default: a GPU if there is one)

    def pipeline(self) -> WaltPipeline:
        device = find_device(self.device)  # first: the model may be a download
        return WaltPipeline.from_pretrained(self.from_).to(device)

    def tokenizer(self) -> Tokenizer:
        device = find_device(self.device)
        return load_tokenizer(model_folder(self.from_) / "tokenizer").to(device)


def find_device(name: str | None) -> torch.device:
    """The device of this name, after a number was written there and read back; None: a GPU if there is one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name.partition(":")[0] not in {*DEVICES, *(there.partition(":")[0] for there in devices())}:
            raise ValueError("expected cpu, cuda, cuda:N, mps or xpu")  # PyTorch knows others, that hold no tensors
        number = torch.zeros(1, device=name)
        number.item()
    except (ValueError, RuntimeError, AssertionError, ImportError) as error:  # which of them is the backend's choice
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise WaltError(f"--device {shlex.quote(name)}: {reason}; there is {', '.join(devices())}") from error
    return number.device


def devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator is not None else 0
    return ["cpu", *(f"{accelerator}:{index}" for index in range(count))]
