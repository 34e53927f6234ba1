"""The later stages of training: base model and super-resolution (`walt.runs`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from walt.checkpoint import checkpoint_folder, fingerprint, load_description
from walt.data.batches import LatentSource, Source
from walt.data.latents import LatentStore, encode_latents
from walt.data.loading import Batch
from walt.data.text_features import TextFeatures, encode_captions
from walt.distributed import is_main
from walt.errors import WaltError, as_user_error, say
from walt.model.config import TransformerConfig, transformer_description
from walt.model.diffusion import Diffusion
from walt.model.text import TextEncoder, text_encoder, with_text
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.pretrained import load_tokenizer, of_another_tokenizer
from walt.sample.pipeline import WaltPipeline
from walt.train.objective import Phase
from walt.train.run import (
    Run,
    check_same_data,
    images_of,
    rank0_first,
    resume_and_save_settings,
    tell_other_rate,
    warn_of_cut_captions,
    write_preview,
)
from walt.train.trainer import Trainer

PREVIEWS = 4  # samples of a preview


def train_denoiser(run: Run) -> Trainer[Transformer]:
    """Second stage and super-resolution: v-prediction on the latents of the tokenizer in the same folder."""
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
    source = latent_source(run, tokenizer, key, config, encoder)
    torch.manual_seed(settings.training.seed)
    transformer, diffusion = Transformer(config).to(run.device), Diffusion(settings.diffusion)
    shape = (data.batch, config.latent_channels, *config.latent_size)

    def draw(generator: torch.Generator) -> Batch:
        return {**source.draw(generator), **diffusion.draw(shape, generator)}

    def load(rows: Batch) -> Batch:
        return {**{name: rows[name] for name in diffusion.DRAWS}, **source.load(rows)}

    def loss(module: nn.Module, rows: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        draws = {name: rows[name] for name in diffusion.DRAWS}
        given = {name: value for name, value in rows.items() if name not in draws}
        return diffusion.loss(module, given.pop("latent"), draws, **given), {}

    description = transformer_description(
        config, settings.diffusion, run.clip, run.store.classes if config.classes else (), data.text
    )
    with as_user_error("training"):
        trainer: Trainer[Transformer] = Trainer(
            [Phase("model", transformer, loss)],
            draw,
            settings.training,
            run.folder,
            kind="transformer",
            description={**description, **run.description(), "tokenizer": key},
            load=load,
            frames_per_step=data.batch * data.frames,
            preview=transformer_preview(run, tokenizer, diffusion, encoder),
        )
    resume_and_save_settings(run, trainer)
    trainer.run()
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

    It comes before the latents, which would be encoded anew. Other stages may be trained again later.
    """
    for message in of_another_tokenizer(run.out, key, [run.folder.name]):
        raise WaltError(message)
    if is_main():
        for message in of_another_tokenizer(run.out, key):
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
    """A line if the clips of the stage before have another frame rate."""
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
        raise WaltError("the preset reads text; name an encoder, such as data.text=bytes or data.text=hf:FOLDER")
    if encoder is not None:
        config = with_text(config, encoder)
        if not any(run.store.caption):
            raise WaltError(f"data.text={encoder.name}: {run.store.folder} has no captions; give --captions")
    classes = len(run.store.classes) if config.classes else 0
    with as_user_error(f"clips of {size.frames} frames at {size.height}x{size.width}"):
        return config.resized(tokenizer.config.latent_shape(size.frames, size.height, size.width), classes)


class _Joined:
    """What `walt.data.batches.Source` asks for, over latents: what the model's conditions need and nothing else."""

    def __init__(
        self, latents: LatentSource, low: LatentSource | None, config: TransformerConfig, encoder: TextEncoder | None
    ) -> None:
        self.latents, self.low, self.config, self.encoder = latents, low, config, encoder
        captions = [caption for caption in latents.latents.clips.caption if caption]
        # As with `TextFeatures`, texts are as long as the longest caption of all: the rest of them would be padding.
        self.longest = max(encoder.count(captions), default=1) if encoder is not None and encoder.vocabulary else 0

    def draw(self, generator: torch.Generator) -> Batch:
        return self.latents.draw(generator)

    def load(self, batch: Batch) -> Batch:
        """The arguments of `Diffusion.loss`, x0 under the name "latent"."""
        loaded = self.latents.load(batch)
        captions = loaded.pop("caption")
        if not self.config.classes:
            del loaded["label"]
        if not self.latents.images:
            del loaded["image"]
        if self.encoder is not None and "text" not in loaded:
            text, mask = self.encoder.encode(captions)
            loaded["text"], loaded["text_mask"] = text[:, : self.longest], mask[:, : self.longest]
        if self.low is not None:
            loaded["low_resolution"] = self.low.load(batch)["latent"]
        return loaded


def latent_source(
    run: Run, tokenizer: Tokenizer, key: str, config: TransformerConfig, encoder: TextEncoder | None
) -> Source:
    """Latents of the data, encoded once; for super-resolution also those of its clips at half the size.

    key: the tokenizer's fingerprint.
    """
    data = run.settings.data
    features: TextFeatures | None = None
    if encoder is not None and encoder.width:
        frozen, text_key = encoder, f"{encoder.name}, {encoder.length} tokens"
        features = rank0_first(
            lambda: encode_captions(run.store.caption, run.out / "text", frozen.encode, key=text_key),
            lambda: TextFeatures.open(run.out / "text", key=text_key),
            "captions",
        )
    condition = "caption" if encoder is not None else "label"
    sources = [
        LatentSource(
            latents(run, tokenizer, key, half),
            data.batch,
            images_of(run),
            condition=condition,
            text=None if half else features,
        )
        for half in ((False, True) if config.low_resolution else (False,))
    ]
    return _Joined(sources[0], sources[1] if config.low_resolution else None, config, encoder)


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


def transformer_preview(
    run: Run, tokenizer: Tokenizer, diffusion: Diffusion, encoder: TextEncoder | None
) -> Callable[[nn.Module, int], None] | None:
    """previews/base-<step>.mp4: samples of the first classes or captions, the same noise each time."""
    if run.stage != "base":
        return None
    texts = sorted({caption for caption in run.store.caption if caption})

    def preview(module: nn.Module, step: int) -> None:
        assert isinstance(module, Transformer)
        classes = run.store.classes if module.config.classes else ()
        pipeline = WaltPipeline(tokenizer, module, diffusion, clip=run.clip, classes=classes, text=encoder)
        label = [i % len(classes) for i in range(PREVIEWS)] if classes else None
        text = [texts[i % len(texts)] for i in range(PREVIEWS)] if encoder is not None else None
        videos = pipeline.generate(label, PREVIEWS, text=text, steps=20, progress=False)
        write_preview(run, step, videos, columns=PREVIEWS)

    return preview
