"""walt.data.simulator: the same clips for the same seed, and nothing held out that was trained on."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from walt.data.captions import read_captions
from walt.data.clips import Clip
from walt.data.simulator import (
    FILM_CAPTION,
    SCENARIOS,
    demo_clips,
    film_path,
    random_film_clips,
    render_clips,
    write_demo_folder,
)
from walt.data.video import read_video, write_mp4
from walt.errors import WaltError


@pytest.fixture
def film():
    pytest.importorskip("av", reason="PyAV is not installed")
    try:
        return film_path()
    except WaltError as error:
        pytest.skip(str(error))


@pytest.fixture
def simulator():
    pytest.importorskip("vizdoom", reason="ViZDoom is not installed")


def videos(clips: list[Clip]) -> np.ndarray:
    return np.stack([clip.video for clip in clips])


def classes(clips: list[Clip]) -> list[str]:
    return [clip.name.partition("/")[0] for clip in clips]


def moves_along(video: np.ndarray, shift: int) -> bool:
    """Whether what is in the picture goes right (1) or left (-1)."""
    assert video.shape == (5, 64, 64, 3)
    video = video.astype(float)
    along, against = (
        np.abs(np.roll(video[:-1], 5 * s, axis=2) - video[1:])[:, :40, 10:54].mean() for s in (shift, -shift)
    )
    return bool(along < 0.8 * against)


@pytest.mark.usefixtures("simulator")
class TestSimulator:
    def test_same_seed_same_clips(self):
        first = render_clips(["basic", "my_way_home"], range(2), frames=5, size=32, seed=3, progress=False)
        again = render_clips(["basic", "my_way_home"], range(2), frames=5, size=32, seed=3, progress=False)
        assert np.array_equal(videos(first), videos(again))
        assert videos(first).shape == (4, 5, 32, 32, 3)
        assert classes(first) == ["basic", "basic", "my_way_home", "my_way_home"]
        other = render_clips(["basic", "my_way_home"], range(2), frames=5, size=32, seed=4, progress=False)
        assert not any(np.array_equal(a, b) for a, b in zip(videos(first), videos(other), strict=True))

    def test_an_episode_does_not_depend_on_those_before_it(self):
        several = render_clips(["defend_the_center"], range(3), frames=5, size=32, progress=False)
        alone = render_clips(["defend_the_center"], range(2, 3), frames=5, size=32, progress=False)
        assert np.array_equal(several[2][1], alone[0][1])
        assert several[2][0] == alone[0][0] == "defend_the_center/episode-2"

    def test_clips_move(self):
        clips = render_clips(["basic", "take_cover"], range(3), frames=9, size=32, progress=False)
        change = np.abs(np.diff(videos(clips).astype(int), axis=1)).mean(axis=(1, 2, 3, 4))
        assert (change > 0.5).all()

    def test_leaves_no_files_and_the_same_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        render_clips(["basic"], range(1), frames=5, size=32, progress=False)
        assert os.listdir(tmp_path) == []
        assert os.getcwd() == str(tmp_path)

    def test_unknown_scenario(self):
        with pytest.raises(WaltError, match="unknown scenario 'chess'"):
            render_clips(["chess"], range(1), progress=False)

    def test_demo_split_shares_nothing(self, film):
        train, test = demo_clips(3, 2, scenarios=("basic", "take_cover"), frames=5, size=32, seed=0)
        names = ("basic", "take_cover", "big_buck_bunny")
        assert not {clip.name for clip in train} & {clip.name for clip in test}
        assert classes(train) == [name for name in names for _ in range(3)]
        assert classes(test) == [name for name in names for _ in range(2)]
        assert [clip.name for clip in test[:2]] == ["basic/episode-300", "basic/episode-301"]  # not tiny-doom's either
        for clip in videos(test):
            assert not (clip == videos(train)).all(axis=(1, 2, 3, 4)).any()

    def test_captions_of_the_demo_say_what_is_played(self, film):
        train, test = demo_clips(6, 1, scenarios=("defend_the_line",), frames=5, size=64, seed=0)
        captions = ["walking in a grey hall", "turning left in a grey hall", "turning right in a grey hall"] * 2
        assert [clip.caption for clip in train] == [*captions, *[FILM_CAPTION] * 6]
        assert [clip.caption for clip in test] == [None, None]
        assert moves_along(train[1].video, 1)
        assert moves_along(train[2].video, -1)


def test_demo_folder(tmp_path, monkeypatch):
    pytest.importorskip("vizdoom", reason="ViZDoom is not installed")
    pytest.importorskip("av", reason="PyAV is not installed")
    monkeypatch.chdir(tmp_path)
    write_demo_folder("videos", clips_per_class=2, frames=5, size=64, progress=False)
    captions = read_captions(tmp_path / "videos/captions.jsonl")
    assert sorted(captions) == sorted(path.relative_to("videos").as_posix() for path in Path("videos").rglob("*.mp4"))
    assert len(captions) == 2 * len(SCENARIOS)
    assert captions["health_gathering/turning-left-0000.mp4"] == "turning left on a green field"
    assert captions["health_gathering/turning-right-0001.mp4"] == "turning right on a green field"
    assert sorted(path.name for path in Path("videos").iterdir()) == sorted([*SCENARIOS, "captions.jsonl"])
    # The view moves against the player: turned left, what is in the picture goes right.
    for name, shift in (("turning-left-0000", 1), ("turning-right-0001", -1)):
        assert moves_along(read_video(f"videos/defend_the_line/{name}.mp4"), shift)
    with pytest.raises(ValueError, match="frames: got 1; expected an int >= 2"):
        write_demo_folder("none", clips_per_class=2, frames=1)
    with pytest.raises(WaltError, match="videos is there already; name another folder"):
        write_demo_folder("videos", clips_per_class=1, progress=False)


def test_film_clips_stay_in_their_span(tmp_path):
    pytest.importorskip("av", reason="PyAV is not installed")
    brightness = np.arange(10, 250, 6, dtype=np.uint8)  # frame i is all 10 + 6 i
    write_mp4(tmp_path / "ramp.mp4", np.broadcast_to(brightness[:, None, None, None], (40, 48, 64, 3)).copy())
    clips = random_film_clips(tmp_path / "ramp.mp4", (20, 32), 12, name="ramp", frames=5, size=16)
    index = (videos(clips).mean(axis=(2, 3, 4)) - 10) / 6
    assert np.abs(index - index.round()).max() < 0.4
    assert index.round().min() >= 20
    assert index.round().max() <= 31
    assert (np.diff(index.round(), axis=1) == 1).all()
    assert len(set(index[:, 0].round())) > 3
    assert [clip.name for clip in clips] == [f"ramp/frames-20-31-clip-{number}" for number in range(12)]


def test_the_film(film):
    whole = read_video(film)
    assert whole.shape == (132, 720, 1280, 3)
    clips = random_film_clips(film, (100, 132), 3, frames=17, size=32)
    assert videos(clips).shape == (3, 17, 32, 32, 3)
    assert np.array_equal(videos(clips), videos(random_film_clips(film, (100, 132), 3, frames=17, size=32)))


def test_film_span_too_short(film):
    with pytest.raises(WaltError, match="frames 0 to 9 cannot hold a clip of 17 frames"):
        random_film_clips(film, (0, 10), 1)
