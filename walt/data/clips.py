"""Prepared folders: videos and images with their frames decoded once (`walt.data.prepare`), read through memory maps.

index.json holds the settings and an entry for each file, frames-<n>.raw the pixels, uint8, item after item, each as
[frame, row, column, RGB]. Frames are stored uncropped, at the smallest size that covers the height and width the folder
was prepared for, so that training chooses the crop.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from walt.atomic import atomic_folder, read_document, read_json, reading, write_json
from walt.data.folders import PassedOver
from walt.data.pixels import shrink
from walt.errors import WaltError, some
from walt.model.config import expect_share
from walt.names import normal
from walt.rates import expect_rate, same_rate

FORMAT = "walt-cache"
VERSION = 3
INDEX = "index.json"
PASSED_OVER = "passed-over.json"  # names of unused files in the source folder, by reason


@dataclass(frozen=True)
class PrepareSettings:
    """What all items share: the size that their frames cover, whether videos were split at their cuts, the frames a
    second at which they were read (0: every frame), and the share of files that training never sees."""

    height: int
    width: int
    shots: bool
    fps: float = 0.0
    held_out: float = 0.0

    def __str__(self) -> str:
        rate = f", {self.fps:.10g} frames a second" if self.fps else ""
        held_out = f", {self.held_out:.10g} of the files held out" if self.held_out else ""
        return f"height {self.height}, width {self.width}, shots {'on' if self.shots else 'off'}{rate}{held_out}"


@dataclass(frozen=True)
class Item:
    """A file of the source folder, and where its frames are."""

    name: str  # relative to the source, with "/"
    kind: str  # "video" or "image"
    label: str | None  # the folder it lies in; None in the source folder itself
    caption: str | None
    fps: float  # of the file, on average; 0 for images and where it is not known
    variable: bool  # its frames do not come at an even rate
    height: int
    width: int
    frames: int
    shots: tuple[tuple[int, int], ...]  # first frame and one past the last
    shard: int  # number of its .raw file
    offset: int  # bytes
    digest: str  # SHA-256 of the source file
    size: int  # of the source file, bytes
    modified: int  # when the source file was, nanoseconds
    changed: int  # when its content, name or attributes last changed (ctime), nanoseconds
    held_out: bool = False  # training never sees it

    @property
    def end(self) -> int:
        """Where its frames end in the shard, bytes."""
        return self.offset + self.frames * self.height * self.width * 3

    @property
    def content(self) -> str:
        """A hash of what its frames depend on beside the settings: not of name, label and caption, of their place in
        the shards, or of the source file's times."""
        outside = ("name", "label", "caption", "shard", "offset", "modified", "changed")
        return _hash({key: value for key, value in vars(self).items() if key not in outside})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Item:
        """An item from its JSON form; ValueError where a field is missing, unknown or not possible."""
        try:
            item = cls(**{**values, "shots": tuple((first, stop) for first, stop in values["shots"])})
            counts = (item.height, item.width, item.frames, item.shard, item.offset)
            state = (item.size, item.modified, item.changed)
            typed = all(type(number) is int for number in (*counts, *state, *sum(item.shots, ())))
            texts = isinstance(item.name, str) and isinstance(item.digest, str) and item.kind in ("video", "image")
            typed = typed and type(item.variable) is type(item.held_out) is bool
            optional = all(text is None or isinstance(text, str) for text in (item.label, item.caption))
            edges = [0, *(stop for _, stop in item.shots)]
            joined = edges[-1] == item.frames and all(a == s[0] < s[1] for a, s in zip(edges, item.shots, strict=False))
            sizes = min(item.height, item.width, item.frames, item.shard + 1, item.offset + 1) >= 1
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"an entry is malformed ({error})") from error
        if not (typed and texts and optional and joined and sizes and isinstance(item.fps, (int, float))):
            raise ValueError(f"the entry of {item.name!r} is malformed")
        return item


