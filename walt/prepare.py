"""Fill a cache from a folder of videos and images: each file is decoded once, a frame at a time.

Threads append to one .raw file each, and note every finished file in a journal. The index is written last, so a
cache is readable or not there; a run that was killed goes on after the last finished file, and a later run decodes
only what is new or has changed. Frames of files that have gone stay in the .raw files until the cache is deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from math import inf
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO

from tqdm import tqdm

from walt.cache import INDEX, Cache, Item, Settings, read_index, shard_path, write_index
from walt.captions import check_captions, read_captions
from walt.data import cover
from walt.errors import WaltError, require, user_values
from walt.files import flush
from walt.shots import ShotDetector
from walt.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, frame_rate, has_variable_rate, iterate_video, read_image

JOURNAL = "journal.jsonl"
WORKERS = 4
NAMED = 10  # files of a kind, at most

Say = Callable[[str], None]


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def prepare(
    source: str | Path,
    cache: str | Path,
    *,
    height: int,
    width: int,
    captions: str | Path | None = None,
    shots: bool = True,
    fps: float = 0.0,
    workers: int | None = None,
    progress: bool = True,
    say: Say = _say,
) -> Cache:
    """Decode every video and image under `source` into the folder `cache`, so that frames cover height x width.

    The folder that a file lies in is its class. With `shots`, clips will not span a cut (`walt.shots`). With `fps`,
    films are taken at that rate by their time stamps; else frame by frame, and `say` names rates that differ. A file
    that cannot be decoded is skipped: `say` gets a line for each, a count at the end, and the names that `captions` (a
    CSV or JSONL file, `walt.captions`) and the folder do not share. Hidden files are passed over. Of several processes
    that prepare one cache, one does and the others wait.

    WaltError if nothing can be used, if the cache was made with other settings, or if the disk is full.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height, width: got {height}, {width}; expected ints >= 1")
    if not 0 <= fps < inf:
        raise ValueError(f"fps: got {fps}; expected frames a second, or 0 for every frame")
    for module in ("av", "PIL.Image"):
        require(module, "video")
    source, cache = Path(source), Path(cache)
    files = _find(source)
    texts = {} if captions is None else read_captions(captions)
    if captions is not None:
        check_captions(texts, files, say)
    settings = Settings(height, width, shots, fps)
    workers = min(WORKERS, os.cpu_count() or 1) if workers is None else workers
    with _locked(cache):
        known = _known(cache, settings)
        run = _Run(source, cache, settings, files, known, progress, say)
        run.decode(workers)
        if run.skipped:
            say(f"{run.skipped} of {len(files)} files were skipped")
        if not run.items:
            raise WaltError(f"{source}: none of its {len(files)} videos and images can be used")
        _tell_rates(run.items.values(), say)
        for path in cache.glob("frames-*.raw"):
            flush(path)
        write_index(cache, settings, [replace(run.items[n], caption=texts.get(n)) for n in files if n in run.items])
        (cache / JOURNAL).unlink(missing_ok=True)
    return Cache.open(cache)


