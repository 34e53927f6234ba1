"""What a tokenizer in training makes of held-out clips: figures over time, and the clips beside the originals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import nn

from walt.atomic import atomic_write
from walt.evaluate.evaluate import evaluate, reconstructions
from walt.model.tokenizer import Tokenizer
from walt.train.log import read_log

FIGURES = ("psnr", "colour")  # of reconstructions
Show = Callable[[np.ndarray], None]  # reconstructions uint8 [N, T, H, W, 3]


class HeldOut:
    """A preview of the tokenizer's training: a row of PSNR and colour error of `clips` uint8 [N, T, H, W, 3].

    path: JSONL file of the rows; those of later steps, of a run that was killed, are replaced. show: is given the
    reconstructions, to show them.
    """

    def __init__(self, path: Path, clips: np.ndarray, show: Show | None = None) -> None:
        self.path, self.clips, self.show = path, clips, show

    def __call__(self, module: nn.Module, step: int) -> None:
        assert isinstance(module, Tokenizer)
        made = reconstructions(module, self.clips)
        row = {"step": step, **evaluate(self.clips, made, FIGURES, progress=False).values}
        rows = [*(row for row in read_log(self.path) if row["step"] < step), row]
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if self.show is not None:
            self.show(made)
