"""The first stage of training: the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from walt.checkpoint import checkpoint_folder
from walt.data.batches import Bucket, Buckets, PixelSource
from walt.data.loading import Batch, Source
from walt.data.pixels import to_pixels
from walt.distributed import is_rank0
from walt.errors import as_user_error, say
from walt.model.config import tokenizer_description
from walt.model.cost import tokenizer_flops
from walt.model.tokenizer import Tokenizer
from walt.pretrained import DENOISERS
from walt.settings import Settings, TokenizerLossConfig
from walt.train.discriminator import Discriminator
from walt.train.losses import (
    AdversarialTerm,
    DecorrelationTerm,
    DiscriminatorLoss,
    LeCam,
    PerceptualTerm,
    ReconstructionTerm,
    Term,
    TokenizerLoss,
)
from walt.train.objective import Objective
from walt.train.perceptual import PerceptualLoss, efficientnet_features
from walt.train.run import CLIPS, Run, check_same_data, images_of, resume_and_save_settings, some_clips, write_preview
from walt.train.trainer import Preview, Trainer


def train_tokenizer(run: Run, *, preview: Preview | None = None, seconds: float | None = None) -> Trainer[Tokenizer]:
    """First stage: reconstruct clips and images, with the losses whose weights are not 0; then latent statistics.

    preview: None for `tokenizer_preview`. seconds: of training in this call; None: no limit.
    """
    settings, data = run.settings, run.settings.data
    check_same_data(run, "tokenizer")
    torch.manual_seed(settings.training.seed)
    tokenizer = Tokenizer(settings.tokenizer).to(run.device)
    objectives, extra = tokenizer_objectives(tokenizer, settings)
    description = {**tokenizer_description(settings.tokenizer), "losses": settings.losses.to_dict()}
    description["clip"] = asdict(run.clip)
    with as_user_error("training"):
        trainer: Trainer[Tokenizer] = Trainer(
            objectives,
            TokenizerSource(run),
            run.folder,
            batch=data.batch,
            frames=data.frames,
            flops=lambda: sum(
                data.batch * weight * tokenizer_flops(settings.tokenizer, bucket.frames, bucket.height, bucket.width)
                for bucket, weight in buckets(run).items()
            ),
            kind="tokenizer",
            description={**description, **run.description()},
            extra_modules=extra,
            preview=preview or tokenizer_preview(run),
        )
    resume_and_save_settings(run, trainer)
    averaged = trainer.averaged
    if not trainer.finished or bool((averaged.latent_std == 1).all()):
        for name, stage in DENOISERS.items() if is_rank0() else ():
            if checkpoint_folder(run.out / name) is not None:
                where = run.out / name
                say(f"{where} was trained on this tokenizer's latents; afterwards, train it again (walt train {stage})")
        trainer.run(seconds=None if seconds is None else trainer.elapsed + seconds)
        averaged = trainer.averaged
        set_statistics(averaged, some_clips(run, STATISTICS))
        trainer.save()
    return trainer


def buckets(run: Run) -> dict[Bucket, float]:
    """The share of the steps of each shape: clips, and single images in data.images / data.batch of them."""
    data = run.settings.data
    video = Bucket(data.frames, data.height, data.width, stride=data.stride)
    image = replace(video, frames=1, images=True)
    share = 1.0 if run.settings.tokenizer.kind == "image" else images_of(run) / data.batch
    return {bucket: weight for bucket, weight in {video: 1 - share, image: share}.items() if weight > 0}


class TokenizerSource:
    """Batches of `TokenizerLoss` and `DiscriminatorLoss`: videos, where to compare them, and which steps have R1."""

    def __init__(self, run: Run) -> None:
        shares, flip = buckets(run), run.settings.data.flip
        self.losses = run.settings.losses
        self.videos: Source = Buckets([PixelSource(run.store, b, flip=flip) for b in shares], list(shares.values()))

    def __call__(self, shared: torch.Generator, samples: Mapping[int, torch.Generator]) -> Batch:
        frames = self.losses.perceptual_frames
        return {
            "video": self.videos(shared, samples)["video"],
            "perceptual_frames": torch.stack(
                [torch.rand(frames, generator=generator) for generator in samples.values()]
            ),
            "penalise": int(torch.randint(self.losses.r1_every, (), generator=shared)) == 0,
        }


def tokenizer_objectives(tokenizer: Tokenizer, settings: Settings) -> tuple[list[Objective], Mapping[str, nn.Module]]:
    """The tokenizer's and, with an adversarial loss, the discriminator's; and modules with running statistics."""
    weights, training, device = settings.losses, settings.training, tokenizer.latent_mean.device
    discriminator = Discriminator(settings.tokenizer.channels).to(device) if weights.adversarial else None
    loss = TokenizerLoss(weights, tokenizer_terms(weights, discriminator, device))
    objectives = [Objective(tokenizer, loss, training, average=True)]
    if discriminator is None:
        return objectives, {}
    lecam = LeCam(weights.lecam_decay).to(device)
    judge = DiscriminatorLoss(weights, lecam)
    after = judge.after_step
    objectives.append(Objective(discriminator, judge, training, name="discriminator", after_step=after))
    return objectives, {"lecam": lecam}


def tokenizer_terms(weights: TokenizerLossConfig, discriminator: nn.Module | None, device: torch.device) -> list[Term]:
    """The terms of the tokenizer's loss; those that need a network only if their weight is not 0."""
    terms: list[Term] = [ReconstructionTerm(weights.absolute), DecorrelationTerm()]
    if weights.perceptual:
        terms.append(PerceptualTerm(PerceptualLoss(efficientnet_features()).to(device)))
    if discriminator is not None:
        terms.append(AdversarialTerm(discriminator))
    return terms


def tokenizer_preview(run: Run) -> Preview:
    """previews/tokenizer-<step>.mp4: clips of the data above their reconstructions."""

    @torch.inference_mode()
    def preview(module: nn.Module, step: int) -> None:
        assert isinstance(module, Tokenizer)
        clips = next(some_clips(run, CLIPS, held_out=True))
        shown = torch.cat([clips, module.decode(module.encode(clips.to(run.device))).cpu()])
        write_preview(run, step, to_pixels(shown), columns=len(clips))

    return preview


STATISTICS = 128  # clips over which the mean and deviation of the latents are taken


@torch.inference_mode()
def set_statistics(tokenizer: Tokenizer, videos: Iterable[Tensor]) -> None:
    """Give the tokenizer each channel's mean and deviation over the latents of videos, float [N, 3, T, H, W] each.

    Afterwards it encodes to, and decodes from, latents of mean 0 and deviation 1 (paper, ablation: normalising them
    brings FVD from 67.9 to 60.7).
    """
    like = tokenizer.latent_mean
    tokenizer.set_latent_statistics(torch.zeros_like(like), torch.ones_like(like))
    latent = torch.cat([tokenizer.encode(video.to(like)) for video in videos])
    tokenizer.set_latent_statistics(latent.mean((0, 2, 3, 4)), latent.std((0, 2, 3, 4)).clamp_min(1e-6))
