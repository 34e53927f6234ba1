"""Prepare a folder of videos and images for training: each file is decoded once, a frame at a time.

Threads append to one .raw file each, and note every finished file in a journal. The index is written last, so a
prepared folder is readable or not there; a run that was killed goes on after the last finished file, and a later run
decodes only what is new or has other bytes. Frames of files that have gone stay in the .raw files until the prepared
folder is deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

from walt.atomic import flush, read_json, reading, write_json, writing
from walt.data.captions import check_captions, read_captions
from walt.data.clips import (
    INDEX,
    PASSED_OVER,
    ClipStore,
    Item,
    PrepareSettings,
    is_held_out,
    read_index,
    shard_path,
    write_index,
)
from walt.data.folders import PassedOver, changes, class_of, find_files
from walt.data.pixels import cover
from walt.data.shots import ShotDetector
from walt.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, frame_timing, iterate_video, read_image
from walt.errors import WaltError, as_user_error, require, say
from walt.locks import locked
from walt.model.config import expect_share
from walt.names import normal
from walt.rates import expect_rate
from walt.terminal import progress_bar

JOURNAL = "journal.jsonl"
SOURCE = "source.json"  # where the files were
WORKERS = 4

Say = Callable[[str], None]


def prepare(
    source: str | Path,
    folder: str | Path,
    *,
    height: int,
    width: int,
    captions: str | Path | None = None,
    shots: bool = True,
    fps: float = 0.0,
    held_out: float | None = None,
    workers: int | None = None,
    progress: bool = True,
    say: Say = say,
) -> ClipStore:
    """Decode every video and image under `source` into `folder`, so that frames cover height x width.

    The folder that a file lies in is its class. With `shots`, clips do not span a cut (`walt.data.shots`). With `fps`,
    films are taken at that rate by their time stamps; else frame by frame. `held_out` is the share of files that
    training never sees (None: as before, or none); which they are depends on their bytes alone.

    `say` gets `ClipStore.remarks`; what of `source` has changed since it was prepared there before; a line for each
    reason why something is passed over (`walt.data.folders`, and what cannot be decoded), with a count and ten names
    (all are in passed-over.json in `folder`); and the names that `captions` (a CSV or JSONL file, `walt.data.captions`)
    and `source` do not share. Of several processes that prepare one folder, one does and the others wait.

    WaltError if nothing can be used, if the folder was prepared with other settings, or if the disk is full.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height, width: got {height}, {width}; expected ints >= 1")
    settings = PrepareSettings(height, width, shots, expect_rate(fps), expect_share("held_out", held_out or 0.0))
    for module in ("av", "PIL.Image"):
        require(module, "video")
    source, folder = Path(source), Path(folder)
    if folder.resolve() == source.resolve():
        raise WaltError(f"{folder} is the data itself; prepare it into another folder")
    files, passed = _find(source, [folder] if captions is None else [folder, Path(captions)], say)
    texts = {} if captions is None else read_captions(captions)
    if captions is not None:
        check_captions(texts, {normal(name) for name in files}, say)
    workers = min(WORKERS, os.cpu_count() or 1) if workers is None else workers
    with locked(folder, wait=True, say=say), writing(folder):
        earlier, before = read_index(folder) if (folder / INDEX).exists() else (settings, ())
        if held_out is None:
            settings = replace(settings, held_out=earlier.held_out)
        known = _known(folder, settings)
        decoder = _Decoder(source, folder, settings, files, known, passed, progress)
        decoder.decode(workers)
        for line in passed.lines():
            say(line)
        if not decoder.items:
            raise WaltError(f"{source}: none of its {len(files)} videos and images can be used")
        for path in folder.glob("frames-*.raw"):
            flush(path)
        write_json(folder / PASSED_OVER, passed.names)
        marked = [
            replace(item, caption=texts.get(normal(name)), held_out=is_held_out(item.digest, settings.held_out))
            for name in files
            if (item := decoder.items.get(name)) is not None
        ]
        if before and (changed := "; ".join(changes(_digests(before), _digests(marked)))):
            say(f"{source} has changed since it was prepared: {changed}")
        write_json(folder / SOURCE, {"source": str(source.resolve())})
        write_index(folder, settings, marked)
        (folder / JOURNAL).unlink(missing_ok=True)
    store = ClipStore.open(folder)
    for line in store.remarks():
        say(line)
    return store


def source_changes(store: ClipStore) -> Iterator[str]:
    """A line if files of the folder that a store was prepared from have changed since, as far as that can be read."""
    with contextlib.suppress(WaltError):
        source = Path(read_json(store.folder / SOURCE)["source"])
        names, _ = find_files(source, VIDEO_SUFFIXES + IMAGE_SUFFIXES, [store.folder])
        passed = {name for names in store.passed_over.names.values() for name in names}
        items, now = {normal(item.name): item for item in store.items}, {}
        for name in names:
            item, path = items.get(normal(name)), source / name
            if item is not None:
                state = _state(path)
                same = (state["size"], state["modified"]) == (item.size, item.modified)
                now[normal(name)] = item.digest if same else file_digest(path)
            elif name not in passed:
                now[normal(name)] = ""
        if changed := "; ".join(changes(_digests(store.items), now)):
            yield f"{source} has changed since {store.folder} was prepared from it: {changed}"


def _digests(items: Iterable[Item]) -> dict[str, str]:
    return {normal(item.name): item.digest for item in items}


