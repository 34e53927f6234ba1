"""Real clips for `walt evaluate` to compare a model's with: at the model's frame rate, from a folder or a film."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from walt.atomic import read_json, reading
from walt.checkpoint import checkpoint_folder, load_description
from walt.data.captions import check_captions, read_captions
from walt.data.clips import INDEX, ClipStore, Item, is_held_out
from walt.data.folders import class_of, find_files
from walt.data.pixels import cover, middle
from walt.data.prepare import file_digest
from walt.data.shots import NEIGHBOURS, ShotDetector
from walt.data.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, frame_rate, iterate_video
from walt.errors import WaltError, WaltWarning, as_user_error
from walt.names import normal
from walt.rates import same_rate
from walt.settings import load_settings
from walt.train.run import FILES, captions_of, open_data, tell, tell_other_rate


def trained_on(model: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Frames, height, width and fps (0 if unknown) of the clips that the denoiser was trained on, or else the
    tokenizer; and the settings `data` of its run, {} if it had none."""
    kind = "transformer" if checkpoint_folder(model / "transformer") else "tokenizer"
    description = load_description(model / kind, kind)[1]
    with as_user_error(str(model / kind / "config.json")):
        clip = {"frames": 17, "height": 64, "width": 64, "fps": 0.0, **description.get("clip", {})}
    return clip, description.get("data", {})


def real_clips(
    source: Path, count: int, frames: int, size: tuple[int, int], model: Path, *, reference: bool = False
) -> tuple[np.ndarray, list[str], list[str]]:
    """At most `count` clips spread over a folder, or from the beginning of a film -> uint8 [N, frames, *size, 3], and
    of those from a folder the classes and captions. No more is decoded than they take.

    Of a prepared folder they are of the files that were held out in the model's training, if some were. As in that,
    films are taken at data.fps, and every data.stride-th of their frames. If the clips still have another rate than
    those of training, a line says so; for a prepared folder it is a WaltError. Unless they are for `reference`, a
    WaltWarning says how many of the files were trained on.
    """
    clip, data = trained_on(model)
    fps, stride = data.get("fps", 0.0), data.get("stride", 1)
    rate = clip["fps"] if min(frames, clip["frames"]) > 1 else 0.0  # pictures have none
    share = data.get("held_out", 0.0)
    trained = set() if reference else trained_files(model, share)
    labels: list[str] = []
    captions: list[str] = []
    with reading(source):
        is_film, is_prepared = source.is_file(), (source / INDEX).is_file()
    if is_film:
        clips = _of_film(source, count, frames, size, fps, stride)
        found = fps or frame_rate(source)
        digests = {file_digest(source)} if trained else set()
    elif is_prepared:
        overrides = {"data.height": size[0], "data.width": size[1], "data.fps": fps}
        store = open_data(source, model, load_settings("base", overrides=overrides))
        prepared = store.settings.fps
        if rate and prepared != fps and not same_rate(prepared, rate * stride):
            raise WaltError(
                f"{source} was prepared at {prepared:g} frames a second, but {model} was trained on films of"
                f" {rate * stride:g}: prepare it without --fps"
            )
        if share != store.settings.held_out:  # as the folder was marked since
            tell(
                [
                    f"{source} was prepared with {store.settings.held_out:g} of its files held out, but {model} was"
                    f" trained with {share:g}, which counts here"
                ]
            )
            store = store.hold_out(share)
        clips, items = _of_store(store, count, frames, size, stride)
        labels, captions = [item.label or "" for item in items], [item.caption or "" for item in items]
        digests, found = {item.digest for item in items}, store.rate
    else:
        if share:
            tell(
                [
                    f"{model} was trained without the held-out files of its data, and which these are is not known of"
                    f" {source}: name the prepared folder to measure on them alone"
                ]
            )
        clips, names, captions, found = _of_folder(source, count, frames, size, fps, stride)
        labels = [class_of(name) or "" for name in names]
        digests = {file_digest(source / name) for name in set(names)} if trained else set()
    tell_other_rate(source, found / stride, model, rate)
    if seen := len(digests & trained):
        warnings.warn(
            f"{seen} of the {len(digests)} files with the real clips were trained on, which flatters the model; measure"
            " on others (walt prepare --held-out, before training)",
            WaltWarning,
            stacklevel=2,
        )
    return clips, labels, captions


def trained_files(model: Path, held_out: float) -> set[str]:
    """SHA-256 of the files that the run's tokenizer, base model and first stage of super-resolution were trained on, as
    far as it has lists of them."""
    lists = [model / f"{stage}{FILES}" for stage in ("tokenizer", "transformer", "sr1")]
    digests = {digest for path in lists if path.is_file() for digest in read_json(path).get("file", {}).values()}
    return {digest for digest in digests if not is_held_out(digest, held_out)}


