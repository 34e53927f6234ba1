"""Losses of the first stage. The tokenizer's adversarial and perceptual terms are not part of this version."""

from __future__ import annotations

from torch import Tensor


def reconstruction_loss(output: Tensor, target: Tensor, *, absolute: float = 0.1) -> Tensor:
    """mean (output - target)^2 + absolute * mean |output - target|, for videos of one shape in [-1, 1].

    The paper names a reconstruction loss and not its form. The square is what PSNR measures; the small absolute
    term keeps a gradient on small errors late in training. The weight is ours.
    """
    if output.shape != target.shape:
        raise ValueError(f"output has shape {list(output.shape)}, expected that of target, {list(target.shape)}")
    difference = output - target
    return difference.square().mean() + absolute * difference.abs().mean()


def decorrelation_loss(latent: Tensor) -> Tensor:
    """Mean over channels of the summed squared correlations with the other channels, for latents [B, c, T, H, W].

    Left alone, the channels of a small autoencoder all come to carry brightness; differences between them are then
    too small for the second stage to model. Correlations do not change with a channel's scale, so this costs the
    reconstruction nothing. Not in the paper: ours, in the place of the quantizer that keeps MAGVIT-v2's channels apart.
    """
    rows = latent.transpose(0, 1).flatten(1)
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows * (rows.square().mean(1, keepdim=True) + 1e-6).rsqrt()
    correlation = rows @ rows.T / rows.shape[1]
    return (correlation - correlation.diag().diag()).square().sum() / len(rows)
