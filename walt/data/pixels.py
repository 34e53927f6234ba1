"""Frames as arrays: size, crop, and the numbers a network takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from walt.data.video import OBLONG
from walt.errors import require


def shrink(video: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area-average uint8 [T, H, W, 3] to [T, height, width, 3] (each output pixel is the mean of those it covers)."""
    return _resized(video, height, width, mode="area")


def enlarge(video: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic interpolation (Keys, a = -0.5) of uint8 [T, H, W, 3] to the larger [T, height, width, 3]."""
    return _resized(video, height, width, mode="bicubic", antialias=True)  # without it, a is -0.75


def _resized(video: np.ndarray, height: int, width: int, **options: Any) -> np.ndarray:
    pixels = torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2).float()
    resized = F.interpolate(pixels, size=(height, width), **options)
    return resized.permute(0, 2, 3, 1).round().clamp(0, 255).to(torch.uint8).numpy()


def cover(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A frame uint8 [H, W, 3] at the smallest size of its aspect ratio, rounded, that covers height x width.

    Area average (to within one grey level) where that is smaller than the frame, bilinear where it is larger.
    Raises ValueError for a frame so oblong that all of it would have more than OBLONG times height x width pixels.
    """
    image: Any = require("PIL.Image", "video")  # several times faster than `shrink` on large frames
    scale = max(height / picture.shape[0], width / picture.shape[1])
    rows, columns = max(height, round(picture.shape[0] * scale)), max(width, round(picture.shape[1] * scale))
    if rows * columns > OBLONG * height * width:
        raise ValueError(f"so oblong that it would be over {OBLONG} times {height}x{width} to cover that; crop it")
    method = image.Resampling.BOX if scale <= 1 else image.Resampling.BILINEAR
    return np.array(image.fromarray(picture).resize((columns, rows), method))


def fill(video: np.ndarray, height: int, width: int) -> np.ndarray:
    """Shrunk or enlarged to `cover` height x width, and the middle of that: [T, height, width, 3]."""
    return np.stack([middle(cover(frame, height, width), height, width) for frame in video])


def middle(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """[..., H, W, 3] -> [..., height, width, 3]."""
    top, left = (picture.shape[-3] - height) // 2, (picture.shape[-2] - width) // 2
    return picture[..., top : top + height, left : left + width, :]


def centre_square(video: np.ndarray) -> np.ndarray:
    side = min(video.shape[1:3])
    return middle(video, side, side)


def to_model(video: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 [N, T, H, W, 3] -> float32 [N, 3, T, H, W] in [-1, 1]."""
    return torch.as_tensor(video).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)


def to_pixels(video: torch.Tensor) -> np.ndarray:
    """float [N, 3, T, H, W] in [-1, 1] (clamped) -> uint8 [N, T, H, W, 3]."""
    pixels = video.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return pixels.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous().numpy()
