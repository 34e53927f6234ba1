"""Films of mixed and variable frame rates: --fps takes them by their time stamps; without it, a mix is told."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import fails
from films import numbers, ramp, write_folder

from walt.cli import main, parse
from walt.data.clips import ClipStore
from walt.data.prepare import prepare
from walt.data.video import _timed, frame_timing, iterate_video, resample, write_mp4
from walt.errors import WaltError
from walt.settings import DataConfig, load_settings
from walt.train.run import open_data

av = pytest.importorskip("av", reason="PyAV is not installed")

NTSC = Fraction(30000, 1001)


def write_timed(path, times, *, codec="libx264", unit=Fraction(1, 90000), options=None, first=10, step=6):
    """A ramp whose frame i is shown from times[i] on, in seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options=options or {})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = unit
        for time, picture in zip(times, ramp(len(times), first=first, step=step), strict=True):
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts, frame.time_base = round(time / unit), unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def taken(path, fps: float, **spread) -> list[int]:
    """The numbers of the frames that are taken."""
    return numbers(np.stack(list(iterate_video(path, fps))), **spread).tolist()


def nearest(times, fps: float, length: float) -> list[int]:
    """By the definition: of each instant until the end, rounded; of two as near, the earlier."""
    instants = [times[0] + k / Fraction(fps) for k in range(max(1, int(length * fps + Fraction(1, 2))))]
    return [min(range(len(times)), key=lambda i: (abs(times[i] - instant), i)) for instant in instants]


@pytest.mark.parametrize("fps", [12, 24, 8, 48, 10, 23.976, 1, 0.1])
def test_an_even_film(tmp_path, fps):
    write_mp4(tmp_path / "a.mp4", ramp(24), fps=24)
    times = [Fraction(i, 24) for i in range(24)]
    assert taken(tmp_path / "a.mp4", fps) == nearest(times, fps, 1)
    if fps in (12, 24, 8):
        assert taken(tmp_path / "a.mp4", fps) == list(range(0, 24, round(24 / fps)))


UNEVEN = [Fraction(i, 24) for i in (0, 1, 2, 3, 4, 7, 12, 13, 14, 29, 30, 31)]


@pytest.mark.parametrize("start", [0, 3, 1000])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.webm"])
def test_a_film_of_variable_rate(tmp_path, name, start):
    times = [start + time for time in UNEVEN]
    write_timed(tmp_path / name, times, codec="libvpx" if name == "a.webm" else "libx264")
    made = taken(tmp_path / name, 24)
    expected = nearest(times, 24, Fraction(32, 24))
    assert made[: len(expected)] == expected
    assert set(made[len(expected) :]) <= {11}  # how long the last frame is shown, not every container tells
    assert frame_timing(tmp_path / name)[1]
    assert numbers(np.stack(list(iterate_video(tmp_path / name)))).tolist() == list(range(12))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_frames_in_another_order_than_coded(tmp_path, name):
    options = {"bf": "2", "qmin": "1", "qmax": "2"}
    write_timed(tmp_path / name, UNEVEN, codec="mpeg4", unit=Fraction(1, 24), options=options)
    with av.open(str(tmp_path / name)) as container:
        stamps = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    assert stamps != sorted(stamps)
    assert taken(tmp_path / name, 24)[:32] == nearest(UNEVEN, 24, Fraction(32, 24))
    assert frame_timing(tmp_path / name)[1]