def _find(source: Path, ignore: Collection[Path], say: Say) -> tuple[list[str], PassedOver]:
    """Names of the videos and images, and what is passed over."""
    suffixes = VIDEO_SUFFIXES + IMAGE_SUFFIXES
    names, passed = find_files(source, suffixes, ignore)
    if not names:
        for line in passed.lines():
            say(line)
        raise WaltError(f"{source} holds no video or image (looked for {', '.join(suffixes)})")
    return names, passed


def _known(folder: Path, settings: PrepareSettings) -> dict[str, Item]:
    """What earlier runs decoded, by the index and then the journal. What follows it in the shards is cut off."""
    decoded: list[Item] = []
    if (folder / INDEX).exists():
        found, items = read_index(folder)
        same = replace(found, held_out=settings.held_out) == settings  # which is marked anew
        if items and not same:
            raise WaltError(
                f"{folder} was prepared with {found}, not with {settings}; delete that folder, or prepare into another"
                " one"
            )
        if not same:
            (folder / JOURNAL).unlink(missing_ok=True)
        decoded += items
    if not decoded:
        write_index(folder, settings, [])  # an empty index: not finished
    if (folder / JOURNAL).exists():
        for line in (folder / JOURNAL).read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):  # a line cut short by a kill
                decoded.append(Item.from_dict(json.loads(line)))
    sizes = {path: path.stat().st_size for path in folder.glob("frames-*.raw")}
    decoded = [item for item in decoded if item.end <= sizes.get(shard_path(folder, item.shard), 0)]
    for path in sizes:
        os.truncate(path, max((item.end for item in decoded if shard_path(folder, item.shard) == path), default=0))
    return {normal(item.name): item for item in decoded} | {item.name: item for item in decoded}


class _Decoder:
    """The files that one call of `prepare` goes through."""

    def __init__(
        self,
        source: Path,
        folder: Path,
        settings: PrepareSettings,
        files: list[str],
        known: dict[str, Item],
        passed: PassedOver,
        progress: bool,
    ) -> None:
        self.source, self.folder, self.settings, self.known, self.passed = source, folder, settings, known, passed
        self.items: dict[str, Item] = {}
        self._todo: SimpleQueue[str] = SimpleQueue()
        for name in files:
            self._todo.put(name)
        self._done, self._total = 0, len(files)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._bar = progress_bar(desc="prepare", unit="frame", shown=progress)

    def decode(self, workers: int) -> None:
        with self._bar, (self.folder / JOURNAL).open("a") as journal, ThreadPoolExecutor(workers) as pool:
            journal.write("\n")  # ends a line that a kill cut short
            try:
                for future in as_completed([pool.submit(self._work, shard, journal) for shard in range(workers)]):
                    future.result()
            finally:
                self._stop.set()

    def _work(self, shard: int, journal: IO[str]) -> None:
        with shard_path(self.folder, shard).open("ab") as frames:
            while not self._stop.is_set():
                try:
                    name = self._todo.get_nowait()
                except Empty:
                    return
                start = frames.tell()
                try:
                    item = self._item(name, shard, frames)
                except WaltError as error:
                    frames.truncate(start)
                    frames.seek(start)
                    if self._stop.is_set():
                        return
                    with self._lock:
                        self.passed.add(error.reason.removeprefix("is "), name)
                else:
                    frames.flush()
                    self._note(item, journal)
                with self._lock:
                    self._done += 1
                    done = f"{self._done} of {self._total} files, {len(self.passed)} passed over"
                    self._bar.set_postfix_str(done, refresh=False)

    def _note(self, item: Item, journal: IO[str]) -> None:
        """Record a prepared file."""
        with self._lock:
            self.items[item.name] = item
            if item is not self.known.get(item.name):
                journal.write(json.dumps(vars(item)) + "\n")
                journal.flush()

    def _item(self, name: str, shard: int, frames: IO[bytes]) -> Item:
        """The entry of one file: the known one if the file has the same bytes, else a new one, decoded here.

        WaltError if the file cannot be read; OSError is of the writing.
        """
        path = self.source / name
        state = _state(path)
        if not state["size"]:
            raise WaltError.of(path, "is empty")
        known = self.known.get(name, self.known.get(normal(name)))
        renewed = None if known is None else replace(known, name=name, **state)
        if known is not None and renewed == known:
            return known
        digest = file_digest(path)
        if renewed is not None and renewed.digest == digest:
            return renewed
        return self._append(name, shard, frames, digest=digest, **state)

    def _append(self, name: str, shard: int, frames: IO[bytes], **file: Any) -> Item:
        """Decode one file to the end of the shard."""
        path = self.source / name
        offset = frames.tell()
        is_image = path.suffix.lower() in IMAGE_SUFFIXES
        detector = ShotDetector()
        count, rows, columns = 0, 0, 0
        for picture in [read_image(path)] if is_image else iterate_video(path, self.settings.fps):
            with as_user_error(str(path)):
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
            raise WaltError.of(path, "has no frames")
        rate, variable = (0.0, False) if is_image else frame_timing(path)
        return Item(
            name=name,
            kind="image" if is_image else "video",
            label=class_of(name),
            caption=None,
            fps=rate,
            variable=variable,
            height=rows,
            width=columns,
            frames=count,
            shots=detector.shots() if self.settings.shots else ((0, count),),
            shard=shard,
            offset=offset,
            **file,
        )


def _state(path: Path) -> dict[str, Any]:
    """What shows cheaply whether an item's file changed: any change of its bytes moves the last number."""
    with reading(path):
        status = path.stat()
    return {"size": status.st_size, "modified": status.st_mtime_ns, "changed": status.st_ctime_ns}


def file_digest(path: Path) -> str:
    """The SHA-256 of its bytes."""
    digest = hashlib.sha256()
    with reading(path), path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