def _of_film(source: Path, count: int, frames: int, size: tuple[int, int], fps: float, stride: int) -> np.ndarray:
    """End to end, across cuts."""
    if source.suffix.lower() not in VIDEO_SUFFIXES:
        raise WaltError(f"{source} is not a video; expected one of {', '.join(VIDEO_SUFFIXES)}")
    clips = list(islice(film_clips(source, frames, size, fps=fps, stride=stride, shots=False), count))
    if not clips:
        held, needed = sum(1 for _ in iterate_video(source, fps)), (frames - 1) * stride + 1
        raise WaltError(f"{source} has {held} frames; clips of {needed} are wanted")
    return np.stack(clips)


def _of_store(
    store: ClipStore, count: int, frames: int, size: tuple[int, int], stride: int
) -> tuple[np.ndarray, list[Item]]:
    held_out = bool(store.held_out.any())
    indices = store.windows(frames, stride=stride, hop=frames * stride, held_out=held_out)
    if not len(indices):
        among = " in the files that are held out" if held_out else ""
        raise WaltError(f"{store.folder} holds no clip of {frames} frames{among}")
    if held_out:
        tell([f"the real clips are of the {store.held_out.sum()} files that are held out of {len(store.items)}"])
    tell(store.too_short(frames, stride=stride, held_out=held_out).lines())
    indices = indices[np.linspace(0, len(indices) - 1, min(count, len(indices))).astype(int)]
    items = [store.items[item] for item, _ in indices]
    return store.read(indices, frames, stride=stride, crop=size), items


def _of_folder(
    source: Path, count: int, frames: int, size: tuple[int, int], fps: float, stride: int
) -> tuple[np.ndarray, list[str], list[str], float]:
    """As many clips of one film as of another, as far as there are; the names of their films, their captions, and the
    films' frames a second (the median)."""
    table = captions_of(source, None)
    texts = read_captions(table) if table is not None else {}
    names, passed = find_files(source, VIDEO_SUFFIXES + IMAGE_SUFFIXES, [] if table is None else [table])
    if table is not None:
        check_captions(texts, {normal(name) for name in names}, lambda line: tell([line]))
    films = [name for name in names if Path(name).suffix.lower() in VIDEO_SUFFIXES]
    # Any beginning of this order is spread over the folder: multiples of the golden ratio leave no large gap.
    going = [films[i] for i in sorted(range(len(films)), key=lambda i: i * (5**0.5 - 1) / 2 % 1)]
    taken: dict[str, list[np.ndarray]] = {name: [] for name in films}
    share, missing = 0, count
    while missing and going:
        share += -(-missing // len(going))
        for name in going:
            missing += len(taken[name])
            try:
                found = film_clips(source / name, frames, size, fps=fps, stride=stride)
                taken[name] = list(islice(found, min(share, missing)))
            except WaltError as error:
                taken[name] = []
                passed.add(error.reason.removeprefix("is "), name)
            else:
                if not taken[name]:
                    passed.add(f"no shot of {(frames - 1) * stride + 1} frames", name)
            missing -= len(taken[name])
            if not missing:
                break
        going = [name for name in going if len(taken[name]) == share]
    tell(passed.lines())
    used = [(name, clip) for name in films for clip in taken[name]]
    if not used:
        raise WaltError(f"{source} holds no clip of {frames} frames")
    rates = [fps or frame_rate(source / name) for name in films if taken[name]]
    names = [name for name, _ in used]
    captions = [texts.get(normal(name), "") for name in names]
    return np.stack([clip for _, clip in used]), names, captions, float(np.median(rates))


def film_clips(
    path: Path, frames: int, size: tuple[int, int], *, fps: float = 0.0, stride: int = 1, shots: bool = True
) -> Iterator[np.ndarray]:
    """The clips of a film one after the other, uint8 [frames, *size, 3]; with `shots`, none lies across a cut.

    Only its frames are decoded for a clip and, with `shots`, those after it that tell where the cuts are.
    """
    needed, ahead = (frames - 1) * stride + 1, NEIGHBOURS if shots else 0
    detector = ShotDetector()
    held: list[np.ndarray] = []
    base = shot = start = 0  # frame numbers: of held[0], where the shot begins, and the clip
    for picture in chain(iterate_video(path, fps), [None]):
        if picture is not None:
            if not (base or held) and (picture.shape[0] < size[0] or picture.shape[1] < size[1]):
                warnings.warn(
                    f"films of fewer than {size[1]}x{size[0]} pixels are enlarged to that: figures of them flatter",
                    WaltWarning,
                    stacklevel=2,
                )
            with as_user_error(str(path)):
                covering = cover(picture, *size)
            held.append(middle(covering, *size))
            if shots:
                detector.add(covering)
        while base + len(held) >= start + needed + (ahead if picture is not None else 0):
            later = (first for first, _ in detector.shots() if shot < first < start + needed)
            cut = next(later, None)
            if cut is not None:
                shot = start = cut
                held, base = held[cut - base :], cut
                continue
            yield np.stack(held[start - base : start - base + needed : stride])
            held, base = held[start - base + needed :], start + needed
            start += frames * stride
