"""Small films for tests, whose frames tell their number."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from walt.data.video import write_mp4, write_png


def ramp(frames: int, height: int = 32, width: int = 48, first: int = 10, step: int = 6) -> np.ndarray:
    """Frame i is grey of brightness first + step * i."""
    grey = (first + step * np.arange(frames)).astype(np.uint8)[:, None, None, None]
    return np.broadcast_to(grey, (frames, height, width, 3)).copy()


def numbers(video: np.ndarray, first: int = 10, step: int = 6) -> np.ndarray:
    """The numbers of a ramp's frames, from pixels [..., H, W, 3]; they must be near whole."""
    index = (video.mean(axis=(-3, -2, -1)) - first) / step
    assert np.abs(index - index.round()).max() < 0.4
    return index.round().astype(int)


def noise(frames: int, seed: int, height: int = 32, width: int = 48) -> np.ndarray:
    """A still scene of coloured blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return np.broadcast_to(blocks.repeat(8, axis=0).repeat(8, axis=1), (frames, height, width, 3)).copy()


def write_folder(folder: Path) -> Path:
    """cats/one.mp4 (12 frames), dogs/two.mp4 (7 frames), dogs/a.png, dogs/b.png, cats/c.png and still.png."""
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
    write_mp4(folder / "cats/one.mp4", ramp(12))
    write_mp4(folder / "dogs/two.mp4", ramp(7), fps=25)
    for value, name in enumerate(("dogs/a.png", "dogs/b.png", "cats/c.png", "still.png")):
        write_png(folder / name, np.full((40, 30, 3), 50 * value, np.uint8))
    return folder
