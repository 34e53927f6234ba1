"""walt.data.prepare: what is prepared, what is passed over, and how an interrupted or repeated run goes on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import threading
import weakref

import numpy as np
import pytest
from films import noise, numbers, ramp, write_folder

import walt.data.prepare
from walt.data.clips import ClipStore
from walt.data.prepare import prepare, source_changes
from walt.data.video import frame_rate, iterate_video, write_mp4, write_png
from walt.errors import WaltError

pytest.importorskip("av", reason="PyAV is not installed")
pytest.importorskip("PIL", reason="Pillow is not installed")

NAMES = ["cats/c.png", "cats/one.mp4", "dogs/a.png", "dogs/b.png", "dogs/two.mp4", "still.png"]


def make(source, store, **options) -> tuple[ClipStore, list[str]]:
    """The store, and the lines that were said but for that of the two films' frame rates (`test_frame_rates`)."""
    lines: list[str] = []
    options = {"height": 16, "width": 16, "progress": False, "workers": 2, **options}
    made = prepare(source, store, say=lines.append, **options)
    return made, [line for line in lines if not line.startswith("frames a second differ")]


def content(store: ClipStore) -> list[np.ndarray]:
    return [store.read(np.array([[i, 0]]), item.frames)[0] for i, item in enumerate(store.items)]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "source")


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the videos that are decoded."""
    names: list[str] = []

    def iterate(path, *rate):
        names.append(path.name)
        return iterate_video(path, *rate)

    monkeypatch.setattr(walt.data.prepare, "iterate_video", iterate)
    return names


def test_a_folder(folder, tmp_path):
    store, lines = make(folder, tmp_path / "prepared")
    assert lines == []
    assert [item.name for item in store.items] == NAMES
    assert [item.kind for item in store.items] == ["image", "video", "image", "image", "video", "image"]
    assert store.classes == ("cats", "dogs")
    assert store.label.tolist() == [0, 0, 1, 1, 1, 2]  # 2: in no folder
    assert store.caption == (None,) * 6
    assert [item.frames for item in store.items] == [1, 12, 1, 1, 7, 1]
    assert {(item.height, item.width) for item in store.items} == {(16, 24), (21, 16)}  # of 32 x 48 and 40 x 30
    assert store.fps.tolist() == [0, 12, 0, 0, 25, 0]
    clips = content(store)
    assert numbers(clips[1]).tolist() == list(range(12))
    assert numbers(clips[4]).tolist() == list(range(7))
    assert [int(clips[i].mean()) for i in (2, 3, 0, 5)] == [0, 50, 100, 150]
    again = ClipStore.open(tmp_path / "prepared")
    assert again.items == store.items
    assert (again.height, again.width, again.fingerprint) == (16, 16, store.fingerprint)


def test_workers_do_not_change_the_content(folder, tmp_path):
    one, _ = make(folder, tmp_path / "one", workers=1)
    three, _ = make(folder, tmp_path / "three", workers=3)
    assert one.fingerprint == three.fingerprint
    assert all(np.array_equal(a, b) for a, b in zip(content(one), content(three), strict=True))


def test_what_cannot_be_read_is_passed_over_and_counted(folder, tmp_path):
    (folder / "cats/broken.mp4").write_bytes(b"This is a text.\n" * 100)
    (folder / "cats/empty.mp4").write_bytes(b"")
    (folder / "cats/one.txt").write_text("not looked at")
    (folder / "cats/._one.mp4").write_text("hidden")
    whole = (folder / "dogs/b.png").read_bytes()
    (folder / "dogs/cut.png").write_bytes(whole[: len(whole) // 2])
    store, lines = make(folder, tmp_path / "prepared")
    assert [item.name for item in store.items] == NAMES
    assert sorted(lines) == [
        "passed over, empty: 1 (cats/empty.mp4)",
        "passed over, hidden or left by other software: 1 (cats/._one.mp4)",
        "passed over, not a video that can be decoded: Invalid data found when processing input: 1 (cats/broken.mp4)",
        "passed over, not an image that can be decoded: image file is truncated: 1 (dogs/cut.png)",
        "passed over, unknown ending: 1 (cats/one.txt)",
    ]
    assert sorted(ClipStore.open(tmp_path / "prepared").passed_over.lines()) == sorted(lines)
    assert numbers(content(store)[1]).tolist() == list(range(12))


def test_strips_are_skipped_and_not_blown_up(folder, tmp_path):
    write_png(folder / "dogs/strip.png", np.zeros((1, 4000, 3), np.uint8))
    write_mp4(folder / "cats/strip.mp4", np.zeros((3, 1024, 32, 3), np.uint8))
    store, lines = make(folder, tmp_path / "prepared")
    assert [item.name for item in store.items] == NAMES
    (line,) = lines
    assert line.startswith("passed over, so oblong that it would be over 16 times 16x16 to cover that; crop it: 2 (")
    assert line.endswith("(cats/strip.mp4, dogs/strip.png)")


def test_what_has_changed_since_is_told(folder, tmp_path):
    """By a second call, and of a prepared folder that is opened: files by their bytes, whatever their times."""
    store, _ = make(folder, tmp_path / "prepared")
    (folder / "cats/broken.mp4").write_bytes(b"This is a text.\n" * 100)
    os.utime(folder / "dogs/two.mp4", (1, 1))
    assert not [*source_changes(make(folder, tmp_path / "prepared")[0])]
    shutil.copy(folder / "dogs/b.png", folder / "dogs/c.png")
    shutil.copy(folder / "dogs/b.png", folder / "dogs/a.png")
    (folder / "cats/c.png").unlink()
    changed = "1 file more: dogs/c.png; 1 file fewer: cats/c.png; 1 file changed: dogs/a.png"
    there = f"{folder} has changed since {store.folder} was prepared from it: "
    assert [*source_changes(ClipStore.open(store.folder))] == [there + changed]
    store, lines = make(folder, tmp_path / "prepared")
    assert f"{folder} has changed since it was prepared: {changed}" in lines
    assert not [*source_changes(store)]
    folder.rename(tmp_path / "elsewhere")
    assert not [*source_changes(store)]


def test_the_data_itself_is_refused(folder):
    before = sorted(folder.rglob("*"))
    with pytest.raises(WaltError, match="is the data itself; prepare it into another folder"):
        make(folder, folder / "cats/..")
    assert sorted(folder.rglob("*")) == before


def test_a_video_that_breaks_off_leaves_nothing(folder, tmp_path, monkeypatch):
    def iterate(path, *rate):
        for index, picture in enumerate(iterate_video(path, *rate)):
            if path.name == "one.mp4" and index == 5:
                raise WaltError.of(path, "breaks off")
            yield picture

    monkeypatch.setattr(walt.data.prepare, "iterate_video", iterate)
    store, lines = make(folder, tmp_path / "prepared", workers=1)
    assert lines == ["passed over, breaks off: 1 (cats/one.mp4)"]
    assert [item.name for item in store.items] == [name for name in NAMES if name != "cats/one.mp4"]
    assert (tmp_path / "prepared/frames-0.raw").stat().st_size == sum(
        16 * 24 * 7 * 3 if i == 3 else 21 * 16 * 3 for i in range(5)
    )


def test_a_file_that_cannot_be_read_is_passed_over(folder, tmp_path, monkeypatch):
    """As one that is removed while others are decoded."""
    find = walt.data.prepare.find_files

    def and_another(*arguments):
        names, passed = find(*arguments)
        return [*names, "dogs/gone.mp4"], passed

    monkeypatch.setattr(walt.data.prepare, "find_files", and_another)
    store, lines = make(folder, tmp_path / "prepared")
    assert [item.name for item in store.items] == NAMES
    assert lines == ["passed over, cannot be read: No such file or directory: 1 (dogs/gone.mp4)"]


def test_nothing_usable_stops(tmp_path):
    with pytest.raises(WaltError, match="no such folder"):
        make(tmp_path / "nowhere", tmp_path / "prepared")
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(WaltError, match=r"source holds no video or image \(looked for \.mp4"):
        make(source, tmp_path / "prepared")
    (source / "a.mp4").write_bytes(b"")
    (source / "b.png").write_bytes(b"")
    with pytest.raises(WaltError, match="none of its 2 videos and images can be used"):
        make(source, tmp_path / "prepared")
    with pytest.raises(WaltError, match="was not prepared to the end"):
        ClipStore.open(tmp_path / "prepared")


def test_captions(folder, tmp_path):
    table = tmp_path / "captions.csv"
    table.write_text("file,caption\ncats/one.mp4,a cat\nlost.mp4,nothing\n")
    store, lines = make(folder, tmp_path / "prepared", captions=table)
    assert lines == [
        "1 captions without a file: lost.mp4",
        "5 files without a caption: cats/c.png, dogs/a.png, dogs/b.png, dogs/two.mp4, still.png",
    ]
    assert store.caption == (None, "a cat", None, None, None, None)


def test_shots(tmp_path):
    (tmp_path / "source").mkdir()
    write_mp4(tmp_path / "source/film.mp4", np.concatenate([noise(6, 0), noise(9, 1)]))
    cut, _ = make(tmp_path / "source", tmp_path / "cut")
    assert cut.items[0].shots == ((0, 6), (6, 15))
    whole, _ = make(tmp_path / "source", tmp_path / "whole", shots=False)
    assert whole.items[0].shots == ((0, 15),)


def test_a_second_run_decodes_what_changed(folder, tmp_path, decoded):
    first, _ = make(folder, tmp_path / "prepared")
    assert sorted(decoded) == ["one.mp4", "two.mp4"]
    decoded.clear()
    table = tmp_path / "captions.jsonl"
    table.write_text('{"file": "still.png", "caption": "a wall"}')
    again, _ = make(folder, tmp_path / "prepared", captions=table)
    assert decoded == []
    assert again.caption[-1] == "a wall"
    assert again.fingerprint == first.fingerprint
    write_mp4(folder / "dogs/two.mp4", ramp(9))
    (folder / "cats/one.mp4").unlink()
    changed, _ = make(folder, tmp_path / "prepared")
    assert decoded == ["two.mp4"]
    assert [item.name for item in changed.items] == [name for name in NAMES if name != "cats/one.mp4"]
    assert numbers(content(changed)[3]).tolist() == list(range(9))
    assert changed.fingerprint != first.fingerprint


def test_the_same_bytes_are_the_same_data(folder, tmp_path, decoded):
    """Whenever they were written, wherever they came from."""
    first, _ = make(folder, tmp_path / "prepared")
    decoded.clear()
    os.utime(folder / "cats/one.mp4", (1, 1))
    shutil.copy(folder / "dogs/two.mp4", tmp_path / "copy")
    (tmp_path / "copy").replace(folder / "dogs/two.mp4")
    again, _ = make(folder, tmp_path / "prepared")
    assert (decoded, again.fingerprint) == ([], first.fingerprint)
    for path, newer in zip((folder / "cats/one.mp4", folder / "dogs/two.mp4"), again.items[1::3], strict=True):
        assert newer.modified == path.stat().st_mtime_ns
    shutil.copytree(folder, tmp_path / "moved", copy_function=shutil.copyfile)
    assert make(tmp_path / "moved", tmp_path / "other")[0].fingerprint == first.fingerprint


def test_other_bytes_are_other_data(folder, tmp_path, decoded):
    """Though neither the size of the file nor its time tells."""
    first, _ = make(folder, tmp_path / "prepared")
    decoded.clear()
    path, whole = folder / "cats/one.mp4", (folder / "cats/one.mp4").read_bytes()
    times = path.stat()
    path.write_bytes(whole.replace(b"Lavf", b"Love"))  # the name of the software, which no frame depends on
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed, _ = make(folder, tmp_path / "prepared")
    assert decoded == ["one.mp4"]
    assert changed.items[1].size == first.items[1].size
    assert changed.fingerprint != first.fingerprint


def test_names_written_by_macos(folder, tmp_path, decoded):
    """Which takes accents apart: the same names, whoever wrote them."""
    apart, whole = "cafe\u0301", "caf\xe9"
    (folder / "dogs").rename(folder / apart)
    table = tmp_path / "captions.csv"
    table.write_text(f"file,caption\n{whole}/two.mp4,a dog\n", encoding="utf-8")
    store, lines = make(folder, tmp_path / "prepared", captions=table)
    assert store.classes == (whole, "cats")
    assert [item.caption for item in store.items if item.name == f"{apart}/two.mp4"] == ["a dog"]
    assert [line.split(":")[0] for line in lines] == ["5 files without a caption"]
    decoded.clear()
    (folder / apart).rename(folder / whole)
    again, _ = make(folder, tmp_path / "prepared", captions=table)
    assert (decoded, again.fingerprint, again.classes) == ([], store.fingerprint, store.classes)
    assert again.caption == store.caption


def test_two_files_of_one_name_to_the_eye(tmp_path, decoded):
    for value, name in enumerate(("cafe\u0301.mp4", "caf\xe9.mp4")):
        write_mp4(tmp_path / "source" / name, ramp(3 + value))
    store, _ = make(tmp_path / "source", tmp_path / "prepared")
    assert [item.frames for item in store.items] == [3, 4]
    decoded.clear()
    again, _ = make(tmp_path / "source", tmp_path / "prepared")
    assert (decoded, again.items) == ([], store.items)


@pytest.mark.parametrize("torn", [b"", b'{"name": "dogs/two.mp4", "kind": "vid', b"{}\n[]\n3\n"])
def test_an_interrupted_run_goes_on(folder, tmp_path, monkeypatch, decoded, torn):
    whole, _ = make(folder, tmp_path / "whole", workers=1)
    decoded.clear()
    spy = walt.data.prepare.iterate_video

    def interrupted(path, *rate):
        for index, picture in enumerate(spy(path, *rate)):
            if path.name == "two.mp4" and index == 3:
                raise KeyboardInterrupt
            yield picture

    with monkeypatch.context() as patch:
        patch.setattr(walt.data.prepare, "iterate_video", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(folder, tmp_path / "prepared", workers=1)
    with pytest.raises(WaltError, match="was not prepared to the end"):
        ClipStore.open(tmp_path / "prepared")
    # What a kill in the middle of writing may leave, besides.
    with (
        (tmp_path / "prepared/journal.jsonl").open("ab") as journal,
        (tmp_path / "prepared/frames-0.raw").open("ab") as raw,
    ):
        journal.write(torn)
        raw.write(b"x" * 1000)
    assert decoded == ["one.mp4", "two.mp4"]
    store, _ = make(folder, tmp_path / "prepared", workers=1)
    assert decoded == ["one.mp4", "two.mp4", "two.mp4"]
    assert store.fingerprint == whole.fingerprint
    assert (tmp_path / "prepared/frames-0.raw").read_bytes() == (tmp_path / "whole/frames-0.raw").read_bytes()
    assert not (tmp_path / "prepared/journal.jsonl").exists()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="names of open files are read from /proc")
def test_frames_are_on_the_disk_before_the_index(folder, tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync

    def spy(handle):
        flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    make(folder, tmp_path / "prepared", workers=2)
    last = max(i for i, name in enumerate(flushed) if name.startswith(".index"))
    assert {"frames-0.raw", "frames-1.raw"} <= set(flushed[:last])


def test_frames_that_the_disk_has_lost_are_decoded_again(folder, tmp_path, monkeypatch, decoded):
    with monkeypatch.context() as patch:
        patch.setattr(walt.data.prepare, "write_index", lambda folder, settings, items: items and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(folder, tmp_path / "prepared", workers=1)
    decoded.clear()
    os.truncate(tmp_path / "prepared/frames-0.raw", (tmp_path / "prepared/frames-0.raw").stat().st_size // 2)
    whole, _ = make(folder, tmp_path / "whole", workers=1)
    store, _ = make(folder, tmp_path / "prepared", workers=1)
    assert decoded.count("two.mp4") == 2
    assert all(np.array_equal(a, b) for a, b in zip(content(store), content(whole), strict=True))


def test_one_process_at_a_time(folder, tmp_path):
    (tmp_path / "prepared").mkdir()
    with (tmp_path / "prepared/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another process would
        other = threading.Thread(target=make, args=(folder, tmp_path / "prepared"))
        other.start()
        other.join(0.3)
        assert other.is_alive()
        assert [path.name for path in (tmp_path / "prepared").iterdir()] == ["lock"]
    other.join(60)
    assert len(ClipStore.open(tmp_path / "prepared").items) == len(NAMES)


def test_an_interrupted_second_run_leaves_the_first_store(folder, tmp_path, monkeypatch):
    first, _ = make(folder, tmp_path / "prepared", workers=1)
    before = content(first)
    # A run that decoded the last file anew, into another shard, was killed; the next one is, too.
    newer = {**vars(first.items[5]), "shard": 1, "offset": 0}
    (tmp_path / "prepared/journal.jsonl").write_text(json.dumps(newer))
    (tmp_path / "prepared/frames-1.raw").write_bytes(bytes(first.items[5].end - first.items[5].offset))
    write_mp4(folder / "new.mp4", ramp(5))

    def interrupted(path, *rate):
        raise KeyboardInterrupt

    monkeypatch.setattr(walt.data.prepare, "iterate_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(folder, tmp_path / "prepared", workers=1)
    still = ClipStore.open(tmp_path / "prepared")
    assert still.fingerprint == first.fingerprint
    assert all(np.array_equal(a, b) for a, b in zip(content(still), before, strict=True))


def test_missing_dependencies_are_no_skipped_files(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(WaltError, match=r'pip install "walt-kernels\[video\]"'):
        make(folder, tmp_path / "prepared")


def test_other_settings_need_another_folder(folder, tmp_path):
    make(folder, tmp_path / "prepared")
    with pytest.raises(WaltError, match="prepared with height 16, width 16, shots on, not with height 8, width 16"):
        make(folder, tmp_path / "prepared", height=8)
    index = json.loads((tmp_path / "prepared/index.json").read_text())
    (tmp_path / "prepared/index.json").write_text(json.dumps({**index, "items": []}))  # an unfinished one begins again
    assert make(folder, tmp_path / "prepared", height=8)[0].items[1].height == 11


def test_a_folder_of_something_else_is_left_alone(folder, tmp_path):
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared/index.json").write_text('{"format": "recipes"}')
    with pytest.raises(WaltError, match=r"is not that of a prepared folder: .*'recipes'"):
        make(folder, tmp_path / "prepared")
    assert (tmp_path / "prepared/index.json").read_text() == '{"format": "recipes"}'
    with pytest.raises(WaltError, match="cannot write"):
        make(folder, folder / "still.png" / "prepared")


def test_writing_that_fails_is_no_skipped_file(folder, tmp_path, monkeypatch):
    (tmp_path / "prepared").mkdir()
    os.symlink("/dev/full", tmp_path / "full")
    monkeypatch.setattr(walt.data.prepare, "shard_path", lambda folder, shard: tmp_path / "full")
    with pytest.raises(WaltError, match=r"cannot write .*prepared: No space left on device"):
        make(folder, tmp_path / "prepared")


def test_films_are_not_held_in_memory(folder, tmp_path, monkeypatch):
    alive: set[int] = set()
    most = 0

    class Frame(np.ndarray):
        pass

    def iterate(path, *rate):
        nonlocal most
        for index in range(60):
            frame = np.full((32, 48, 3), index, np.uint8).view(Frame)
            alive.add(index)
            weakref.finalize(frame, alive.discard, index)
            most = max(most, len(alive))
            yield frame

    monkeypatch.setattr(walt.data.prepare, "iterate_video", iterate)
    store, _ = make(folder, tmp_path / "prepared", workers=1)
    assert store.items[1].frames == 60
    assert 1 <= most <= 3


def test_frame_rate_of_real_file(folder):
    assert frame_rate(folder / "dogs/two.mp4") == 25