def _hash(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"frames-{shard}.raw"


def write_index(folder: Path, settings: PrepareSettings, items: Iterable[Item]) -> None:
    document = {"format": FORMAT, "version": VERSION, **vars(settings), "items": [vars(item) for item in items]}
    write_json(folder / INDEX, document)


def read_index(folder: Path) -> tuple[PrepareSettings, tuple[Item, ...]]:
    path, advice = folder / INDEX, ": delete that folder, or prepare into another one"
    document = read_document(path, "a prepared folder", FORMAT, VERSION, advice)
    try:
        settings = PrepareSettings(**{field.name: document[field.name] for field in fields(PrepareSettings)})
        if any(type(size) is not int or size < 1 for size in (settings.height, settings.width)):
            raise ValueError(f"it covers {settings.height!r} x {settings.width!r} pixels")
        if type(settings.shots) is not bool:
            raise ValueError(f"shots is {settings.shots!r}")
        expect_rate(settings.fps)
        expect_share("held_out", settings.held_out)
        return settings, tuple(Item.from_dict(values) for values in document["items"])
    except (KeyError, TypeError, ValueError) as error:
        raise WaltError(f"{path} is broken: {error}") from error


class Clip(NamedTuple):
    """A clip in memory."""

    name: str  # as of a file: its folder is the class ("basic/7")
    video: np.ndarray  # uint8 [T, H, W, 3]
    caption: str | None = None


def write_store(folder: Path, clips: Iterable[Clip], fps: float) -> ClipStore:
    """Write a prepared folder of clips of one height and width, each one shot. WaltError if the disk is full."""
    items: list[Item] = []
    with atomic_folder(folder) as temporary:
        with shard_path(temporary, 0).open("wb") as shard:
            for name, video, caption in clips:
                frames, height, width, _ = video.shape
                pixels = video.tobytes()
                item = Item(
                    name=name,
                    kind="video",
                    label=normal(Path(name).parent.name) or None,
                    caption=caption,
                    fps=fps,
                    variable=False,
                    height=height,
                    width=width,
                    frames=frames,
                    shots=((0, frames),),
                    shard=0,
                    offset=shard.tell(),
                    digest=hashlib.sha256(pixels).hexdigest(),
                    size=len(pixels),
                    modified=0,
                    changed=0,
                )
                shard.write(pixels)
                items.append(item)
        write_index(temporary, PrepareSettings(items[0].height, items[0].width, shots=False), items)
    return ClipStore.open(folder)


def is_held_out(digest: str, share: float) -> bool:
    """By the file's SHA-256: adding or renaming files changes nothing, and copies stay together."""
    return int(digest[:16], 16) < share * 2**64


class ClipStore:
    """A prepared folder, read-only. A clip's index is (item, first frame); an image's is (item, frame)."""

    def __init__(
        self, folder: Path, settings: PrepareSettings, items: tuple[Item, ...], shards: Mapping[int, np.ndarray]
    ) -> None:
        self.folder, self.settings, self.items = folder, settings, items
        self.height, self.width = settings.height, settings.width
        self._shards = shards
        self.classes = tuple(sorted({item.label for item in items if item.label is not None}))
        number = {name: i for i, name in enumerate(self.classes)}
        # As `ClassEmbedding` has it, the number after the last class stands for no class.
        self.label = np.array([number.get(item.label or "", len(self.classes)) for item in items], np.int64)
        self.caption = tuple(item.caption for item in items)
        self.held_out = np.array([item.held_out for item in items])
        # Of the stored frames; 0 for images and where it is not known.
        self.fps = np.array([(item.kind == "video" and settings.fps) or item.fps for item in items])
        self.fingerprint = _hash([vars(settings), [(normal(item.name), item.content) for item in items]])

    @property
    def passed_over(self) -> PassedOver:
        """What the source folder held beside the items when it was prepared."""
        path = self.folder / PASSED_OVER
        return PassedOver(read_json(path) if path.is_file() else {})

    @classmethod
    def open(cls, folder: str | Path) -> ClipStore:
        """WaltError if the folder is missing, foreign, unfinished or broken, or holds less than its index says."""
        folder = Path(folder)
        if not folder.is_dir():
            raise WaltError(f"no such prepared folder: {folder}")
        settings, items = read_index(folder)
        if not items:
            raise WaltError(f"{folder} was not prepared to the end; prepare it again, and it goes on")
        shards = {}
        for shard in sorted({item.shard for item in items}):
            path = shard_path(folder, shard)
            needed = max(item.end for item in items if item.shard == shard)
            held = path.stat().st_size if path.is_file() else 0
            if held < needed:
                raise WaltError(f"{path} is broken: it holds {held} bytes, its index speaks of {needed}")
            with reading(path):
                shards[shard] = np.memmap(path, np.uint8, mode="r")
        return cls(folder, settings, items, shards)

    @property
    def rate(self) -> float:
        """Frames a second of most films (the median); 0 if no film's is known."""
        return float(np.median(self.fps[self.fps > 0])) if self.fps.any() else 0.0

    def hold_out(self, share: float) -> ClipStore:
        """The same frames, with this share of the files held out."""
        settings = replace(self.settings, held_out=share)
        items = tuple(replace(item, held_out=is_held_out(item.digest, share)) for item in self.items)
        return ClipStore(self.folder, settings, items, self._shards)

    def remarks(self) -> Iterator[str]:
        """Lines for the user: how many files are held out, and whether frame rates differ."""
        if self.settings.held_out:
            names = [item.name for item in self.items if item.held_out]
            yield f"held out: {len(names)} of {len(self.items)} files ({some(names) or 'the share is too small'})"
        trained = {item.label for item in self.items if not item.held_out}
        if left := [name for name in self.classes if name not in trained]:
            yield f"classes of which all files are held out, so that no model learns them: {some(left)}"
        yield from self.uneven()

    def uneven(self) -> Iterator[str]:
        """A line if frame rates differ: without a rate in the settings, the films of each rate if there are several (by
        `same_rate`) or a film's varies; with one, the films that have fewer frames a second."""
        films = [item for item in self.items if item.kind == "video" and item.frames > 1]  # one frame has no rate
        if wanted := self.settings.fps:
            slow = [item.name for item in films if 0 < item.fps < wanted and not same_rate(item.fps, wanted)]
            if slow:
                yield f"frames are repeated in films of fewer than {wanted:g} a second: {len(slow)} ({some(slow)})"
            return
        rates: dict[str, list[str]] = {}
        last, known = -1.0, ""
        for item in sorted(films, key=lambda item: (item.fps, item.name)):
            if not same_rate(item.fps, last):
                last, known = item.fps, f"{item.fps:.4g}" if item.fps else "unknown"
            rates.setdefault("variable" if item.variable else known, []).append(item.name)
        if len(rates) > 1 or "variable" in rates:
            listed = "; ".join(f"{rate}: {len(names)} ({some(names)})" for rate, names in rates.items())
            yield f"frames a second differ, and clips take frame after frame (--fps N takes them by time): {listed}"

    def windows(self, frames: int, *, stride: int = 1, hop: int = 1, held_out: bool = False) -> np.ndarray:
        """Indices of all clips of `frames` frames, every `stride`-th of a video, that lie inside one shot: [N, 2].

        Clips of a shot start `hop` frames apart. They are of the files for training, or of those that are held out.
        """
        for name, value in (("frames", frames), ("stride", stride), ("hop", hop)):
            if value < 1:
                raise ValueError(f"{name}: got {value}; expected an int >= 1")
        last = (frames - 1) * stride
        starts = [
            (index, np.arange(first, stop - last, hop))
            for index, item in enumerate(self.items)
            if item.kind == "video" and item.held_out == held_out
            for first, stop in item.shots
        ]
        return _indices(starts)

    def too_short(self, frames: int, *, stride: int = 1, held_out: bool = False) -> PassedOver:
        """Videos and shots that are too short for such a clip."""
        needed, passed = (frames - 1) * stride + 1, PassedOver()
        for item in self.items:
            if item.kind != "video" or item.held_out != held_out:
                continue
            short = [(first, stop) for first, stop in item.shots if stop - first < needed]
            if len(short) == len(item.shots):
                passed.add(f"no shot of {needed} frames", item.name)
            else:
                for first, stop in short:
                    passed.add(f"shot of fewer than {needed} frames", f"{item.name} from {first} to {stop - 1}")
        return passed

    def images(self, every: int | None = None, *, held_out: bool = False) -> np.ndarray:
        """Indices of all images, and of every `every`-th frame of the videos (None: of none): [M, 2].

        They are of the files for training, or of those that are held out.
        """
        if every is not None and every < 1:
            raise ValueError(f"every: got {every}; expected an int >= 1 or None")
        steps = {"image": 1, "video": every}
        items = [
            (index, item.frames, steps[item.kind]) for index, item in enumerate(self.items) if item.held_out == held_out
        ]
        return _indices([(index, np.arange(0, frames, step)) for index, frames, step in items if step is not None])

    def balanced(self, count: int) -> np.ndarray:
        """The first `count` items of each class, class by class: int64."""
        return np.concatenate([np.flatnonzero(self.label == label)[:count] for label in range(len(self.classes))])

    def read(
        self,
        indices: np.ndarray,
        frames: int = 1,
        *,
        stride: int = 1,
        crop: tuple[int, int] | None = None,
        offset: np.ndarray | None = None,
        flip: np.ndarray | None = None,
    ) -> np.ndarray:
        """The clips at indices [N, 2] -> uint8 [N, frames, height, width, 3], with (height, width) = `crop`.

        By default `crop` is what the folder was prepared for, and it may not exceed that. It is the largest window of a
        frame with its aspect ratio, area-averaged to its size: scale comes from the frame, position from offset [N, 2]
        (fractions from 0, top or left, to 1; None: the middle). Clips with flip [N] are mirrored left to right.
        """
        indices = np.asarray(indices)
        if indices.ndim != 2 or indices.shape[1] != 2 or indices.dtype.kind != "i":
            raise ValueError(f"indices: got {indices.dtype} {list(indices.shape)}; expected int64 [N, 2]")
        height, width = (self.height, self.width) if crop is None else crop
        if not (1 <= height <= self.height and 1 <= width <= self.width):
            raise ValueError(f"crop: got {height}x{width}; expected at most {self.height}x{self.width}, as prepared")
        offset = np.full((len(indices), 2), 0.5) if offset is None else np.asarray(offset)
        flip = np.zeros(len(indices), bool) if flip is None else np.asarray(flip)
        for name, value, shape in (("offset", offset, (len(indices), 2)), ("flip", flip, (len(indices),))):
            if value.shape != shape:
                raise ValueError(f"{name}: got shape {list(value.shape)}; expected {list(shape)}")
        clips = np.empty((len(indices), frames, height, width, 3), np.uint8)
        for clip, (index, first), place, mirrored in zip(clips, indices.tolist(), offset, flip, strict=True):
            cropped = _crop(self._frames(index, first, frames, stride), height, width, place)
            clip[:] = cropped[:, :, ::-1] if mirrored else cropped
        return clips

    def _frames(self, index: int, first: int, frames: int, stride: int) -> np.ndarray:
        """The uncropped frames of a clip, without a copy."""
        if not 0 <= index < len(self.items):
            raise ValueError(f"indices: got item {index}; there are {len(self.items)}")
        item = self.items[index]
        stop = first + (frames - 1) * stride + 1
        if not 0 <= first < stop <= item.frames:
            raise ValueError(f"indices: got frames {first} to {stop - 1} of {item.name}, which has {item.frames}")
        pixels = self._shards[item.shard][item.offset : item.end]
        return pixels.reshape(item.frames, item.height, item.width, 3)[first:stop:stride]


def _indices(starts: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """int64 [N, 2] from pairs (item, first frames)."""
    pairs = [np.stack([np.full_like(first, item), first], axis=1) for item, first in starts]
    return np.concatenate([np.empty((0, 2), np.int64), *pairs])


def _crop(frames: np.ndarray, height: int, width: int, place: np.ndarray) -> np.ndarray:
    """[T, H, W, 3] -> [T, height, width, 3]; frames that just cover height x width are cut, larger ones shrunk too."""
    rows, columns = frames.shape[1:3]
    by_height = rows * width <= columns * height
    sides = (rows, width * rows // height) if by_height else (height * columns // width, columns)
    # The ends of the range and all places between are equally likely when `place` is uniform; 0.5 is the middle.
    free = np.array([rows - sides[0], columns - sides[1]])
    top, left = np.maximum(np.ceil(place * (free + 1)) - 1, 0).astype(int).tolist()
    cropped = frames[:, top : top + sides[0], left : left + sides[1]]
    return cropped if sides == (height, width) else shrink(np.array(cropped), height, width)
