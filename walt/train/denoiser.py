"""The later stages of training: base model and super-resolution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from walt.checkpoint import checkpoint_folder, fingerprint, load_description
from walt.data.batches import LatentSource
from walt.data.latents import LatentStore, encode_latents
from walt.data.loading import Batch
from walt.data.text_features import TextFeatures, encode_captions
from walt.distributed import is_rank0
from walt.errors import WaltError, as_user_error, say
from walt.model.config import TransformerConfig, transformer_description
from walt.model.cost import denoiser_flops
from walt.model.diffusion import Diffusion
from walt.model.text import TextEncoder, text_encoder, with_text
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.pretrained import load_tokenizer, tokenizer_mismatches
from walt.train.losses import DenoiserLoss
from walt.train.objective import Objective
from walt.train.run import (
    Run,
    check_same_data,
    images_of,
    rank0_first,
    resume_and_save_settings,
    tell_other_rate,
    warn_of_cut_captions,
)
from walt.train.trainer import Preview, Trainer

# (run, tokenizer, diffusion, text encoder) -> the preview that the trainer calls, or None.
MakePreview = Callable[[Run, Tokenizer, Diffusion, TextEncoder | None], Preview | None]


def train_denoiser(
    run: Run, *, preview: MakePreview | None = None, seconds: float | None = None
) -> Trainer[Transformer]:
    """Second stage and super-resolution: v-prediction on the latents of the tokenizer in the same folder.

    seconds: of training in this call; None: no limit.
    """
    settings = run.settings
    data = settings.data
    tokenizer = trained_tokenizer(run.out).to(run.device)
    key = fingerprint(tokenizer)
    check_tokenizer(run, key)
    check_cascade(run)
    tell_rate_before(run)
    encoder = text_encoder(data.text, settings.transformer.text_length) if data.text else None
    config = transformer_config(run, tokenizer, encoder)
    if encoder is not None:
        warn_of_cut_captions(run.store, encoder)
    check_same_data(run, "transformer")
    diffusion = Diffusion(settings.diffusion)
    source = denoiser_source(run, tokenizer, key, config, diffusion, encoder)
    torch.manual_seed(settings.training.seed)
    transformer = Transformer(config).to(run.device)
    description = transformer_description(
        config, settings.diffusion, run.clip, run.store.classes if config.classes else (), data.text
    )
    with as_user_error("training"):
        trainer: Trainer[Transformer] = Trainer(
            [Objective(transformer, DenoiserLoss(diffusion), settings.training, average=True)],
            source,
            run.folder,
            batch=data.batch,
            frames=data.frames,
            flops=lambda: data.batch * denoiser_flops(config, settings.diffusion),
            kind="transformer",
            description={**description, **run.description(), "tokenizer": key},
            preview=preview(run, tokenizer, diffusion, encoder) if preview is not None else None,
        )
    resume_and_save_settings(run, trainer)
    trainer.run(seconds=None if seconds is None else trainer.elapsed + seconds)
    return trainer


def trained_tokenizer(out: Path) -> Tokenizer:
    """The tokenizer of the first stage; WaltError unless that was trained to its end, where it gets its statistics."""
    tokenizer = load_tokenizer(out / "tokenizer")
    if bool((tokenizer.latent_std == 1).all()):
        raise WaltError(
            f"{out / 'tokenizer'} was not trained to its end (its latents have no statistics yet); run walt train"
            " tokenizer again, with --new-settings and fewer --steps if it is good enough"
        )
    return tokenizer


def check_tokenizer(run: Run, key: str) -> None:
    """WaltError if the stage's checkpoint was trained with another tokenizer; a line for every other stage's.

    To be called before latents are encoded anew. Other stages may be trained again later.
    """
    for message in tokenizer_mismatches(run.out, key, [run.folder.name]):
        raise WaltError(message)
    if is_rank0():
        for message in tokenizer_mismatches(run.out, key):
            say(message)


def check_cascade(run: Run) -> None:
    """WaltError unless a super-resolution stage's clips are twice as large as those of the stage before, if any."""
    before = {"sr1": "transformer", "sr2": "sr1"}.get(run.stage)
    if before is None or checkpoint_folder(run.out / before) is None:
        return
    clip, data = load_description(run.out / before, "transformer")[1].get("clip", {}), run.settings.data
    for name, factor in (("frames", 1), ("height", 2), ("width", 2)):
        size, expected = getattr(data, name), factor * clip.get(name, 0)
        if size != expected:
            twice = "twice those" if factor == 2 else "those"
            raise WaltError(f"data.{name}: got {size}; expected {expected}, {twice} of {run.out / before}")


