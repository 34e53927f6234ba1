"""`walt demo`: data, both stages of training, samples, figures and a report, within a budget of minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from walt.atomic import write_json
from walt.data.simulator import DEMO_FPS, SCENARIOS, Clips, balanced, demo_clips
from walt.demo import report
from walt.errors import WaltError, as_user_error
from walt.evaluate.metrics import clip_distances, psnr
from walt.evaluate.networks import FEATURES, FrameFeatures, Projection
from walt.locks import locked
from walt.model.config import ClipShape
from walt.model.cost import count
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.presets import PRESETS
from walt.sample.pipeline import WaltPipeline
from walt.settings import TrainingConfig
from walt.stages import decode, encode, new_transformer, prepare_latents, train_tokenizer, train_transformer
from walt.train.trainer import Trainer

FEATURE_FRAMES_PER_SECOND = 200  # on two cores, rounded down


@dataclass(frozen=True)
class DemoConfig:
    """What a demo run does. Steps are upper bounds: the budget of minutes may end a stage before them."""

    minutes: float = 12.0
    preset: str = "tiny"
    seed: int = 0
    scenarios: tuple[str, ...] = SCENARIOS
    clips: int = 96  # for training, a class
    samples: int = 9  # a class, held out and generated alike
    frames: int = 17
    size: int = 64
    tokenizer_steps: int = 5000
    tokenizer_batch: int = 1
    tokenizer_frames: int = 5
    tokenizer_share: float = 0.4  # of the training time
    transformer_steps: int = 2000
    transformer_batch: int = 16
    transformer_images: int = 4  # stacks of images among the batch
    sampling_steps: int = 50
    save_every: int = 100
    dimensions: int = 64  # of the feature space in which sets of clips are compared

    def data(self) -> dict[str, Any]:
        names = ("seed", "scenarios", "clips", "samples", "frames", "size")
        return {name: getattr(self, name) for name in names}


class Demo:
    """One run in one folder. Each stage goes on from its checkpoint, so a second run finishes what a first began."""

    def __init__(self, config: DemoConfig, out: str | Path) -> None:
        self.config, self.out = config, Path(out)
        self.started = time.monotonic()
        self.times: dict[str, float] = {}
        self.tokenizer_config, transformer = PRESETS[config.preset]
        classes = len(config.scenarios) + 1
        with as_user_error(f"clips of {config.frames} frames at {config.size}x{config.size}"):
            latent = self.tokenizer_config.latent_shape(config.frames, config.size, config.size)
            self.transformer_config = transformer.resized(latent, classes)
        self.clip = ClipShape(config.frames, config.size, config.size, DEMO_FPS)
        report.check_media(self.out, classes, config.size)

    def run(self) -> dict[str, Any]:
        torch.manual_seed(self.config.seed)
        if self.out.exists() and not self.out.is_dir():
            raise WaltError(f"--out {self.out} is a file, not a folder")
        features = FrameFeatures()  # fails now, not after ten minutes, if a package is missing
        with locked(self.out):
            return self._run(features)

    def _run(self, features: FrameFeatures) -> dict[str, Any]:
        train, test = self._timed("data", self._data)
        tokenizer, first = self._timed("tokenizer", self._tokenizer, train)
        reconstruction = self._timed("reconstruction", self._reconstruct, tokenizer, test)
        pipeline, untrained, second = self._timed("transformer", self._transformer, tokenizer, train)
        samples = self._timed("sampling", self._samples, pipeline)
        pictures = self._timed("sampling images", self._pictures, pipeline)
        # How far the tokenizer alone is from the real clips: samples cannot be much nearer than that.
        sets = {"trained": samples, "untrained": untrained, "reconstructions": reconstruction}
        distances, dimensions = self._timed("features", self._distances, features, train, test, sets)
        decibel = psnr(reconstruction, test.video)
        metrics = {
            "psnr": float(decibel.mean()),
            "psnr_by_class": {n: float(decibel[test.label == i].mean()) for i, n in enumerate(test.classes)},
            "frechet": distances,
            "frechet_ratio": distances["untrained"]["frames"] / distances["trained"]["frames"],
            "decoded_ratio": distances["untrained"]["decoded"] / distances["trained"]["decoded"],
            "frechet_features": f"{FEATURES}, first {dimensions} principal components of real training frames",
            "frechet_clips": len(test),
            "frechet_frames": len(test) * test.video.shape[1],
            "steps": {trainer.kind: trainer.progress() for trainer in (first, second)},
            "parameters": {"tokenizer": count(tokenizer), "transformer": count(pipeline.transformer)},
            "clips": {"train": len(train), "held out": len(test)},
            "classes": list(train.classes),
            "threads": torch.get_num_threads(),
            "settings": asdict(self.config),
            "seconds": {**self.times, "total": round(time.monotonic() - self.started, 1)},
        }
        one = balanced(test, 1)
        report.write_media(
            self.out, test.video[one], reconstruction[one], samples[:: self.config.samples], pictures, DEMO_FPS
        )
        report.write_curves(self.out)
        write_json(self.out / "metrics.json", metrics)
        report.write_html(self.out, metrics)
        return metrics

    def _timed(self, name: str, work: Callable[..., Any], *inputs: Any) -> Any:
        begun = time.monotonic()
        result = work(*inputs)
        self.times[name] = round(time.monotonic() - begun, 1)
        return result

    def _left(self) -> float:
        return self.config.minutes * 60 - (time.monotonic() - self.started)

    def _data(self) -> tuple[Clips, Clips]:
        c = self.config
        train, test = demo_clips(c.clips, c.samples, scenarios=c.scenarios, frames=c.frames, size=c.size, seed=c.seed)
        shared = set(train.source) & set(test.source)
        if shared:
            raise WaltError(f"{len(shared)} sources are both trained on and held out, such as {min(shared)}")
        return train, test

    def _tokenizer(self, clips: Clips) -> tuple[Tokenizer, Trainer[Tokenizer]]:
        c = self.config
        return train_tokenizer(
            clips,
            self.tokenizer_config,
            TrainingConfig(c.tokenizer_steps, lr=2e-3, warmup=100, save_every=c.save_every, seed=c.seed),
            self.out / "tokenizer",
            batch=c.tokenizer_batch,
            frames=min(c.frames, c.tokenizer_frames),
            data=c.data(),
            seconds=max(1.0, c.tokenizer_share * self._left()),
        )

    def _reconstruct(self, tokenizer: Tokenizer, test: Clips) -> np.ndarray:
        return decode(tokenizer, encode(tokenizer, test.video, desc="reconstruct"))

    def _transformer(self, tokenizer: Tokenizer, clips: Clips) -> tuple[WaltPipeline, np.ndarray, Trainer[Transformer]]:
        """Train; also returns what the same network samples before its first step."""
        c = self.config
        latents = prepare_latents(tokenizer, clips)
        transformer, diffusion = new_transformer(self.transformer_config, c.seed)
        pipeline = WaltPipeline(tokenizer, transformer, diffusion, clip=self.clip, classes=clips.classes)
        begun = time.monotonic()
        untrained = self._samples(pipeline)
        # Left for the end: the same sampling again, features of five sets of clips, the report.
        reserve = 1.3 * (time.monotonic() - begun) + 5 * untrained.shape[0] * c.frames / FEATURE_FRAMES_PER_SECOND + 15
        pipeline.transformer, trainer = train_transformer(
            transformer,
            diffusion,
            latents,
            TrainingConfig(c.transformer_steps, lr=1e-3, save_every=c.save_every, seed=c.seed),
            self.out / "transformer",
            batch=c.transformer_batch,
            images=c.transformer_images,
            clip=self.clip,
            classes=clips.classes,
            data=c.data(),
            seconds=max(1.0, self._left() - reserve),
        )
        return pipeline, untrained, trainer

    def _samples(self, pipeline: WaltPipeline) -> np.ndarray:
        """`samples` clips of each class, class by class, from a fixed seed."""
        c = self.config
        labels = [label for label in range(len(pipeline.classes)) for _ in range(c.samples)]
        return pipeline.generate(labels, len(labels), steps=c.sampling_steps, seed=c.seed, batch=24)

    def _pictures(self, pipeline: WaltPipeline) -> np.ndarray:
        """Four pictures of each class."""
        labels = [label for label in range(len(pipeline.classes)) for _ in range(4)]
        steps, seed = self.config.sampling_steps, self.config.seed + 1
        return pipeline.generate(labels, len(labels), steps=steps, seed=seed, images=True)

    def _distances(
        self, features: FrameFeatures, train: Clips, test: Clips, sets: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, dict[str, float]], int]:
        """Frechet distances of each set, and of real training clips (the floor), to the held-out clips.

        "decoded" is the distance to the held-out clips as the tokenizer shows them: what is left to the transformer.
        """
        known = features(train.video[balanced(train, self.config.samples)], desc="features of training clips")
        dimensions = min(self.config.dimensions, known.shape[0] * known.shape[1] // 4)
        project = Projection(known, dimensions)
        held_out = project(features(test.video, desc="features of held-out clips"))
        projected = {name: project(features(video, desc=f"features of {name}")) for name, video in sets.items()}
        projected["real training clips"] = project(known)
        distances = {
            name: {
                **clip_distances(rows, held_out),
                "decoded": clip_distances(rows, projected["reconstructions"])["frames"],
            }
            for name, rows in projected.items()
        }
        return distances, dimensions


def summary(metrics: dict[str, Any], out: Path) -> Sequence[str]:
    """What the demo prints at the end."""
    frechet = metrics["frechet"]
    return (
        f"held-out reconstruction   PSNR {metrics['psnr']:.2f} dB (mean of {metrics['clips']['held out']} clips)",
        f"Frechet distance to {metrics['frechet_clips']} held-out clips ({metrics['frechet_frames']} frames a side)",
        f"  features                {metrics['frechet_features']}",
        *(
            f"  {name:<23} frames {d['frames']:8.1f}  motion {d['motion']:7.2f}  to reconstructions {d['decoded']:7.1f}"
            for name, d in frechet.items()
        ),
        f"  untrained / trained     {metrics['frechet_ratio']:.2f}, to reconstructions {metrics['decoded_ratio']:.2f}",
        f"time                      {metrics['seconds']['total']:.0f} s",
        f"report                    {out / 'report.html'}",
    )
