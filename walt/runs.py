"""The stages of training on a folder of videos and images: tokenizer, base model, super-resolution (`walt train`).

All stages of a model share the folder `out`: it holds the prepared data, the latents, and for each stage a checkpoint
(tokenizer, transformer, sr1, sr2), a log and the settings that made it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from walt.buckets import Batch, Bucket, Buckets, PixelSource, Source
from walt.cache import INDEX, Cache
from walt.config import TransformerConfig
from walt.data import to_model, to_pixels
from walt.diffusion import Diffusion
from walt.discriminator import Discriminator
from walt.distributed import failing_together, is_main
from walt.errors import WaltError
from walt.latents import LatentCache, LatentSource, TextFeatures, encode_cache, encode_captions, fingerprint
from walt.losses import LeCam, discriminator_losses, output_losses
from walt.perceptual import PerceptualLoss, efficientnet_features
from walt.pipeline import ClipShape, WaltPipeline, load_tokenizer, tokenizer_description, transformer_description
from walt.prepare import prepare
from walt.settings import Settings
from walt.stages import fitted
from walt.text import TextEncoder, text_encoder, with_text
from walt.tokenizer import Tokenizer
from walt.training import Phase, Trainer
from walt.transformer import Transformer
from walt.video import tile, write_mp4

STATISTICS = 128  # clips over which the mean and deviation of the latents are taken
PREVIEWS = 4  # clips of a preview

Result = TypeVar("Result")


@dataclass(frozen=True)
class Run:
    """One stage's training: what, with which settings, on what data, where."""

    stage: str  # "tokenizer", "base", "sr1" or "sr2"
    settings: Settings
    cache: Cache
    out: Path
    device: torch.device
    new_settings: bool = False  # go on from a checkpoint although it was trained with other settings

    @property
    def folder(self) -> Path:
        return self.out / ("transformer" if self.stage == "base" else self.stage)

    @property
    def clip(self) -> ClipShape:
        data = self.settings.data
        rates = self.cache.fps[self.cache.fps > 0]
        fps = max(1, round(float(np.median(rates)) / data.stride)) if len(rates) else 8
        return ClipShape(data.frames, data.height, data.width, fps)

    def description(self) -> dict[str, Any]:
        """What of the data decides the result."""
        return {"data": {"content": self.cache.fingerprint, **self.settings.data.to_dict()}}


def once(work: Callable[[], Result], what: str) -> Result:
    """`work()`, done by the main rank and then found done by the others."""
    with failing_together(what):
        if is_main():
            work()
    return work()


def open_data(data: Path, out: Path, settings: Settings, captions: Path | None = None) -> Cache:
    """A prepared folder as it is, any other folder after preparing it in `out`, for the size that the settings name."""
    if (data / INDEX).is_file():
        if captions is not None:
            raise WaltError(f"--captions {captions}: {data} is prepared already; give captions to walt prepare")
        return Cache.open(data)
    size = settings.data
    captions = captions_of(data, captions)
    place = out / f"data-{size.height}x{size.width}"
    return once(
        lambda: prepare(data, place, height=size.height, width=size.width, captions=captions, shots=size.shots),
        str(place),
    )


def captions_of(data: Path, captions: Path | None) -> Path | None:
    """The file of captions that was named, else captions.jsonl or captions.csv in the folder, if there is one."""
    if captions is not None:
        return captions
    return next((path for path in (data / "captions.jsonl", data / "captions.csv") if path.is_file()), None)


def train(run: Run) -> Trainer[Any]:
    """Train the stage, from its checkpoint if there is one, to its last step."""
    trainer = train_tokenizer(run) if run.stage == "tokenizer" else train_transformer(run)
    if is_main():
        run.settings.save(run.folder.with_suffix(".yaml"))
    return trainer


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def train_tokenizer(run: Run) -> Trainer[Tokenizer]:
    """First stage: reconstruct clips and images, with the losses whose weights are not 0; then latent statistics."""
    settings = run.settings
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
    trainer.resume(new_settings=run.new_settings)
    averaged = trainer.averaged
    if not trainer.finished or bool((averaged.latent_std == 1).all()):
        trainer.run()
        averaged = trainer.averaged
        set_statistics(averaged, run)
        trainer.save()
    return trainer


