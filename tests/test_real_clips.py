"""walt.evaluate.real_clips: the clips that are asked for, and no more decoded than they take."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from films import noise, numbers, ramp

from walt.data.prepare import prepare
from walt.data.video import iterate_video, write_mp4, write_png
from walt.errors import WaltError
from walt.evaluate import real_clips as module
from walt.evaluate.real_clips import film_clips, real_clips

pytest.importorskip("av", reason="PyAV is not installed")

AHEAD = 8  # frames that tell whether there is a cut before them


@pytest.fixture(autouse=True)
def model(tmp_path, monkeypatch):
    """A folder that is never looked into: what it was trained on is said here."""
    clip = {"frames": 5, "height": 16, "width": 16, "fps": 12.0}
    monkeypatch.setattr(module, "trained_on", lambda _: (clip, {}))
    return tmp_path / "model"


@pytest.fixture
def decoded(monkeypatch) -> Counter:
    """Frames that are decoded, by the name of the file."""
    count: Counter = Counter()

    def iterate(path, *rate):
        for frame in iterate_video(path, *rate):
            count[path.name] += 1
            yield frame

    monkeypatch.setattr(module, "iterate_video", iterate)
    return count


def write(folder, films: int, frames: int = 14):
    """Film i lies in class i % 2 and begins with brightness 5 * i."""
    for i in range(films):
        write_mp4(folder / f"{'ab'[i % 2]}/{i:02}.mp4", ramp(frames, 16, 16, first=5 * i))
    return folder


def test_of_a_folder_only_the_clips_that_are_asked_for(tmp_path, model, decoded):
    source = write(tmp_path / "films", 20)
    (source / "captions.jsonl").write_text('{"file": "b/01.mp4", "caption": "a ramp"}\n')
    clips, labels, captions = real_clips(source, 4, 5, (16, 16), model)
    assert clips.shape == (4, 5, 16, 16, 3)
    assert len(decoded) == 4
    assert set(decoded.values()) == {5 + AHEAD}
    assert not model.exists()
    # They are spread over the folder, in its order: a has films 0, 2 .. 18, b films 1, 3 .. 19.
    films = [round(clip[0].mean() / 5) for clip in clips]
    places = [film // 2 + 10 * (film % 2) for film in films]
    assert places == sorted(places)
    assert np.diff([*places, 20 + places[0]]).max() <= 8
    assert labels == ["ab"[film % 2] for film in films]
    assert captions == ["a ramp" if film == 1 else "" for film in films]
    for clip, film in zip(clips, films, strict=True):
        assert numbers(clip, 5 * film).tolist() == [0, 1, 2, 3, 4]


def test_more_clips_than_films(tmp_path, model, decoded):
    source = write(tmp_path / "films", 2, 30)
    write_mp4(source / "short.mp4", ramp(7, 16, 16))
    clips, labels, _ = real_clips(source, 8, 5, (16, 16), model)
    assert len(clips) == 8
    assert sorted(Counter(labels).values()) == [1, 3, 4]
    assert decoded["short.mp4"] == 7
    everything, _, _ = real_clips(source, 1000, 5, (16, 16), model)
    prepared = prepare(source, tmp_path / "prepared", height=16, width=16, progress=False)
    assert np.array_equal(everything, prepared.read(prepared.windows(5, hop=5), 5))
    assert len(everything) == 13


@pytest.mark.parametrize(("frames", "stride"), [(5, 1), (5, 2), (1, 1), (3, 4), (9, 1)])
def test_clips_are_those_of_a_prepared_folder(tmp_path, frames, stride):
    """Also where cuts are, and at another size than the film's."""
    shots = [noise(length, seed) for seed, length in enumerate((13, 4, 20, 6, 11, 30))]
    write_mp4(tmp_path / "films/film.mp4", np.concatenate(shots))
    store = prepare(tmp_path / "films", tmp_path / "prepared", height=24, width=24, progress=False)
    assert len(store.items[0].shots) == 6
    rows = store.windows(frames, stride=stride, hop=frames * stride)
    clips = list(film_clips(tmp_path / "films/film.mp4", frames, (24, 24), stride=stride))
    assert len(clips) == len(rows)
    assert np.array_equal(np.stack(clips), store.read(rows, frames, stride=stride))


def test_of_one_long_film(tmp_path, model, decoded):
    write_mp4(tmp_path / "film.mp4", ramp(60, 16, 16, step=4))
    clips, labels, captions = real_clips(tmp_path / "film.mp4", 3, 5, (16, 16), model)
    assert (labels, captions) == ([], [])
    assert numbers(clips, step=4).tolist() == [list(range(5 * i, 5 * i + 5)) for i in range(3)]
    assert decoded["film.mp4"] == 15


def test_what_cannot_be_used_is_replaced_and_told(tmp_path, model, capsys):
    source = write(tmp_path / "films", 3)
    (source / "broken.mp4").write_bytes(b"This is a text.\n" * 100)
    write_mp4(source / "short.mp4", ramp(3, 16, 16))
    write_png(source / "a/picture.png", np.zeros((16, 16, 3), np.uint8))
    clips, _, _ = real_clips(source, 5, 5, (16, 16), model)
    assert len(clips) == 5
    told = capsys.readouterr().err
    assert (
        "passed over, not a video that can be decoded: Invalid data found when processing input: 1 (broken.mp4)" in told
    )
    assert "passed over, no shot of 5 frames: 1 (short.mp4)" in told
    assert "unknown ending" not in told


def test_bad_folders(tmp_path, model):
    source = write(tmp_path / "films", 2, 4)
    with pytest.raises(WaltError, match="holds no clip of 5 frames"):
        real_clips(source, 2, 5, (16, 16), model)
    with pytest.raises(WaltError, match="no such folder"):
        real_clips(tmp_path / "nowhere", 2, 5, (16, 16), model)
    (source / "captions.jsonl").write_text(json.dumps({"file": "none.mp4", "caption": "x"}))
    with pytest.raises(WaltError, match="none of the 1 captions names a file"):
        real_clips(source, 2, 4, (16, 16), model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WaltError, match="empty holds no clip of 5 frames"):
        real_clips(tmp_path / "empty", 2, 5, (16, 16), model)


def test_another_rate_is_told(tmp_path, model, capsys):
    real_clips(write(tmp_path / "films", 2), 2, 5, (16, 16), model)
    assert "frames a second" not in capsys.readouterr().err
    for i in range(3):
        write_mp4(tmp_path / f"fast/{i}.mp4", ramp(9, 16, 16), fps=24)
    real_clips(tmp_path / "fast", 2, 5, (16, 16), model)
    assert "clips of 24 frames a second, but those of" in capsys.readouterr().err
