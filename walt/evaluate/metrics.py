"""The formulas: PSNR and SSIM of reconstructions, Frechet distance of features, inception score of probabilities."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["clip_distances", "colour_error", "frechet_distance", "inception_score", "psnr", "ssim"]

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # of SSIM, as its authors set them


def psnr(output: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each clip: 10 log10(255^2 / mean squared error).

    Two uint8 arrays [N, ...] -> float64 [N]; identical clips give inf.
    """
    _check_pair(output, target)
    error = (output.astype(np.float64) - target.astype(np.float64)).reshape(len(output), -1)
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(255.0**2 / np.square(error).mean(axis=1)))


def colour_error(output: np.ndarray, target: np.ndarray) -> np.ndarray:
    """How far the mean colours of a clip's frames are off: mean over frames and RGB of |mean(output) - mean(target)|.

    In units of the model's range, in which black is -1 and white 1. uint8 [N, T, H, W, 3] -> float64 [N].
    """
    _check_pair(output, target)
    means = (clips.mean(axis=(-3, -2), dtype=np.float64).reshape(len(clips), -1) for clips in (output, target))
    return np.asarray(np.abs(np.subtract(*means)).mean(axis=1) / 127.5)


def ssim(output: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Structural similarity of each clip (Wang et al. 2004), the mean over channels, frames and positions.

    (2 m1 m2 + C1)(2 s12 + C2) / ((m1^2 + m2^2 + C1)(s1^2 + s2^2 + C2)) with means, variances and covariance weighted by
    a Gaussian of deviation 1.5 over 11x11 pixels that lie wholly inside the frame, C = (0.01 * 255)^2, (0.03 * 255)^2.
    Two uint8 arrays [N, ..., H, W, 3], H and W at least 11 -> float64 [N], 1 for identical clips.
    """
    _check_pair(output, target)
    if output.ndim < 4 or output.shape[-1] != 3 or min(output.shape[-3:-1]) < WINDOW:
        raise ValueError(f"output: got {list(output.shape)}; expected [N, ..., H, W, 3] with H and W at least {WINDOW}")
    values = [float(_similarity(_planes(a), _planes(b)).mean()) for a, b in zip(output, target, strict=True)]
    return np.array(values, np.float64)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two sets of features [N, D] and [M, D], in float64.

    The trace of (S1 S2)^(1/2) is the sum of the singular values of A1 A2^T / sqrt((N-1)(M-1)), where the A are the
    centred features: exact whatever the rank, with no matrix square root and no covariance to lose digits in.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise ValueError(
            f"first {list(first.shape)} and second {list(second.shape)} must be [N, D] and [M, D] with N, M >= 2"
        )
    a, b = (torch.from_numpy(features.astype(np.float64)) for features in (first, second))
    mean_a, mean_b = a.mean(dim=0), b.mean(dim=0)
    a, b = (a - mean_a) / (len(a) - 1) ** 0.5, (b - mean_b) / (len(b) - 1) ** 0.5
    # R of a QR has the same Gram matrix as its argument and at most D rows.
    roots = torch.linalg.svdvals(torch.linalg.qr(a, mode="r").R @ torch.linalg.qr(b, mode="r").R.T)
    return float((mean_a - mean_b).square().sum() + a.square().sum() + b.square().sum() - 2 * roots.sum())


def clip_distances(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Frechet distances of two sets of projected features [N, T, d] and [M, T, d].

    "frames": every frame is a sample (how the pictures look). "motion": the step of the features from each frame to
    the next is a sample (how they move; flicker and standing still both count against a set).
    """
    width = first.shape[-1]
    steps_first, steps_second = np.diff(first, axis=1), np.diff(second, axis=1)
    return {
        "frames": frechet_distance(first.reshape(-1, width), second.reshape(-1, width)),
        "motion": frechet_distance(steps_first.reshape(-1, width), steps_second.reshape(-1, width)),
    }


def inception_score(probabilities: np.ndarray) -> float:
    """exp(mean over x of KL(p(y|x) || p(y))) of a classifier's p(y|x) [N, K], N >= 2; in float64, from 1 to K.

    p(y) is the mean of the rows: all samples are one split. 1 if the classifier cannot tell the samples apart.
    """
    if probabilities.ndim != 2 or len(probabilities) < 2:
        raise ValueError(f"probabilities: got {list(probabilities.shape)}; expected [N, K] with N >= 2")
    p = probabilities.astype(np.float64)
    if not (p >= 0).all() or not np.allclose(p.sum(axis=1), 1, rtol=0, atol=1e-3):
        raise ValueError("probabilities: got rows that are no distributions; expected none below 0 and sums of 1")
    p /= p.sum(axis=1, keepdims=True)
    ratio = np.divide(p, p.mean(axis=0), out=np.ones_like(p), where=p > 0)  # 0 log 0 = 0
    return float(np.exp((p * np.log(ratio)).sum(axis=1).mean()))


def _check_pair(output: np.ndarray, target: np.ndarray) -> None:
    if output.shape != target.shape or output.dtype != np.uint8 or target.dtype != np.uint8:
        raise ValueError(
            f"output {output.dtype} {list(output.shape)} and target {target.dtype} {list(target.shape)}"
            " must both be uint8 and of one shape"
        )


def _planes(clip: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] -> float64 [planes, 1, H, W]."""
    return torch.from_numpy(clip.astype(np.float64)).movedim(-1, 0).reshape(-1, 1, *clip.shape[-3:-1])


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    offset = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weight = torch.exp(-offset.square() / (2 * SIGMA**2))
    weight /= weight.sum()

    def local_mean(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, weight[None, None, :, None]), weight[None, None, None, :])

    mean_a, mean_b = local_mean(a), local_mean(b)
    variances = local_mean(a * a + b * b) - mean_a.square() - mean_b.square()
    covariance = local_mean(a * b) - mean_a * mean_b
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    means = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    return means * (2 * covariance + c2) / (variances + c2)
