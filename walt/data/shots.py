"""Shot cuts: frames between which a film jumps. Hard cuts only; fades and dissolves pass as motion. The method is ours.

Two numbers say how much a frame differs from the one before, both on a thumbnail: the mean absolute difference of the
pixels, which any jump raises but fast motion does too, and the distance of the colour histograms, which motion hardly
changes. There is a cut where both are large, and stand out from those of the frames around.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from walt.data.pixels import shrink

THUMBNAIL = (32, 48)  # rows and columns, at most
LEAST = np.array([10.0, 0.1])  # of a cut: grey levels of 255, and the share of pixels that change their colour bin
RATIO = 2.0  # of a cut to what is usual around it
NEIGHBOURS = 8  # frames on each side that say what is usual
# What four fifths of them stay under: the median would be 0 in animation, where every drawing stands for some frames.
QUANTILE = 0.8


class ShotDetector:
    """Takes the frames of a film one by one; keeps a thumbnail and two numbers a frame."""

    def __init__(self) -> None:
        self._last: tuple[np.ndarray, np.ndarray] | None = None
        self._differences: list[tuple[float, float]] = []

    def add(self, picture: np.ndarray) -> None:
        """The next frame, uint8 [H, W, 3]; all of one size."""
        height, width = picture.shape[:2]
        small = shrink(picture[None], min(height, THUMBNAIL[0]), min(width, THUMBNAIL[1]))[0].astype(np.int16)
        red, green, blue = np.moveaxis(small >> 5, -1, 0)  # 8 bins a colour
        histogram = np.bincount(((red * 8 + green) * 8 + blue).ravel(), minlength=512) / red.size
        if self._last is not None:
            pixels, bins = self._last
            difference = np.abs(small - pixels).mean(), np.abs(histogram - bins).sum() / 2
            self._differences.append((float(difference[0]), float(difference[1])))
        self._last = small, histogram

    def shots(self) -> tuple[tuple[int, int], ...]:
        """The frames so far as (first, one past the last) of each shot."""
        if self._last is None:
            return ()
        edges = [0, *find_cuts(np.array(self._differences).reshape(-1, 2)), len(self._differences) + 1]
        return tuple(pairwise(edges))


def find_cuts(differences: np.ndarray) -> list[int]:
    """[T - 1, 2], row i between frames i and i + 1 (pixels, histograms) -> the first frame of each shot but the first.

    A jump there and back within two frames, as of a flash, gives two cuts.
    """
    cuts = []
    for i in np.flatnonzero((differences >= LEAST).all(axis=1)):
        before, after = differences[max(0, i - NEIGHBOURS) : i], differences[i + 1 : i + 1 + NEIGHBOURS]
        around = np.concatenate([before, after])
        usual = np.quantile(around, QUANTILE, axis=0) if len(around) else np.zeros(2)
        if (differences[i] >= RATIO * usual).all():
            cuts.append(int(i) + 1)
    return cuts
