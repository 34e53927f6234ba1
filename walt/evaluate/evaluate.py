"""Metrics of sets of clips; every number is printed with how it was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import torch

from walt.data.pixels import to_model, to_pixels
from walt.evaluate.metrics import colour_error, frechet_distance, inception_score, psnr, ssim
from walt.evaluate.networks import FrameFeatures, Network, VideoFeatures, softmax
from walt.model.tokenizer import Tokenizer
from walt.terminal import progress_bar

Clips = np.ndarray | Iterable[np.ndarray]  # uint8 [N, T, H, W, 3], or any number of such batches

METRICS = {
    "fvd": "FVD",
    "frechet_image_distance": "Frechet image distance",
    "inception_score": "inception score",
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "colour": "colour error",
}
PAIRED = {"psnr": psnr, "ssim": ssim, "colour": colour_error}  # of a clip and its reconstruction
DIGITS = {"ssim": 4, "colour": 4}  # after the point; of the others 2
OF_REAL = {"fvd": "video", "frechet_image_distance": "image"}  # networks that see the real clips, too
PUBLISHED_CLIPS, PUBLISHED_FRAMES = 2048, 16  # fewest clips a side, and frames a clip, of published FVDs


def batches(clips: Clips, size: int = 8, *, name: str = "clips") -> Iterator[np.ndarray]:
    """An array in batches of `size` clips, or batches as they come, checked: uint8 [N, T, H, W, 3] of one clip size."""
    cut = (clips[i : i + size] for i in range(0, len(clips), size)) if isinstance(clips, np.ndarray) else clips
    shape = None
    for batch in cut:
        good = isinstance(batch, np.ndarray) and batch.dtype == np.uint8 and batch.ndim == 5 and batch.shape[-1] == 3
        if not good:
            got = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, np.ndarray) else type(batch).__name__
            raise ValueError(f"{name}: got {got}; expected uint8 [N, T, H, W, 3]")
        shape = shape or batch.shape[1:]
        if batch.shape[1:] != shape:
            raise ValueError(f"{name}: got clips of {list(batch.shape[1:])}; expected {list(shape)}, like the first")
        if len(batch):
            yield batch


@torch.inference_mode()
def reconstructions(tokenizer: Tokenizer, clips: np.ndarray) -> np.ndarray:
    """What the tokenizer makes of clips uint8 [N, T, H, W, 3], some of them at a time."""
    videos = (to_model(batch).to(tokenizer.latent_mean) for batch in batches(clips))
    return np.concatenate([to_pixels(tokenizer.decode(tokenizer.encode(video)).cpu()) for video in videos])


@dataclass(frozen=True)
class Evaluation:
    """Numbers by metric, and for each the lines that say how it was measured and what it cannot be compared with.

    by_class: of metrics that compare clip with clip, the mean over the clips of each class.
    """

    values: dict[str, float]
    protocol: dict[str, tuple[str, ...]]
    real: int  # clips
    fake: int
    clip: tuple[int, int, int]  # frames, height, width
    by_class: dict[str, dict[str, float]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """What is printed: no number without its protocol."""
        frames, height, width = self.clip
        top = f"{self.real} real clips and {self.fake} compared with them, {frames} frames of {height}x{width} pixels"
        lines = [top]
        for name, value in self.values.items():
            digits = DIGITS.get(name, 2)
            lines.append(f"{METRICS[name]:<24}{value:10.{digits}f}")
            lines += [f"  {line}" for line in self.protocol[name]]
            lines += [f"  {label:<22}{value:10.{digits}f}" for label, value in self.by_class.get(name, {}).items()]
        return lines

    def __str__(self) -> str:
        return "\n".join(self.lines())


def evaluate(
    real: Clips,
    fake: Clips,
    metrics: Sequence[str] = ("fvd", "frechet_image_distance", "inception_score"),
    *,
    video: Network | None = None,
    image: Network | None = None,
    classifier: Network | None = None,
    labels: Sequence[str] = (),
    progress: bool = True,
) -> Evaluation:
    """Compare two sets of clips in one pass that keeps features only, so the sets may be longer than memory.

    `real`, `fake`: uint8 [N, T, H, W, 3], or iterables of such batches, of one clip size. `metrics`: keys of METRICS;
    for those in PAIRED, fake clip i is the reconstruction of real clip i, and iterables must give equal batches; with
    `labels`, the class of each clip, they are also given class by class.
    `video` gives FVD its features (None: `VideoFeatures()`, which needs its weights), `image` the Frechet image
    distance (None: `FrameFeatures()`), and `classifier` the inception score of `fake` its probabilities [N, K] (None:
    the softmax of `video`'s logits). ValueError for unlike sets, or fewer than two clips where a spread is needed.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"metrics: got {', '.join(unknown) or 'none'}; expected some of {', '.join(METRICS)}")
    networks: dict[str, Network] = {}
    if "fvd" in metrics or ("inception_score" in metrics and classifier is None):
        networks["video"] = video if video is not None else VideoFeatures()
    if "frechet_image_distance" in metrics:
        networks["image"] = image if image is not None else FrameFeatures()
    if "inception_score" in metrics and classifier is not None:
        networks["classifier"] = classifier
    wanted = {("real", OF_REAL[name]) for name in metrics if name in OF_REAL} | {("fake", name) for name in networks}
    measured = _measure(real, fake, networks, wanted, [name for name in metrics if name in PAIRED], progress)
    for side, count in (("real", measured.real), ("fake", measured.fake)):
        if side in {one for one, _ in wanted}:
            _check_count(count, side)
    values, protocol = {}, {}
    for name in dict.fromkeys(metrics):
        values[name], protocol[name] = _RESULTS[name](measured, networks)
    if labels and len(labels) != measured.real:
        raise ValueError(f"labels: got {len(labels)}; expected {measured.real}, one for each clip")
    classes = np.array(labels)
    by_class = {
        name: {label: float(of_clips[classes == label].mean()) for label in sorted({*labels} - {""})}
        for name, of_clips in measured.paired.items()
    }
    return Evaluation(values, protocol, measured.real, measured.fake, measured.clip, by_class)


@dataclass
class _Measured:
    """What one pass over both sets leaves: features by (side, network), paired values by metric."""

    features: dict[tuple[str, str], np.ndarray]
    paired: dict[str, np.ndarray]
    real: int
    fake: int
    clip: tuple[int, int, int]


def _measure(
    real: Clips,
    fake: Clips,
    networks: dict[str, Network],
    wanted: set[tuple[str, str]],
    paired: Sequence[str],
    progress: bool,
) -> _Measured:
    features: dict[tuple[str, str], list[np.ndarray]] = {}
    values: dict[str, list[np.ndarray]] = {name: [] for name in paired}
    counts = {"real": 0, "fake": 0}
    clip: tuple[int, ...] | None = None
    known = isinstance(real, np.ndarray) and isinstance(fake, np.ndarray)
    total = len(real) + len(fake) if known else None  # type: ignore[arg-type]
    with progress_bar(total=total, desc="evaluate", unit="clip", shown=progress, leave=False) as bar:
        for pair in zip_longest(batches(real, name="real"), batches(fake, name="fake")):
            for side, batch in zip(("real", "fake"), pair, strict=True):
                if batch is None:
                    continue
                clip = clip or batch.shape[1:4]
                if batch.shape[1:4] != clip:
                    raise ValueError(f"{side}: got clips of {list(batch.shape[1:4])}; expected {list(clip)}, like real")
                for name, network in networks.items():
                    if (side, name) in wanted:
                        features.setdefault((side, name), []).append(network(batch))
                counts[side] += len(batch)
                bar.update(len(batch))
            if paired:
                original, output = pair
                if original is None or output is None or len(original) != len(output):
                    got = " and ".join("none" if batch is None else str(len(batch)) for batch in pair)
                    raise ValueError(f"fake: got batches of {got} clips; {paired[0]} pairs them, expected equal ones")
                for name in paired:
                    values[name].append(PAIRED[name](output, original))
    if clip is None:
        raise ValueError("real, fake: got no clips")
    return _Measured(
        {key: np.concatenate(of_batches) for key, of_batches in features.items()},
        {name: np.concatenate(of_batches) for name, of_batches in values.items()},
        counts["real"],
        counts["fake"],
        (clip[0], clip[1], clip[2]),
    )


Networks = dict[str, Network]
Result = tuple[float, tuple[str, ...]]  # a value and its protocol: how, with how many, and what it is not


def _fvd(measured: _Measured, networks: Networks) -> Result:
    real, fake, frames = measured.real, measured.fake, measured.clip[0]
    few = f"fewer than {PUBLISHED_CLIPS:,} clips a side: biased upwards, not comparable with published FVD"
    unlike = f"published FVD is of clips of {PUBLISHED_FRAMES} frames; these have {frames}"
    return frechet_distance(measured.features["real", "video"], measured.features["fake", "video"]), (
        f"Frechet distance in float64 of {real} and {fake} clips; {networks['video'].description}",
        *([few] if min(real, fake) < PUBLISHED_CLIPS else []),
        *([unlike] if frames != PUBLISHED_FRAMES else []),
    )


def _frechet_image_distance(measured: _Measured, networks: Networks) -> Result:
    first, second = (_of_frames(measured.features[side, "image"]) for side in ("real", "fake"))
    few = f"no more frames than the {first.shape[1]} features: biased upwards, compare sets of equal size only"
    return frechet_distance(first, second), (
        f"Frechet distance in float64 of {len(first)} and {len(second)} frames; {networks['image'].description}",
        "not comparable with published FID, which uses Inception-v3; frames of one clip are not independent",
        *([few] if min(len(first), len(second)) <= first.shape[1] else []),
    )


def _inception_score(measured: _Measured, networks: Networks) -> Result:
    if "classifier" in networks:
        p, description = measured.features["fake", "classifier"], networks["classifier"].description
    else:
        p, description = softmax(measured.features["fake", "video"]), f"softmax of {networks['video'].description}"
    return inception_score(p), (
        f"exp(mean KL(p(y|x) || p(y))) over {measured.fake} clips in one split; p(y|x): {description}",
        f"between 1 and {min(measured.fake, p.shape[1])} here; real clips are not looked at",
        "not comparable with published inception scores, which use Inception-v3 (images) or C3D (videos)",
    )


def _colour(measured: _Measured, _: Networks) -> Result:
    how = f"mean over {measured.fake} clips of how far the mean colour of a frame is off, black being -1 and white 1"
    return float(measured.paired["colour"].mean()), (how,)


def _psnr(measured: _Measured, _: Networks) -> Result:
    how = f"mean over {measured.fake} clips of 10 log10(255^2 / mean squared error), RGB in 8 bits"
    return float(measured.paired["psnr"].mean()), (how,)


def _ssim(measured: _Measured, _: Networks) -> Result:
    how = "Gaussian window 11x11, sigma 1.5, K1 0.01, K2 0.03, each channel of 8-bit RGB by itself"
    return float(measured.paired["ssim"].mean()), (f"mean over {measured.fake} clips; {how}",)


_RESULTS: dict[str, Callable[[_Measured, Networks], Result]] = {
    "fvd": _fvd,
    "frechet_image_distance": _frechet_image_distance,
    "inception_score": _inception_score,
    "psnr": _psnr,
    "ssim": _ssim,
    "colour": _colour,
}


def _of_frames(features: np.ndarray) -> np.ndarray:
    """[N, T, D] -> [N * T, D]."""
    return features.reshape(-1, features.shape[-1])


def _check_count(count: int, name: str) -> None:
    if count < 2:
        raise ValueError(f"{name}: got {count} clips; expected at least 2, and better thousands")
