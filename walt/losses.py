"""Losses of the first stage. The tokenizer's adversarial and perceptual terms are not part of this version."""

from __future__ import annotations

import torch


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor, *, absolute: float = 0.1) -> torch.Tensor:
    """mean (output - target)^2 + absolute * mean |output - target|, for videos of one shape in [-1, 1].

    The paper names a reconstruction loss and not its form. The square is what PSNR measures; the small absolute
    term keeps a gradient on small errors late in training. The weight is ours.
    """
    if output.shape != target.shape:
        raise ValueError(f"output has shape {list(output.shape)}, expected that of target, {list(target.shape)}")
    difference = output - target
    return difference.square().mean() + absolute * difference.abs().mean()
