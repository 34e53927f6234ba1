"""What is trained on: a loss for each network, `loss(network, batch) -> (scalar, values to log)`.

The tokenizer's is a weighted sum of terms, each a class here with the name of its weight in `TokenizerLossConfig`;
terms and weights are MAGVIT-v2's, and what is ours is said where it stands. Videos are [B, 3, T, H, W], images being
videos of one frame. Values are unweighted, and detached.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from walt.data.loading import Batch
from walt.model.diffusion import Diffusion
from walt.settings import TokenizerLossConfig
from walt.train.objective import Values, frozen
from walt.train.precision import wide


@dataclass(frozen=True)
class Reconstruction:
    """What the terms of the tokenizer's loss look at: output = decode(latent), latent = encode(video)."""

    video: Tensor
    latent: Tensor
    output: Tensor
    perceptual_frames: Tensor | None = None  # int64 [B, n], those that the perceptual loss looks at; None: all


class Term(Protocol):
    name: str  # of the weight, and of the column of the log

    def __call__(self, made: Reconstruction) -> Tensor: ...


class ReconstructionTerm:
    """mean (output - video)^2 + absolute * mean |output - video|, for videos of one shape in [-1, 1].

    The paper names a reconstruction loss and not its form. The square is what PSNR measures; the small absolute
    term keeps a gradient on small errors late in training. The weight is ours.
    """

    name = "reconstruction"

    def __init__(self, absolute: float = TokenizerLossConfig.absolute) -> None:
        self.absolute = absolute

    def __call__(self, made: Reconstruction) -> Tensor:
        if made.output.shape != made.video.shape:
            raise ValueError(
                f"output has shape {list(made.output.shape)}, expected that of video, {list(made.video.shape)}"
            )
        difference = made.output - made.video
        return difference.square().mean() + self.absolute * difference.abs().mean()


class DecorrelationTerm:
    """Mean over channels of the summed squared correlations with the other channels, for latents [B, c, T, H, W].

    Left alone, the channels of a small autoencoder all come to carry brightness; differences between them are then
    too small for the second stage to model. Correlations do not change with a channel's scale, so this costs the
    reconstruction nothing. Not in the paper: ours, instead of the quantizer that keeps MAGVIT-v2's channels apart.
    """

    name = "decorrelation"

    def __call__(self, made: Reconstruction) -> Tensor:
        channels = made.latent.transpose(0, 1).flatten(1)
        channels = channels - channels.mean(1, keepdim=True)
        channels = channels * (channels.square().mean(1, keepdim=True) + 1e-6).rsqrt()
        with torch.autocast(channels.device.type, enabled=False):
            correlation = channels @ channels.T / channels.shape[1]
        return (correlation - correlation.diag().diag()).square().sum() / len(channels)


class PerceptualTerm:
    """The distance of some frames in a network's features; `distance(output, video, frames=)` is `PerceptualLoss`."""

    name = "perceptual"

    def __init__(self, distance: nn.Module) -> None:
        self.distance = distance

    def __call__(self, made: Reconstruction) -> Tensor:
        return self.distance(made.output, made.video, frames=made.perceptual_frames)


class AdversarialTerm:
    """`generator_loss` of the discriminator's logits for the output. No gradient reaches its parameters, so it must be
    the module itself: a DistributedDataParallel wrapper would wait for them."""

    name = "adversarial"

    def __init__(self, discriminator: nn.Module) -> None:
        self.discriminator = discriminator

    def __call__(self, made: Reconstruction) -> Tensor:
        with frozen(self.discriminator):
            return generator_loss(self.discriminator(made.output))


class TokenizerLoss:
    """Weighted sum of terms of the reconstruction of batch["video"]; `config` has a weight for each by its name.

    A term with a start in `config` counts from batch["step"] on that is as large.
    batch["perceptual_frames"], if it is there: float [B, n] in [0, 1), where in each video the perceptual loss looks.
    The reconstruction is left in the batch for the discriminator.
    """

    def __init__(self, config: TokenizerLossConfig, terms: Iterable[Term]) -> None:
        self.terms = [(getattr(config, term.name), getattr(config, f"{term.name}_start", 0), term) for term in terms]

    def __call__(self, network: Any, batch: Batch) -> tuple[Tensor, Values]:
        video, frames = batch["video"], batch.get("perceptual_frames")
        latent = network.encode(video)
        output = network.decode(latent)
        batch["reconstruction"] = wide(output.detach())
        if frames is not None:
            frames = (frames * video.shape[2]).long()
        made = Reconstruction(video, wide(latent), wide(output), frames)
        counting = [(weight, term) for weight, start, term in self.terms if batch.get("step", start) >= start]
        values = {term.name: term(made) for _, term in counting}
        loss = torch.stack([weight * values[term.name] for weight, term in counting]).sum()
        return loss, {name: value.detach() for name, value in values.items()}


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


class DiscriminatorLoss:
    """The discriminator's loss on batch["video"] and on its reconstruction, as `TokenizerLoss` left it.

    In steps with batch["penalise"], R1 is added at `r1_every` times its weight: one step of `r1_every` is to have it
    (lazy regularisation). Values: "real_logit", "fake_logit", "lecam" and, where it was added, "r1". Before the step
    `adversarial_start` the loss is 0, and there are none.
    """

    def __init__(self, config: TokenizerLossConfig, lecam: LeCam) -> None:
        self.config, self.lecam = config, lecam

    def __call__(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Values]:
        real = batch["video"]
        if batch.get("step", self.config.adversarial_start) < self.config.adversarial_start:
            return torch.stack([0 * parameter.sum() for parameter in network.parameters()]).sum(), {}
        real_logits, fake_logits = network(real), network(batch["reconstruction"].detach())
        values = {"real_logit": real_logits.mean(), "fake_logit": fake_logits.mean()}
        values["lecam"] = self.lecam(real_logits, fake_logits)
        loss = discriminator_loss(real_logits, fake_logits) + self.config.lecam * values["lecam"]
        if batch["penalise"]:
            values["r1"] = r1_penalty(network, real)
            loss = loss + self.config.r1 * self.config.r1_every * values["r1"]
        return loss, {name: value.detach() for name, value in values.items()}

    def after_step(self, values: dict[str, float]) -> None:
        """Move LeCAM's anchors by the means over the global batch, so that they are the same however it is cut."""
        if values:
            self.lecam.update(values["real_logit"], values["fake_logit"])


class DenoiserLoss:
    """`Diffusion.loss` of batch["latent"], with batch["randoms"] and all else in it but the step as conditions."""

    def __init__(self, diffusion: Diffusion) -> None:
        self.diffusion = diffusion

    def __call__(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Values]:
        conditions = {name: value for name, value in batch.items() if name not in ("latent", "randoms", "step")}
        return self.diffusion.loss(network, batch["latent"], batch["randoms"], **conditions), {}
