"""Losses of the first stage: reconstruction, perceptual, adversarial, and the two steps that put them together.

The terms and their weights are MAGVIT-v2's (`TokenizerLossConfig`); what is ours is said where it stands. All take
videos [B, 3, T, H, W], images being videos of one frame.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from walt.model.tokenizer import Tokenizer
from walt.settings import TokenizerLossConfig
from walt.train.perceptual import PerceptualLoss

__all__ = [
    "LeCam",
    "decorrelation_loss",
    "discriminator_loss",
    "discriminator_losses",
    "generator_loss",
    "output_losses",
    "r1_penalty",
    "reconstruction_loss",
    "tokenizer_losses",
]

Losses = tuple[Tensor, dict[str, Tensor]]


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
    with torch.autocast(rows.device.type, enabled=False):
        correlation = rows @ rows.T / rows.shape[1]
    return (correlation - correlation.diag().diag()).square().sum() / len(rows)


def generator_loss(fake_logits: Tensor) -> Tensor:
    """mean softplus(-fake): -log of the probability that the discriminator gives to "real" (non-saturating)."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean softplus(-real) + mean softplus(fake): the cross-entropies of real as real and fake as fake."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def r1_penalty(discriminator: nn.Module, real: Tensor) -> Tensor:
    """Mean over the batch of |gradient of the logit by the video|^2 / 2 (R1, zero-centred, on real videos).

    The square is summed over a video's pixels, and the half comes with the definition. Differentiable: its backward
    pass goes through the discriminator's gradient. In full precision also under autocast.
    """
    with torch.enable_grad(), torch.autocast(real.device.type, enabled=False):
        real = real.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean() / 2


class LeCam(nn.Module):
    """LeCAM: mean relu(real - anchor_fake)^2 + mean relu(anchor_real - fake)^2, for logits and running means of logits.

    Holds the two sides together where data is scarce. `update` moves the running means, which are buffers, so that
    checkpoints carry them; they start at 0, about where a new discriminator's logits are.
    """

    anchor_real: Tensor
    anchor_fake: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("anchor_real", torch.empty(()))
        self.register_buffer("anchor_fake", torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.anchor_real)
        nn.init.zeros_(self.anchor_fake)

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """The penalty for logits [B] each."""
        real, fake = real_logits - self.anchor_fake, self.anchor_real - fake_logits
        return F.relu(real).square().mean() + F.relu(fake).square().mean()

    @torch.no_grad()
    def update(self, real_logit: Tensor | float, fake_logit: Tensor | float) -> None:
        """anchor = decay * anchor + (1 - decay) * mean logit of its side."""
        for anchor, logit in ((self.anchor_real, real_logit), (self.anchor_fake, fake_logit)):
            anchor.lerp_(torch.as_tensor(logit).to(anchor), 1 - self.decay)


def tokenizer_losses(
    tokenizer: Tokenizer,
    video: Tensor,
    config: TokenizerLossConfig,
    *,
    perceptual: PerceptualLoss | None = None,
    discriminator: nn.Module | None = None,
    frames: Tensor | None = None,
) -> Losses:
    """The tokenizer's loss on real videos, see `output_losses`."""
    latent = tokenizer.encode(video)
    output = tokenizer.decode(latent)
    return output_losses(
        output, latent, video, config, perceptual=perceptual, discriminator=discriminator, frames=frames
    )


def output_losses(
    output: Tensor,
    latent: Tensor,
    target: Tensor,
    config: TokenizerLossConfig,
    *,
    perceptual: PerceptualLoss | None = None,
    discriminator: nn.Module | None = None,
    frames: Tensor | None = None,
) -> Losses:
    """Weighted sum of the losses of `output = decode(latent)`, `latent = encode(target)`, and its terms for a log.

    For training steps that go on to use `output`, as the discriminator's next fake. `perceptual` and `discriminator`
    may be left out and their terms with them. `frames` int64 [B, n] are those that the perceptual loss looks at (None:
    all). The log has the unweighted terms, detached and on their device. No gradient reaches the discriminator's
    parameters, so pass the module itself and not its DistributedDataParallel wrapper, which would wait for them.
    """
    output, latent = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (output, latent))
    terms = {
        "reconstruction": (config.reconstruction, reconstruction_loss(output, target, absolute=config.absolute)),
        "decorrelation": (config.decorrelation, decorrelation_loss(latent)),
    }
    if perceptual is not None:
        distance = perceptual(output, target, frames=frames)
        terms["perceptual"] = (config.perceptual, distance)
    if discriminator is not None:
        with frozen(discriminator):
            terms["adversarial"] = (config.adversarial, generator_loss(discriminator(output)))
    loss = torch.stack([weight * term for weight, term in terms.values()]).sum()
    return loss, {name: term.detach() for name, (_, term) in terms.items()}


def discriminator_losses(
    discriminator: nn.Module,
    lecam: LeCam,
    real: Tensor,
    fake: Tensor,
    config: TokenizerLossConfig,
    *,
    penalise: bool,
) -> Losses:
    """The discriminator's loss on real and reconstructed videos.

    The anchors of `lecam` are for the caller to move, by the logged logits: after the step, and with the means over all
    processes.

    With `penalise`, R1 is added at `r1_every` times its weight: ask for it in one step of `r1_every` (lazy
    regularisation). The log has "real_logit", "fake_logit", "lecam" and, where asked for, "r1", detached and on their
    device.
    """
    real_logits, fake_logits = discriminator(real), discriminator(fake.detach())
    anchored = lecam(real_logits, fake_logits)
    loss = discriminator_loss(real_logits, fake_logits) + config.lecam * anchored
    logs = {"real_logit": real_logits.mean(), "fake_logit": fake_logits.mean(), "lecam": anchored}
    if penalise:
        logs["r1"] = r1_penalty(discriminator, real)
        loss = loss + config.r1 * config.r1_every * logs["r1"]
    return loss, {name: value.detach() for name, value in logs.items()}


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Gradients go through `module` but not to its parameters, for what is computed inside."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
