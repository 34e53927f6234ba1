"""walt.data.clips: which clips there are, which pixels a row, an offset and a flip give, what makes a store broken."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from films import noise, numbers, ramp

from walt.data.clips import Clip, ClipStore, PrepareSettings, write_store
from walt.data.pixels import cover, shrink
from walt.data.prepare import prepare
from walt.data.video import write_mp4, write_png
from walt.errors import WaltError

pytest.importorskip("av", reason="PyAV is not installed")
pytest.importorskip("PIL", reason="Pillow is not installed")

PICTURE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared for 16x16: item 0 wide.png (16 x 27), 1 a ramp of 12 frames, 2 a film of shots of 4, 2 and 5 frames."""
    source = tmp_path_factory.mktemp("source")
    write_png(source / "a.png", PICTURE)
    write_mp4(source / "b.mp4", ramp(12))
    write_mp4(source / "c.mp4", np.concatenate([noise(4, 0), noise(2, 1), noise(5, 2)]))
    prepare(source, source / "prepared", height=16, width=16, progress=False)
    return source / "prepared"


@pytest.fixture
def store(folder) -> ClipStore:
    return ClipStore.open(folder)


def rows(*pairs: tuple[int, int]) -> np.ndarray:
    return np.array(pairs, np.int64).reshape(-1, 2)


def test_fingerprint_is_of_what_frames_depend_on(store):
    def changed(**values) -> str:
        items = (replace(store.items[0], **values), *store.items[1:])
        return ClipStore(store.folder, PrepareSettings(16, 16, True), items, store._shards).fingerprint

    assert changed() == store.fingerprint
    for values in ({"label": "x"}, {"caption": "x"}, {"shard": 1}, {"offset": 3}, {"modified": 1}, {"changed": 1}):
        assert changed(**values) == store.fingerprint
    other = [changed(**values) for values in ({"name": "x"}, {"digest": "x"}, {"size": 1}, {"height": 17})]
    assert len({store.fingerprint, *other}) == 5
    assert (
        ClipStore(store.folder, PrepareSettings(16, 16, False), store.items, store._shards).fingerprint
        != store.fingerprint
    )


def test_clips_that_are_no_files(tmp_path):
    """Frames come back as they were; the folder in a name is the class, and the first of each class can be had."""
    clips = [Clip(f"{name}/{number}", noise(5, number)) for number, name in enumerate("bbaab")]
    store = write_store(tmp_path / "store", [*clips, Clip("loose", noise(5, 9), "a loose clip")], 17.5)
    assert np.array_equal(store.read(rows((3, 0)), 5)[0], clips[3][1])
    assert np.array_equal(store.read(rows((4, 1)), 3)[0], clips[4][1][1:4])
    assert len(store.windows(5)) == 6
    assert store.classes == ("a", "b")
    assert store.label.tolist() == [1, 1, 0, 0, 1, 2]
    assert store.rate == 17.5
    assert store.caption == (*[None] * 5, "a loose clip")
    assert store.balanced(2).tolist() == [2, 3, 0, 1]
    again = write_store(tmp_path / "again", [*clips, Clip("loose", noise(5, 9))], 17.5)
    assert again.fingerprint == store.fingerprint
    assert write_store(tmp_path / "again", clips, 17.5).fingerprint != store.fingerprint


def test_windows_stay_inside_a_shot(store):
    assert store.items[2].shots == ((0, 4), (4, 6), (6, 11))
    ramp_rows = [(1, first) for first in range(9)]
    assert store.windows(4).tolist() == rows(*ramp_rows, (2, 0), (2, 6), (2, 7)).tolist()
    assert store.windows(3, stride=2).tolist() == rows(*[(1, first) for first in range(8)], (2, 6)).tolist()
    assert store.windows(4, hop=4).tolist() == [[1, 0], [1, 4], [1, 8], [2, 0], [2, 6]]
    assert (
        store.windows(1, hop=3).tolist()
        == rows((1, 0), (1, 3), (1, 6), (1, 9), *[(2, f) for f in (0, 3, 4, 6, 9)]).tolist()
    )
    assert store.windows(13).shape == (0, 2)
    assert store.windows(13).dtype == np.int64


def test_too_short(store):
    assert not store.too_short(2)
    assert store.too_short(3).names == {"shot of fewer than 3 frames": ["c.mp4 from 4 to 5"]}
    assert store.too_short(3, stride=2).names == {
        "shot of fewer than 5 frames": ["c.mp4 from 0 to 3", "c.mp4 from 4 to 5"]
    }
    assert store.too_short(6).names == {"no shot of 6 frames": ["c.mp4"]}
    assert store.too_short(13).names == {"no shot of 13 frames": ["b.mp4", "c.mp4"]}


def test_images(store):
    assert store.images().tolist() == [[0, 0]]
    assert store.images(5).tolist() == [[0, 0], [1, 0], [1, 5], [1, 10], [2, 0], [2, 5], [2, 10]]


def test_frames_of_a_row(store):
    clips = store.read(rows((1, 0), (1, 7), (1, 2)), 5)
    assert clips.shape == (3, 5, 16, 16, 3)
    assert clips.dtype == np.uint8
    assert numbers(clips).tolist() == [[0, 1, 2, 3, 4], [7, 8, 9, 10, 11], [2, 3, 4, 5, 6]]
    assert numbers(store.read(rows((1, 1)), 4, stride=3)).tolist() == [[1, 4, 7, 10]]
    assert store.read(rows(), 5).shape == (0, 5, 16, 16, 3)


