"""The stages of training on a folder of videos and images: tokenizer, base model, super-resolution (`walt train`).

All stages of a model share the folder `out`: it holds the prepared data, the latents, and for each stage a checkpoint
(tokenizer, transformer, sr1, sr2), a log and the settings that made it.
"""

from __future__ import annotations

from typing import Any

from walt.run_common import Run, alone, captions_of, check, open_data, warn_of_cut_captions
from walt.run_tokenizer import train_tokenizer
from walt.run_transformer import train_transformer
from walt.training import Trainer

__all__ = ["Run", "alone", "captions_of", "open_data", "train", "warn_of_cut_captions"]


def train(run: Run) -> Trainer[Any]:
    """Train the stage, from its checkpoint if there is one, to its last step.

    `training.accumulate` and the number of processes change rounding alone, but for the tokenizer's decorrelation loss,
    which is a statistic of the part of the batch that is at hand: it is then the mean over smaller parts.
    """
    check(run)
    return train_tokenizer(run) if run.stage == "tokenizer" else train_transformer(run)