def pixel_source(run: Run) -> Source:
    """Clips, and single images in so large a share of the steps as `data.images` is of `data.batch`."""
    data = run.settings.data
    video = Bucket(data.frames, data.height, data.width, data.batch, stride=data.stride)
    image = replace(video, frames=1, images=True)
    share = 1.0 if run.settings.tokenizer.kind == "image" else data.images / data.batch
    weights = {video: 1 - share, image: share}
    used = {bucket: weight for bucket, weight in weights.items() if weight > 0}
    return Buckets([PixelSource(run.cache, bucket, flip=data.flip) for bucket in used], list(used.values()))


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


@torch.inference_mode()
def set_statistics(tokenizer: Tokenizer, run: Run) -> None:
    """Give the tokenizer each channel's mean and deviation over latents of the data (paper: FVD 67.9 -> 60.7).

    Afterwards it encodes to, and decodes from, latents of mean 0 and deviation 1.
    """
    like = tokenizer.latent_mean
    tokenizer.set_latent_statistics(torch.zeros_like(like), torch.ones_like(like))
    latent = torch.cat([tokenizer.encode(video.to(like)) for video in some_clips(run, STATISTICS).split(4)])
    tokenizer.set_latent_statistics(latent.mean((0, 2, 3, 4)), latent.std((0, 2, 3, 4)).clamp_min(1e-6))


def some_clips(run: Run, count: int) -> Tensor:
    """Up to `count` clips spread over the data (images, where there is no clip), float32 [N, 3, T, H, W]."""
    data = run.settings.data
    rows, frames = run.cache.windows(data.frames, stride=data.stride), data.frames
    if not len(rows):
        rows, frames = run.cache.images(), 1
    chosen = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
    return to_model(run.cache.read(chosen, frames, stride=data.stride, crop=(data.height, data.width)))


def tokenizer_preview(run: Run) -> Callable[[nn.Module, int], None]:
    """previews/tokenizer-<step>.mp4: clips of the data above their reconstructions."""

    @torch.inference_mode()
    def preview(module: nn.Module, step: int) -> None:
        assert isinstance(module, Tokenizer)
        clips = some_clips(run, PREVIEWS)
        shown = torch.cat([clips, module.decode(module.encode(clips.to(run.device))).cpu()])
        write_preview(run, step, to_pixels(shown), columns=len(clips))

    return preview


def write_preview(run: Run, step: int, videos: np.ndarray, columns: int) -> None:
    write_mp4(run.out / "previews" / f"{run.stage}-{step:07d}.mp4", tile(videos, columns), run.clip.fps)


# ---- the denoisers ---------------------------------------------------------------------------------------------------


def train_transformer(run: Run) -> Trainer[Transformer]:
    """Second stage and super-resolution: v-prediction on the latents of the tokenizer in the same folder."""
    settings = run.settings
    data = settings.data
    tokenizer = load_tokenizer(run.out / "tokenizer").to(run.device)
    encoder = text_encoder(data.text, settings.transformer.text_length) if data.text else None
    config = transformer_config(run, tokenizer, encoder)
    source = latent_source(run, tokenizer, config, encoder)
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
        config, settings.diffusion, run.clip, run.cache.classes if config.classes else (), data.text
    )
    trainer: Trainer[Transformer] = Trainer(
        [Phase("model", transformer, loss)],
        draw,
        settings.training,
        run.folder,
        kind="transformer",
        description={**description, **run.description()},
        load=load,
        frames_per_step=data.batch * data.frames,
        preview=transformer_preview(run, tokenizer, diffusion, encoder),
    )
    trainer.resume(new_settings=run.new_settings)
    trainer.run()
    return trainer