def test_crop_and_flip(store):
    whole = cover(PICTURE, 16, 16)
    place = np.array([[0.0, 0.0], [0.3, 0.999999], [0.9, 0.5], [0.0, 1.0]])
    clips = store.read(rows(*[(0, 0)] * 4), offset=place)[:, 0]
    for clip, left in zip(clips, (0, 11, 5, 11), strict=True):
        assert np.array_equal(clip, whole[:, left : left + 16])
    assert np.array_equal(store.read(rows((0, 0)))[0, 0], clips[2])
    mirrored = store.read(rows((0, 0), (0, 0)), offset=place[:2], flip=np.array([True, False]))[:, 0]
    assert np.array_equal(mirrored[0], clips[0][:, ::-1])
    assert np.array_equal(mirrored[1], clips[1])


def test_every_offset_is_equally_likely(store):
    whole = cover(PICTURE, 16, 16)
    place = np.stack([np.zeros(1200), (np.arange(1200) + 0.5) / 1200], axis=1)
    clips = store.read(rows(*[(0, 0)] * 1200), offset=place)[:, 0]
    counts = [(clips == whole[:, left : left + 16]).all(axis=(1, 2, 3)).sum() for left in range(12)]
    assert counts == [100] * 12


def test_smaller_crops_are_shrunk(store):
    whole = cover(PICTURE, 16, 16)[None]
    assert np.array_equal(store.read(rows((0, 0)), crop=(8, 8))[0], shrink(whole[:, :, 5:21], 8, 8))
    assert np.array_equal(store.read(rows((0, 0)), crop=(4, 16))[0], shrink(whole[:, 5:11], 4, 16))


@pytest.mark.parametrize(
    ("error", "options"),
    [
        ("indices: got frames 8 to 12 of b.mp4, which has 12", {"indices": rows((1, 8))}),
        ("indices: got frames -1 to 3 of b.mp4", {"indices": rows((1, -1))}),
        ("indices: got item 3; there are 3", {"indices": rows((3, 0))}),
        ("indices: got item -1", {"indices": rows((-1, 0))}),
        (r"indices: got float64 \[1, 2\]", {"indices": np.zeros((1, 2))}),
        (r"indices: got int64 \[2\]", {"indices": np.zeros(2, np.int64)}),
        ("crop: got 16x17; expected at most 16x16", {"crop": (16, 17)}),
        (r"offset: got shape \[2\]; expected \[1, 2\]", {"offset": np.zeros(2)}),
        (r"flip: got shape \[2\]; expected \[1\]", {"flip": np.zeros(2, bool)}),
    ],
)
def test_wrong_rows(store, error, options):
    with pytest.raises(ValueError, match=error):
        store.read(**{"indices": rows((1, 0)), "frames": 5, **options})


@pytest.mark.parametrize("name", ["frames", "stride", "hop"])
def test_wrong_windows(store, name):
    with pytest.raises(ValueError, match=f"{name}: got 0; expected an int >= 1"):
        store.windows(**{"frames": 4, name: 0})
    with pytest.raises(ValueError, match="every: got 0"):
        store.images(0)


def edited(folder, item=None, **values) -> str:
    """The index with other values, None for none, and other values of its entry 1."""
    index = json.loads((folder / "index.json").read_text())
    index["items"][1].update(item or {})
    return json.dumps({name: value for name, value in {**index, **values}.items() if value is not None})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "recipes"}, "is not that of a prepared folder"),
        ({"version": 9}, "has version 9; this walt reads version 3"),
        ({"height": None}, "is broken: 'height'"),
        ({"width": "16"}, "is broken: it covers 16 x '16' pixels"),
        ({"shots": "yes"}, "is broken: shots is 'yes'"),
        ({"items": None}, "is broken: 'items'"),
        ({"items": [3]}, "is broken: an entry is malformed"),
        ({"item": {"offset": "0"}}, "is broken: an entry is malformed|the entry of 'b.mp4' is malformed"),
        ({"item": {"offset": -1}}, "the entry of 'b.mp4' is malformed"),
        ({"item": {"frames": 0}}, "the entry of 'b.mp4' is malformed"),
        ({"item": {"shots": [[0, 5], [6, 12]]}}, "the entry of 'b.mp4' is malformed"),
        ({"item": {"shots": [[0, 13]]}}, "the entry of 'b.mp4' is malformed"),
        ({"item": {"shots": [0, 12]}}, "an entry is malformed"),
        ({"item": {"kind": "song"}}, "the entry of 'b.mp4' is malformed"),
        ({"item": {"digest": None}}, "the entry of 'b.mp4' is malformed"),
        ({"item": {"shard": 1.5}}, "the entry of 'b.mp4' is malformed"),
        ({"item": {"mood": "good"}}, "an entry is malformed .*mood"),
        ({"item": {"shard": 77}}, r"frames-77\.raw is broken: it holds 0 bytes"),
    ],
)
def test_broken_index(folder, tmp_path, values, message):
    shutil.copytree(folder, tmp_path / "prepared")
    (tmp_path / "prepared/index.json").write_text(edited(folder, **values))
    with pytest.raises(WaltError, match=message):
        ClipStore.open(tmp_path / "prepared")


def test_broken_files(folder, tmp_path):
    with pytest.raises(WaltError, match="no such prepared folder"):
        ClipStore.open(tmp_path / "nowhere")
    with pytest.raises(WaltError, match=r"is not a prepared folder: it has no index\.json"):
        ClipStore.open(tmp_path)
    shutil.copytree(folder, tmp_path / "prepared")
    path = max((tmp_path / "prepared").glob("*.raw"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WaltError, match=r"frames-\d\.raw is broken: it holds \d+ bytes, its index speaks of \d+"):
        ClipStore.open(tmp_path / "prepared")
    (tmp_path / "prepared/index.json").write_text('{"format": ')
    with pytest.raises(WaltError, match=r"index\.json is not JSON"):
        ClipStore.open(tmp_path / "prepared")