def _find(source: Path) -> list[str]:
    """Names of the videos and images, relative to source, sorted."""
    if not source.is_dir():
        raise WaltError(f"no such folder: {source}")
    suffixes = VIDEO_SUFFIXES + IMAGE_SUFFIXES
    paths = (path for path in source.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    names = sorted(path.relative_to(source).as_posix() for path in paths if not path.name.startswith("."))
    if not names:
        raise WaltError(f"{source} holds no video or image (looked for {', '.join(suffixes)})")
    return names


def _tell_rates(items: Iterable[Item], say: Say) -> None:
    """A line with the films of each frame rate, if there are several or a film's varies. Within 1% they are one."""
    rates: dict[str, list[str]] = {}
    last, known = -1.0, ""
    for item in sorted((item for item in items if item.kind == "video"), key=lambda item: (item.fps, item.name)):
        if item.fps > 1.01 * last:
            last, known = item.fps, f"{item.fps:.4g}" if item.fps else "unknown"
        rates.setdefault("variable" if item.variable else known, []).append(item.name)
    if len(rates) > 1 or "variable" in rates:
        films = "; ".join(f"{rate}: {_some(names)}" for rate, names in rates.items())
        say(f"frames a second differ, and clips take frame after frame (--fps N takes them by time): {films}")


def _some(names: list[str]) -> str:
    return (
        f"{len(names)} film{'s' * (len(names) > 1)}, {', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''}"
    )


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """The folder, made if need be, for this process alone. The system opens the lock when the process ends."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise WaltError(f"cannot write {cache}: {error.strerror or error}") from error


def _known(cache: Path, settings: Settings) -> dict[str, Item]:
    """What earlier runs decoded, by the index and then the journal. What lies behind it in the shards is cut off."""
    decoded: list[Item] = []
    if (cache / INDEX).exists():
        found, items = read_index(cache)
        if items and found != settings:
            raise WaltError(f"{cache} was prepared with {found}, not with {settings}; name another cache")
        if found != settings:
            (cache / JOURNAL).unlink(missing_ok=True)
        decoded += items
    if not decoded:
        write_index(cache, settings, [])  # an empty index: not finished
    if (cache / JOURNAL).exists():
        for line in (cache / JOURNAL).read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):  # a line cut short by a kill
                decoded.append(Item.from_dict(json.loads(line)))
    sizes = {path: path.stat().st_size for path in cache.glob("frames-*.raw")}
    decoded = [item for item in decoded if item.end <= sizes.get(shard_path(cache, item.shard), 0)]
    for path in sizes:
        os.truncate(path, max((item.end for item in decoded if shard_path(cache, item.shard) == path), default=0))
    return {item.name: item for item in decoded}


class _Run:
    """The files that one call of `prepare` goes through."""

    def __init__(
        self,
        source: Path,
        cache: Path,
        settings: Settings,
        files: list[str],
        known: dict[str, Item],
        progress: bool,
        say: Say,
    ) -> None:
        self.source, self.cache, self.settings, self.say = source, cache, settings, say
        self.items: dict[str, Item] = {}
        self.skipped = 0
        self._todo: SimpleQueue[str] = SimpleQueue()
        for name in files:
            item = known.get(name)
            if item is not None and (item.size, item.modified) == _state(source / name):
                self.items[name] = item
            else:
                self._todo.put(name)
        self._done, self._total = len(self.items), len(files)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._bar = tqdm(desc="prepare", unit="frame", disable=not progress)

    def decode(self, workers: int) -> None:
        with self._bar, (self.cache / JOURNAL).open("a") as journal, ThreadPoolExecutor(workers) as pool:
            journal.write("\n")  # ends a line that a kill cut short
            try:
                for future in as_completed([pool.submit(self._work, shard, journal) for shard in range(workers)]):
                    future.result()
            finally:
                self._stop.set()

    def _work(self, shard: int, journal: IO[str]) -> None:
        with shard_path(self.cache, shard).open("ab") as frames:
            while not self._stop.is_set():
                try:
                    name = self._todo.get_nowait()
                except Empty:
                    return
                start = frames.tell()
                try:
                    item = self._append(name, shard, frames)
                except WaltError as error:
                    frames.truncate(start)
                    frames.seek(start)
                    if not self._stop.is_set():
                        self._note(None, f"skipped: {error}")
                else:
                    frames.flush()
                    self._note(item, json.dumps(vars(item)), journal)

    def _note(self, item: Item | None, line: str, journal: IO[str] | None = None) -> None:
        """A file is done with, and in the cache unless item is None."""
        with self._lock:
            self._done += 1
            self._bar.set_postfix_str(f"{self._done} of {self._total} files", refresh=False)
            if item is None or journal is None:
                self.skipped += 1
                self.say(line)
            else:
                self.items[item.name] = item
                journal.write(line + "\n")
                journal.flush()

    def _append(self, name: str, shard: int, frames: IO[bytes]) -> Item:
        """Decode one file to the end of the shard. WaltError if it cannot be; OSError is of the writing."""
        path = self.source / name
        offset = frames.tell()
        size, modified = _state(path)
        is_image = path.suffix.lower() in IMAGE_SUFFIXES
        detector = ShotDetector()
        count, rows, columns = 0, 0, 0
        rate = self.settings.fps
        for picture in [read_image(path)] if is_image else iterate_video(path, rate):
            with user_values(str(path)):
                picture = cover(picture, self.settings.height, self.settings.width)
            rows, columns = picture.shape[:2]
            frames.write(picture.tobytes())
            if self.settings.shots:
                detector.add(picture)
            count += 1
            with self._lock:
                self._bar.update()
            if self._stop.is_set():
                raise WaltError("stopped")
        if not count:
            raise WaltError(f"{path} has no frames")
        return Item(
            name=name,
            kind="image" if is_image else "video",
            label=path.parent.name if "/" in name else None,
            caption=None,
            fps=0.0 if is_image else rate or frame_rate(path),
            variable=not is_image and not rate and has_variable_rate(path),
            height=rows,
            width=columns,
            frames=count,
            shots=detector.shots() if self.settings.shots else ((0, count),),
            shard=shard,
            offset=offset,
            size=size,
            modified=modified,
        )


def _state(path: Path) -> tuple[int, int]:
    """Size and time of change of a source file."""
    try:
        status = path.stat()
    except OSError as error:
        raise WaltError(f"cannot read {path}: {error.strerror or error}") from error
    return status.st_size, status.st_mtime_ns
