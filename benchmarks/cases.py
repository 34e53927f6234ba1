"""All cases, found in the files of the ops: the shapes of the model (paper sections 2 and 3 of the appendix tables).

``CASES`` keep two CPU cores busy; ``GPU_CASES`` are a GPU's share of a training batch, the most important one of every
op first, then the second ones, and so on: time may run out.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from pathlib import Path

import walt_kernels

from .case import GPU_MODES, Case, Target


def training(name: str, batch: int, frames: int, size: int, quick: bool = True) -> Case:
    """A whole step of walt's tiny preset: forward, loss, backward, clipping, AdamW. ``training_step.py`` builds it.

    Its FLOPs are counted there, and its bytes are nobody's bound; ``flops`` only weighs it against its small version.
    """
    pixels = batch * frames * size * size
    inputs = {"stage": name, "batch": batch, "frames": frames, "size": size}

    def small() -> Case:
        return training(name, -(-batch // 4), frames, size if batch > 1 else size // 2)

    return Case("training_step", name, lambda _: inputs, pixels, 0.0, 1.0, 1.0, pixels, small, quick, modes=("step",))


# The files here that have the name of an op folder.
_KERNELS, _HERE = Path(walt_kernels.__file__).parent, Path(__file__).parent
FILES = [
    importlib.import_module(f".{path.stem}", __package__)
    for path in sorted(_HERE.glob("*.py"))
    if (_KERNELS / path.stem / "op.py").exists()
]
FILE_OF = {case.op: file for file in FILES for case in file.CASES}

CASES: list[Case] = [case for file in FILES for case in file.CASES]
CASES += [training("tokenizer tiny", 1, 5, 64), training("base tiny", 16, 5, 8)]
_TURNS = itertools.zip_longest(*(file.GPU_CASES for file in FILES))
GPU_CASES: list[Case] = [dataclasses.replace(c, modes=GPU_MODES) for turn in _TURNS for c in turn if c is not None]
# A case and the same with one size doubled: cost must grow in step with the work. The first is what the others double.
SCALING: list[dict[str, Case]] = [group for file in FILES for group in file.SCALING]
TARGETS: list[Target] = [target for file in FILES for target in file.TARGETS]


def chosen(op: str | None, name: str | None, quick: bool, device: str = "cpu") -> list[Case]:
    """The cases that the command line asks for."""
    cases = CASES if device == "cpu" else GPU_CASES
    return [case for case in cases if op in (None, case.op) and (name or "") in case.name and (case.quick or not quick)]