def test_no_time_stamps(tmp_path):
    """A bare stream has none, and 25 frames a second by convention."""
    with av.open(str(tmp_path / "a.h264"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for picture in ramp(24):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    path = (tmp_path / "a.h264").rename(tmp_path / "a.mp4")
    with av.open(str(path)) as container:
        assert {frame.pts for frame in container.decode(video=0)} == {None}
    assert taken(path, 12.5) == list(range(0, 24, 2))
    assert taken(path, 25) == list(range(24))
    assert not frame_timing(path)[1]


def test_some_time_stamps_missing_or_wrong():
    stream = SimpleNamespace(time_base=Fraction(1, 100), average_rate=Fraction(10))
    stamps = [(None, None), (10, 3), (None, 20), (None, None), (35, 30), (35, 40), (7, None), (60, None)]
    frames = [SimpleNamespace(pts=pts, dts=dts, duration=0) for pts, dts in stamps]
    frames[4].duration = 4
    times = [(float(begin), float(end)) for begin, end, _ in _timed(frames, stream)]
    assert [begin for begin, _ in times] == [0, 0.1, 0.2, 0.3, 0.35, 0.45, 0.55, 0.6]
    assert [round(end - begin, 9) for begin, end in times] == [0.1, 0.1, 0.1, 0.1, 0.04, 0.1, 0.1, 0.1]


def test_time_stamps_that_begin_again(tmp_path):
    """Two films in one stream: the second goes on where the first ended."""
    for name, first in (("a.ts", 10), ("b.ts", 10 + 6 * 12)):
        write_timed(tmp_path / name, [i / 24 for i in range(12)], first=first)
    (tmp_path / "ab.mpg").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    every = numbers(np.stack(list(iterate_video(tmp_path / "ab.mpg")))).tolist()
    made = taken(tmp_path / "ab.mpg", 24)
    assert len(every) >= 22
    assert abs(len(made) - len(every)) <= 2
    assert set(made) == set(every)


def test_a_rate_of_ntsc(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=NTSC)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for picture in ramp(40, step=5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    for fps in (30, float(NTSC), 29.97):
        assert taken(tmp_path / "a.mp4", fps, step=5) == list(range(40))
    assert taken(tmp_path / "a.mp4", 15, step=5) == nearest([i / NTSC for i in range(40)], 15, 40 / NTSC)


def test_milliseconds_round_no_frame_away(tmp_path):
    """Matroska and WebM round 1/30 s to 33 and 34 ms."""
    write_timed(tmp_path / "a.mkv", [i / 30 for i in range(40)], unit=Fraction(1, 1000), step=5)
    assert taken(tmp_path / "a.mkv", 30, step=5) == list(range(40))
    assert not frame_timing(tmp_path / "a.mkv")[1]


def test_resample():
    def film(*times, last=1):
        ends = [*times[1:], times[-1] + last] if times else []
        return [(Fraction(a), Fraction(b), i) for i, (a, b) in enumerate(zip(times, ends, strict=True))]

    assert list(resample(film(), 10)) == []
    assert list(resample(film(5), 1)) == [0]
    assert list(resample(film(5), 0.01)) == [0]  # at least one
    assert list(resample(film(5), 3)) == [0, 0, 0]
    assert list(resample(film(0, 2, 4, last=2), 1)) == [0, 0, 1, 1, 2, 2]  # of two as near, the earlier
    assert list(resample(film(0, 10, 11), 1)) == [0] * 6 + [1] * 5 + [2]


@pytest.mark.parametrize("jump", [61, 3600, 20_000])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_jump_of_time(tmp_path, name, jump):
    """Would fill the disk with copies of one frame."""
    (tmp_path / "films").mkdir()
    write_mp4(tmp_path / "films/b.mp4", ramp(24), fps=24)
    times = [Fraction(i, 24) + (jump if i >= 12 else 0) for i in range(24)]
    write_timed(tmp_path / "films" / name, times, unit=Fraction(1, 1000) if name == "a.mkv" else Fraction(1, 90000))
    message = rf"films/{name}: frames 11 and 12 are {jump}.* s apart, expected 60 s at most; cut the film there"
    with pytest.raises(WaltError, match=message):
        list(iterate_video(tmp_path / "films" / name, 24))
    store, lines = made(tmp_path / "films", tmp_path / "prepared", fps=24)
    assert [(item.name, item.frames) for item in store.items] == [("b.mp4", 24)]
    assert len(lines) == 1
    assert re.match(
        r"passed over, frames 11 and 12 are .* s apart, expected 60 s at most; cut the film there: 1 ", lines[0]
    )
    assert len(made(tmp_path / "films", tmp_path / "every")[0].items) == 2


def test_frames_that_stand_still():
    """A minute at most, the last frame too."""

    def film(*times, last):
        return [(Fraction(a), Fraction(b), i) for i, (a, b) in enumerate(pairwise([*times, times[-1] + last]))]

    assert list(resample(film(0, 60, last=60), 0.1)) == [0] * 4 + [1] * 8
    with pytest.raises(
        WaltError, match=r"a film: frames 0 and 1 are 60\.5 s apart, expected 60 s at most; cut the film"
    ):
        list(resample(film(0, 60.5, last=1), 1, "a film"))
    with pytest.raises(WaltError, match="the film: its last frame, 1, is shown for 3600 s, expected 60 s at most"):
        list(resample(film(0, 1, last=3600), 1))


@pytest.mark.parametrize("fps", [-1, 0.0001, 1001, 1e9, float("nan"), float("inf"), True, "24"])
def test_one_range_of_rates(tmp_path, capsys, fps):
    message = f"fps: got {fps}; expected 0.001 to 1000 frames a second, or 0 for every frame"
    with pytest.raises(ValueError, match=message):
        made(tmp_path, tmp_path / "prepared", fps=fps)
    with pytest.raises(ValueError, match=message):
        DataConfig(fps=fps)
    if fps not in (True, "24"):
        for command in (("prepare", "--data"), ("train", "base", "--data")):
            line = fails(capsys, *command, tmp_path, "--out", tmp_path / "out", "--fps", fps)
            expected = message.partition(";")[2] if "train" in command else " must be from 0.001 to 1000"
            assert "fps: " in line
            assert expected in line
        with pytest.raises(WaltError, match=r"expected 0\.001 to 1000 frames a second"):
            write_mp4(tmp_path / "a.mp4", ramp(2), fps=fps)


def test_rates_as_fractions(tmp_path):
    """By all commands alike; and 29.97 is another rate than 30000/1001."""
    write_mp4(tmp_path / "films/a.mp4", ramp(24), fps=24)
    assert (
        main(["prepare", "--data", str(tmp_path / "films"), "--out", str(tmp_path / "a"), "--fps", "30000/1001"]) == 0
    )
    assert ClipStore.open(tmp_path / "a").settings.fps == float(NTSC)
    train = parse("train", ["base", "--data", "a", "--out", "b", "--fps", "24000/1001"])
    assert train.settings.data.fps == 24000 / 1001
    for fps in (29.97, float(NTSC)):
        wanted = load_settings("base", overrides={"data.height": 16, "data.width": 16, "data.fps": fps})
        assert open_data(tmp_path / "films", tmp_path / "run", wanted).settings.fps == fps


@pytest.fixture
def mixed(tmp_path):
    """Films of 12, 25, 24 and 23.976 frames a second, one of variable rate, and images."""
    folder = write_folder(tmp_path / "films")
    write_mp4(folder / "cats/24.mp4", ramp(24), fps=24)
    write_mp4(folder / "dogs/24.mp4", ramp(24), fps=Fraction(24000, 1001))
    write_timed(folder / "dogs/uneven.mp4", UNEVEN)
    return folder


def made(folder, out, **options) -> tuple[ClipStore, list[str]]:
    lines: list[str] = []
    return prepare(folder, out, height=16, width=16, progress=False, say=lines.append, **options), lines


def test_a_mix_is_told(mixed, tmp_path):
    lines = made(mixed, tmp_path / "prepared")[1]
    assert lines == [
        "frames a second differ, and clips take frame after frame (--fps N takes them by time):"
        " variable: 1 (dogs/uneven.mp4); 12: 1 (cats/one.mp4); 23.98: 2 (cats/24.mp4, dogs/24.mp4);"
        " 25: 1 (dogs/two.mp4)"
    ]
    assert made(mixed, tmp_path / "prepared")[1] == lines  # by what is known of the films, too
    for name in ("dogs/uneven.mp4", "cats/one.mp4", "dogs/two.mp4"):
        (mixed / name).unlink()
    (line,) = made(mixed, tmp_path / "prepared")[1]
    assert line.endswith("since it was prepared: 3 files fewer: cats/one.mp4, dogs/two.mp4, dogs/uneven.mp4")
    write_timed(mixed / "cats/uneven.mp4", UNEVEN)
    for i in range(11):
        (mixed / f"cats/like-{i:02}.mp4").write_bytes((mixed / "cats/uneven.mp4").read_bytes())
    changed, line = made(mixed, tmp_path / "prepared")[1]
    assert "12 files more: " in changed
    assert "variable: 12 (cats/like-00.mp4, " in line
    assert "cats/like-09.mp4 and 2 more); 23.98: 2 (" in line


def test_a_rate_above_that_of_films_is_told(mixed, tmp_path):
    """Their frames are repeated. Within 1% a rate is the same."""
    repeated = "frames are repeated in films of fewer than {} a second: "
    for fps, films in (
        (9.05, ""),
        (12.1, "1 (dogs/uneven.mp4)"),
        (23, "2 (cats/one.mp4, dogs/uneven.mp4)"),
        (24, "2 (cats/one.mp4, dogs/uneven.mp4)"),
    ):
        lines = made(mixed, tmp_path / f"prepared-{fps}", fps=fps)[1]
        assert lines == ([repeated.format(f"{fps:g}") + films] if films else [])
    (line,) = made(mixed, tmp_path / "prepared", fps=60)[1]
    assert line.startswith(repeated.format(60) + "5 (cats/24.mp4, cats/one.mp4, ")
    assert made(mixed, tmp_path / "prepared", fps=60)[1] == [line]


def test_prepared_folders_are_told_too(mixed, tmp_path, capsys):
    """By every training, as for folders that are not prepared."""
    settings = load_settings("base", overrides={"data.height": 16, "data.width": 16})
    for fps in (0, 60):
        lines = made(mixed, tmp_path / f"{fps}", fps=fps)[1]
        capsys.readouterr()
        open_data(tmp_path / f"{fps}", tmp_path / "run", settings)
        assert capsys.readouterr().err.splitlines() == lines
        assert len(lines) == 1


def test_a_film_of_one_frame_has_no_rate(tmp_path):
    write_mp4(tmp_path / "films/a.mp4", ramp(24), fps=24)
    write_mp4(tmp_path / "films/b.mp4", ramp(1), fps=5)
    assert made(tmp_path / "films", tmp_path / "prepared")[1] == []
    assert made(tmp_path / "films", tmp_path / "24", fps=24)[1] == [
        "frames are repeated in films of fewer than 24 a second: 1 (b.mp4)"  # its fifth of a second is filled
    ]


def test_one_rate_for_all(mixed, tmp_path):
    store, lines = made(mixed, tmp_path / "prepared", fps=12)
    assert lines == ["frames are repeated in films of fewer than 12 a second: 1 (dogs/uneven.mp4)"]
    assert set(store.fps) == {0, 12}
    films = {item.name: item for item in store.items if item.kind == "video"}
    assert (films["cats/24.mp4"].fps, films["dogs/two.mp4"].fps) == (24, 25)  # their own
    assert [name for name, item in films.items() if item.variable] == ["dogs/uneven.mp4"]
    frames = {"cats/24.mp4": 12, "cats/one.mp4": 12, "dogs/24.mp4": 12, "dogs/two.mp4": 3, "dogs/uneven.mp4": 16}
    assert {name: item.frames for name, item in films.items()} == frames
    index = [item.name for item in store.items].index("dogs/24.mp4")
    assert numbers(store.read(np.array([[index, 0]]), 12)[0]).tolist() == list(range(0, 24, 2))
    with pytest.raises(
        WaltError, match=r"with height 16, width 16, shots on, 12 frames a second, not with height 16, "
    ):
        made(mixed, tmp_path / "prepared")
    with pytest.raises(ValueError, match=r"fps: got -1; expected 0\.001 to 1000 frames a second, or 0 for every frame"):
        made(mixed, tmp_path / "prepared", fps=-1)


def test_the_rate_of_training(mixed, tmp_path):
    size = {"data.height": 16, "data.width": 16}
    wanted = load_settings("base", overrides={**size, "data.fps": 6})
    assert open_data(mixed, tmp_path / "run", wanted).fps.max() == 6
    assert (tmp_path / "run/data-16x16-6fps").is_dir()
    made(mixed, tmp_path / "every")
    made(mixed, tmp_path / "six", fps=6)
    assert open_data(tmp_path / "six", tmp_path / "run", wanted).fps.max() == 6
    assert open_data(tmp_path / "six", tmp_path / "run", load_settings("base", overrides=size)).fps.max() == 6
    with pytest.raises(
        WaltError, match="was prepared with every frame; 6 a second are wanted: prepare it with --fps 6"
    ):
        open_data(tmp_path / "every", tmp_path / "run", wanted)
    other = load_settings("base", overrides={**size, "data.fps": 29.97})
    with pytest.raises(WaltError, match=r"was prepared at 6 frames a second; 29\.97 a second are wanted"):
        open_data(tmp_path / "six", tmp_path / "run", other)
    for bad in (-1, True, "fast", "24000/0"):
        with pytest.raises(WaltError, match=r"fps"):
            load_settings("base", overrides={"data.fps": bad})
