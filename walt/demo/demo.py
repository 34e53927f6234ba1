"""`walt demo`: data, both stages of training, samples, figures and a report, within a budget of minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from walt.atomic import write_json
from walt.checkpoint import fingerprint
from walt.data.clips import ClipStore
from walt.data.simulator import DEMO_FPS, SCENARIOS
from walt.demo import report
from walt.demo.clips import ClipSet
from walt.errors import WaltError, as_user_error
from walt.evaluate.evaluate import reconstructions
from walt.evaluate.metrics import clip_distances, psnr
from walt.evaluate.networks import FEATURES, FrameFeatures, Projection
from walt.locks import locked
from walt.model.cost import count
from walt.model.diffusion import Diffusion
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.pretrained import load_tokenizer
from walt.sample.pipeline import WaltPipeline
from walt.settings import Settings, load_settings
from walt.train.denoiser import latents, train_denoiser, transformer_config
from walt.train.run import Run
from walt.train.tokenizer import train_tokenizer
from walt.train.trainer import Trainer

FEATURE_FRAMES_PER_SECOND = 200  # on two cores, rounded down


@dataclass(frozen=True)
class DemoConfig:
    """Settings of a demo. The budget of minutes may end a stage before its last step."""

    minutes: float = 12.0  # budget of wall-clock time
    preset: str = "tiny"  # sizes of the models
    seed: int = 0  # of data, weights, batches and samples
    scenarios: tuple[str, ...] = SCENARIOS  # of ViZDoom, each one a class
    clips: int = 96  # training clips a class
    samples: int = 9  # held-out and generated clips a class
    frames: int = 17  # of a clip, 1 + 4k
    size: int = 64  # height and width in pixels, a multiple of 8
    tokenizer_steps: int = 5000  # training steps of the tokenizer, at most
    tokenizer_batch: int = 1  # clips of one of its steps
    tokenizer_frames: int = 5  # of these clips, at most
    tokenizer_share: float = 0.4  # of the training time
    transformer_steps: int = 2000  # training steps of the transformer, at most
    transformer_batch: int = 16  # samples of one of its steps
    transformer_images: int = 4  # stacks of images among them
    sampling_steps: int = 50  # DDIM steps
    save_every: int = 100  # training steps
    dimensions: int = 64  # of the feature space in which sets of clips are compared

    def settings(self, stage: str) -> Settings:
        """The preset's settings of a stage, as `walt train` has them, with the demo's steps, batch and sizes."""
        base = load_settings(stage, preset=self.preset)
        if stage == "tokenizer":
            steps, frames = self.tokenizer_steps, min(self.frames, self.tokenizer_frames)
            batch, images = self.tokenizer_batch, 0
        else:
            steps, frames = self.transformer_steps, self.frames
            batch, images = self.transformer_batch, self.transformer_images
        training = replace(base.training, steps=steps, save_every=self.save_every, seed=self.seed)
        data = replace(base.data, frames=frames, height=self.size, width=self.size, batch=batch, images=images)
        return replace(base, data=data, training=training)


class Demo:
    """A demo in one folder. Re-running resumes each stage from its checkpoint."""

    def __init__(self, config: DemoConfig, out: str | Path) -> None:
        self.config, self.out = config, Path(out)
        self.started = time.monotonic()
        self.times: dict[str, float] = {}
        c = config
        self.clips = ClipSet(c.seed, c.clips, c.samples, c.frames, c.size, c.scenarios)
        classes = len(config.scenarios) + 1
        settings = config.settings("base")
        if not settings.transformer.classes:
            raise WaltError(f"--preset {config.preset} has no classes, which the demo's has to have; give tiny")
        with as_user_error(f"clips of {config.frames} frames at {config.size}x{config.size}"):
            latent = settings.tokenizer.latent_shape(config.frames, config.size, config.size)
            settings.transformer.resized(latent, classes)
        report.check_media(self.out, classes, config.size)

    def run(self) -> dict[str, Any]:
        torch.manual_seed(self.config.seed)
        if self.out.exists() and not self.out.is_dir():
            raise WaltError(f"--out {self.out} is a file, not a folder")
        features = FrameFeatures()  # fails now, not after ten minutes, if a package is missing
        with locked(self.out):
            return self._run(features)

    def _run(self, features: FrameFeatures) -> dict[str, Any]:
        train, test = self._timed("data", self.clips.open, self.out)
        real = self.clips.read(test)
        tokenizer, first = self._timed("tokenizer", self._tokenizer, train)
        reconstruction = self._timed("reconstruction", self._reconstruct, tokenizer, real)
        pipeline, untrained, second = self._timed("transformer", self._transformer, tokenizer, train)
        samples = self._timed("sampling", self._samples, pipeline)
        pictures = self._timed("sampling images", self._pictures, pipeline)
        # How far the tokenizer alone is from the real clips: samples cannot be much nearer than that.
        sets = {"trained": samples, "untrained": untrained, "reconstructions": reconstruction}
        distances, dimensions = self._timed("features", self._distances, features, train, real, sets)
        decibel = psnr(reconstruction, real)
        metrics = {
            "psnr": float(decibel.mean()),
            "psnr_by_class": {n: float(decibel[test.label == i].mean()) for i, n in enumerate(test.classes)},
            "frechet": distances,
            "frechet_ratio": distances["untrained"]["frames"] / distances["trained"]["frames"],
            "decoded_ratio": distances["untrained"]["decoded"] / distances["trained"]["decoded"],
            "frechet_features": f"{FEATURES}, first {dimensions} principal components of real training frames",
            "frechet_clips": len(real),
            "frechet_frames": len(real) * real.shape[1],
            "steps": {trainer.kind: trainer.progress() for trainer in (first, second)},
            "parameters": {"tokenizer": count(tokenizer), "transformer": count(pipeline.transformer)},
            "clips": {"train": len(train.items), "held out": len(test.items)},
            "classes": list(train.classes),
            "threads": torch.get_num_threads(),
            "settings": asdict(self.config),
            "seconds": {**self.times, "total": round(time.monotonic() - self.started, 1)},
        }
        one, sampled = test.balanced(1), samples[:: self.config.samples]
        report.write_media(self.out, real[one], reconstruction[one], sampled, pictures, DEMO_FPS)
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

    def _training(self, stage: str, store: ClipStore) -> Run:
        return Run(stage, self.config.settings(stage), store, self.out, torch.device("cpu"))

    def _tokenizer(self, train: ClipStore) -> tuple[Tokenizer, Trainer[Tokenizer]]:
        seconds = max(1.0, self.config.tokenizer_share * self._left())
        trainer = train_tokenizer(self._training("tokenizer", train), seconds=seconds)
        return load_tokenizer(self.out / "tokenizer"), trainer

    def _reconstruct(self, tokenizer: Tokenizer, real: np.ndarray) -> np.ndarray:
        return np.concatenate(list(reconstructions(tokenizer, real)))

    def _transformer(
        self, tokenizer: Tokenizer, train: ClipStore
    ) -> tuple[WaltPipeline, np.ndarray, Trainer[Transformer]]:
        """Train; also returns what the same network samples before its first step."""
        run = self._training("base", train)
        latents(run, tokenizer, fingerprint(tokenizer), half=False)  # now, so that the time left is for training
        torch.manual_seed(self.config.seed)
        transformer = Transformer(transformer_config(run, tokenizer, None))
        diffusion = Diffusion(run.settings.diffusion)
        pipeline = WaltPipeline(tokenizer, transformer, diffusion, clip=run.clip, classes=train.classes)
        begun = time.monotonic()
        untrained = self._samples(pipeline)
        # Left for the end: the same sampling again, features of five sets of clips, the report.
        frames = untrained.shape[0] * untrained.shape[1]
        reserve = 1.3 * (time.monotonic() - begun) + 5 * frames / FEATURE_FRAMES_PER_SECOND + 15
        trainer = train_denoiser(run, seconds=max(1.0, self._left() - reserve))
        return WaltPipeline.from_pretrained(self.out), untrained, trainer

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
        self, features: FrameFeatures, train: ClipStore, real: np.ndarray, sets: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, dict[str, float]], int]:
        """Frechet distances of each set, and of real training clips (the floor), to the held-out clips.

        "decoded" is the distance to the held-out clips as the tokenizer shows them: what is left to the transformer.
        """
        known = features(self.clips.read(train, train.balanced(self.config.samples)), desc="features of training clips")
        dimensions = min(self.config.dimensions, known.shape[0] * known.shape[1] // 4)
        project = Projection(known, dimensions)
        held_out = project(features(real, desc="features of held-out clips"))
        projected = {name: project(features(video, desc=f"features of {name}")) for name, video in sets.items()}
        projected["real training clips"] = project(known)
        distances = {
            name: {
                **clip_distances(values, held_out),
                "decoded": clip_distances(values, projected["reconstructions"])["frames"],
            }
            for name, values in projected.items()
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