def transformer_config(run: Run, tokenizer: Tokenizer, encoder: TextEncoder | None) -> TransformerConfig:
    """The preset's configuration in the size of the data, for its classes and the text encoder."""
    settings, size = run.settings, run.settings.data
    config = settings.transformer
    if config.low_resolution != run.stage.startswith("sr"):
        raise WaltError(
            f"preset {settings.preset!r} has low_resolution={config.low_resolution}, which does not fit the stage"
            f" {run.stage}; see walt info --all"
        )
    if config.text_width and encoder is None:
        raise WaltError("the preset reads text; name an encoder, such as data.text=bytes or data.text=hf:FOLDER")
    if encoder is not None:
        config = with_text(config, encoder)
        if not any(run.cache.caption):
            raise WaltError(f"data.text={encoder.name}: {run.cache.folder} has no captions; give --captions")
    classes = len(run.cache.classes) if config.classes else 0
    return fitted(tokenizer.config, config, (size.frames, size.height, size.width), classes)


class _Joined:
    """What `walt.buckets.Source` asks for, over latents: with what the model's conditions need and nothing else."""

    def __init__(
        self, latents: LatentSource, low: LatentSource | None, config: TransformerConfig, encoder: TextEncoder | None
    ) -> None:
        self.latents, self.low, self.config, self.encoder = latents, low, config, encoder

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
            loaded["text"], loaded["text_mask"] = self.encoder.encode(captions)
        if self.low is not None:
            loaded["low_resolution"] = self.low.load(batch)["latent"]
        return loaded


def latent_source(run: Run, tokenizer: Tokenizer, config: TransformerConfig, encoder: TextEncoder | None) -> Source:
    """Latents of the data, encoded once; for super-resolution also those of its clips at half the size."""
    data = run.settings.data
    features: TextFeatures | None = None
    if encoder is not None and encoder.width:
        frozen = encoder
        features = once(
            lambda: encode_captions(run.cache.caption, run.out / "text", frozen.encode, key=frozen.name), "captions"
        )
    condition = "caption" if encoder is not None else "label"
    sources = [
        LatentSource(
            latents(run, tokenizer, half), data.batch, data.images, condition=condition, text=None if half else features
        )
        for half in ((False, True) if config.low_resolution else (False,))
    ]
    return _Joined(sources[0], sources[1] if config.low_resolution else None, config, encoder)


def latents(run: Run, tokenizer: Tokenizer, half: bool) -> LatentCache:
    """The latents of the data's clips at its size, or of the same clips at half the height and width."""
    data = run.settings.data

    def encode(video: Tensor) -> Tensor:
        if half:
            video = F.interpolate(video, size=(video.shape[2], data.height // 2, data.width // 2), mode="area")
        return tokenizer.encode(video.to(run.device))

    name = f"latents-{data.height}x{data.width}" + ("-half" if half else "")
    return once(
        lambda: encode_cache(
            run.cache,
            run.out / name,
            encode,
            key=fingerprint(tokenizer),
            frames=data.frames,
            height=data.height,
            width=data.width,
            stride=data.stride,
            image_every=4 if data.images else None,
        ),
        name,
    )


def transformer_preview(
    run: Run, tokenizer: Tokenizer, diffusion: Diffusion, encoder: TextEncoder | None
) -> Callable[[nn.Module, int], None] | None:
    """previews/base-<step>.mp4: samples of the first classes or captions, the same noise each time."""
    if run.stage != "base":
        return None
    texts = sorted({caption for caption in run.cache.caption if caption})[:PREVIEWS]

    def preview(module: nn.Module, step: int) -> None:
        assert isinstance(module, Transformer)
        classes = run.cache.classes if module.config.classes else ()
        pipeline = WaltPipeline(tokenizer, module, diffusion, clip=run.clip, classes=classes, text=encoder)
        label = list(range(len(classes)))[:PREVIEWS] if classes else None
        num = len(label or texts) if (label or encoder is not None) else PREVIEWS
        text = texts if encoder is not None else None
        videos = pipeline.generate(label, num, text=text, steps=20, progress=False)
        write_preview(run, step, videos, columns=num)

    return preview
