"""The first stage of training: the tokenizer (`walt.runs`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from walt.checkpoint import checkpoint_folder
from walt.data.batches import Bucket, Buckets, PixelSource, Source
from walt.data.loading import Batch
from walt.data.pixels import to_pixels
from walt.distributed import is_main
from walt.errors import as_user_error, say
from walt.model.config import tokenizer_description
from walt.model.tokenizer import Tokenizer
from walt.pretrained import DENOISERS
from walt.settings import Settings
from walt.train.discriminator import Discriminator
from walt.train.losses import LeCam, discriminator_losses, output_losses
from walt.train.objective import Phase
from walt.train.perceptual import PerceptualLoss, efficientnet_features
from walt.train.run import CLIPS, Run, check_same_data, images_of, resume_and_save_settings, some_clips, write_preview
from walt.train.trainer import Trainer


def train_tokenizer(run: Run) -> Trainer[Tokenizer]:
    """First stage: reconstruct clips and images, with the losses whose weights are not 0; then latent statistics."""
    settings = run.settings
    check_same_data(run, "tokenizer")
    torch.manual_seed(settings.training.seed)
    source = pixel_source(run)
    tokenizer = Tokenizer(settings.tokenizer).to(run.device)
    phases, extra = tokenizer_phases(tokenizer, settings, run.device)

    def draw(generator: torch.Generator) -> Batch:
        batch = source.draw(generator)
        frames = torch.rand(settings.data.batch, settings.losses.perceptual_frames, generator=generator)
        penalise = int(torch.randint(settings.losses.r1_every, (1,), generator=generator)) == 0
        return {**batch, "perceptual": frames, "penalise": int(penalise)}

    def load(rows: Batch) -> Batch:
        return {"video": source.load(rows)["video"], "perceptual": rows["perceptual"], "penalise": rows["penalise"]}

    description = {**tokenizer_description(settings.tokenizer), "losses": settings.losses.to_dict()}
    description["clip"] = asdict(run.clip)
    with as_user_error("training"):
        trainer: Trainer[Tokenizer] = Trainer(
            phases,
            draw,
            settings.training,
            run.folder,
            kind="tokenizer",
            description={**description, **run.description()},
            load=load,
            frames_per_step=settings.data.batch * settings.data.frames,
            extra_modules=extra,
            preview=tokenizer_preview(run),
        )
    resume_and_save_settings(run, trainer)
    averaged = trainer.averaged
    if not trainer.finished or bool((averaged.latent_std == 1).all()):
        for name, stage in DENOISERS.items() if is_main() else ():
            if checkpoint_folder(run.out / name) is not None:
                where = run.out / name
                say(f"{where} was trained on this tokenizer's latents; afterwards, train it again (walt train {stage})")
        trainer.run()
        averaged = trainer.averaged
        set_statistics(averaged, some_clips(run, STATISTICS))
        trainer.save()
    return trainer


def pixel_source(run: Run) -> Source:
    """Clips, and single images in so large a share of the steps as `data.images` is of `data.batch`."""
    data = run.settings.data
    video = Bucket(data.frames, data.height, data.width, data.batch, stride=data.stride)
    image = replace(video, frames=1, images=True)
    share = 1.0 if run.settings.tokenizer.kind == "image" else images_of(run) / data.batch
    weights = {video: 1 - share, image: share}
    used = {bucket: weight for bucket, weight in weights.items() if weight > 0}
    return Buckets([PixelSource(run.store, bucket, flip=data.flip) for bucket in used], list(used.values()))


def tokenizer_phases(
    tokenizer: Tokenizer, settings: Settings, device: torch.device
) -> tuple[list[Phase], Mapping[str, nn.Module]]:
    """The tokenizer's losses and, with an adversarial one, the discriminator's; and modules with running statistics.

    The discriminator's fakes are the reconstructions of the same step, kept from one phase for the other.
    """
    weights = settings.losses
    perceptual = PerceptualLoss(efficientnet_features()).to(device) if weights.perceptual else None
    adversary = Discriminator(settings.tokenizer.channels).to(device) if weights.adversarial else None
    lecam = LeCam(weights.lecam_decay).to(device)
    made: deque[tuple[Tensor, Tensor]] = deque()

    def reconstruct(module: nn.Module, rows: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(module, Tokenizer)
        video = rows["video"]
        latent = module.encode(video)
        output = module.decode(latent)
        if adversary is not None:
            made.append((video, output.detach().float()))
        frames = (rows["perceptual"] * video.shape[2]).long()
        return output_losses(
            output, latent, video, weights, perceptual=perceptual, discriminator=adversary, frames=frames
        )

    def judge(module: nn.Module, rows: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        real, fake = made.popleft()
        return discriminator_losses(module, lecam, real, fake, weights, penalise=bool(rows["penalise"]))

    phases = [Phase("model", tokenizer, reconstruct)]
    if adversary is None:
        return phases, {}

    def after(values: dict[str, float]) -> None:
        lecam.update(values["real_logit"], values["fake_logit"])

    return [*phases, Phase("discriminator", adversary, judge, after)], {"lecam": lecam}


def tokenizer_preview(run: Run) -> Callable[[nn.Module, int], None]:
    """previews/tokenizer-<step>.mp4: clips of the data, held out if some are, above their reconstructions."""

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