def tell_rate_before(run: Run) -> None:
    """Print a line if the clips of the stage before have another frame rate."""
    stages = {"sr1": ("transformer", "tokenizer"), "sr2": ("sr1", "tokenizer")}.get(run.stage, ("tokenizer",))
    folder = next(run.out / name for name in stages if checkpoint_folder(run.out / name) is not None)
    kind = "tokenizer" if folder.name == "tokenizer" else "transformer"
    clip = load_description(folder, kind)[1].get("clip", {})
    if 1 not in (run.settings.data.frames, clip.get("frames")):  # pictures have no rate
        tell_other_rate(run.folder, run.clip.fps, folder, clip.get("fps", 0.0))


def transformer_config(run: Run, tokenizer: Tokenizer, encoder: TextEncoder | None) -> TransformerConfig:
    """The preset's configuration in the size of the data, for its classes and the text encoder."""
    size, config = run.settings.data, run.settings.transformer
    if config.text_width and encoder is None:
        raise WaltError("the preset reads text; name an encoder, such as --data.text bytes or --data.text hf:FOLDER")
    if encoder is not None:
        config = with_text(config, encoder)
        if not any(run.store.caption):
            raise WaltError(f"data.text={encoder.name}: {run.store.folder} has no captions; give --captions")
    classes = len(run.store.classes) if config.classes else 0
    with as_user_error(f"clips of {size.frames} frames at {size.height}x{size.width}"):
        return config.resized(tokenizer.config.latent_shape(size.frames, size.height, size.width), classes)


class DenoiserSource:
    """Batches of `DenoiserLoss`: latents, the random numbers of the diffusion, and the model's conditions."""

    def __init__(
        self, latents: LatentSource, diffusion: Diffusion, config: TransformerConfig, encoder: TextEncoder | None
    ) -> None:
        self.latents, self.diffusion, self.config, self.encoder = latents, diffusion, config, encoder
        captions = [caption for caption in latents.latents.clips.caption if caption]
        # As with `TextFeatures`, texts are as long as the longest caption; the rest would be padding.
        self.longest = max(encoder.count(captions), default=1) if encoder is not None and encoder.vocabulary else 0

    def __call__(self, shared: torch.Generator, samples: Mapping[int, torch.Generator]) -> Batch:
        batch = self.latents(shared, samples)
        captions = batch.pop("caption")
        if not self.config.classes:
            del batch["label"]
        if not self.latents.images:
            del batch["image"]
        if self.encoder is not None and "text" not in batch:
            text, mask = self.encoder.encode(captions)
            batch["text"], batch["text_mask"] = text[:, : self.longest], mask[:, : self.longest]
        shape, low = batch["latent"].shape[1:], self.config.low_resolution
        batch["randoms"] = self.diffusion.randoms(shape, list(samples.values()), low_resolution=low)
        return batch


def denoiser_source(
    run: Run,
    tokenizer: Tokenizer,
    key: str,
    config: TransformerConfig,
    diffusion: Diffusion,
    encoder: TextEncoder | None,
) -> DenoiserSource:
    """Latents of the data, encoded once; for super-resolution also those of its clips at half the size.

    key: the tokenizer's fingerprint.
    """
    features: TextFeatures | None = None
    if encoder is not None and encoder.width:
        frozen, text_key = encoder, f"{encoder.name}, {encoder.length} tokens"
        features = rank0_first(
            lambda: encode_captions(run.store.caption, run.out / "text", frozen.encode, key=text_key),
            lambda: TextFeatures.open(run.out / "text", key=text_key),
            "captions",
        )
    source = LatentSource(
        latents(run, tokenizer, key, half=False),
        run.settings.data.batch,
        images_of(run),
        condition="caption" if encoder is not None else "label",
        text=features,
        low=latents(run, tokenizer, key, half=True) if config.low_resolution else None,
    )
    return DenoiserSource(source, diffusion, config, encoder)


def latents(run: Run, tokenizer: Tokenizer, key: str, half: bool) -> LatentStore:
    """The latents of the data's clips at its size, or of the same clips at half the height and width."""
    data = run.settings.data

    def encode(video: Tensor) -> Tensor:
        if half:
            video = F.interpolate(video, size=(video.shape[2], data.height // 2, data.width // 2), mode="area")
        return tokenizer.encode(video.to(run.device))

    folder = run.out / (f"latents-{data.height}x{data.width}" + ("-half" if half else ""))
    return encode_latents(
        run.store,
        folder,
        encode,
        key=key,
        frames=data.frames,
        height=data.height,
        width=data.width,
        stride=data.stride,
        image_every=4 if images_of(run) else None,
    )
