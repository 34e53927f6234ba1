"""A path is a path: no name of a file or folder is taken for a URL, a pattern, or another file."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
from command_line import fails
from films import numbers, ramp

from walt.cli import main
from walt.data.prepare import prepare
from walt.data.video import frame_rate, read_image, read_video, write_mp4, write_png, write_video
from walt.errors import WaltError

pytest.importorskip("av", reason="PyAV is not installed")
pytest.importorskip("PIL", reason="Pillow is not installed")

NAMES = (
    "12:30",
    "file:x",
    "concat:a|b",
    "pipe:0",
    "http:x",
    "data:,x",
    "%03d",
    "-",
    "-x",
    "[a]*?",
    " a ",
    "'\"\\",
    "é\n",
)
NAMES += ("caf\udce9", "x" * 251)  # bytes that are no UTF-8; as long as names may be


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Names as the user types them, relative to a folder in which other files might be meant."""
    monkeypatch.chdir(tmp_path)
    for name in ("x.mp4", "a.mp4", "001.mp4"):
        write_mp4(name, ramp(2))


@pytest.mark.parametrize("name", NAMES)
def test_files(name):
    write_mp4(f"{name}.mp4", ramp(7), fps=25)
    assert numbers(read_video(f"{name}.mp4")).tolist() == list(range(7))
    assert frame_rate(f"{name}.mp4") == 25
    write_video(f"{name}.gif", ramp(4))
    assert len(read_video(f"{name}.gif")) == 4
    write_png(f"{name}.png", ramp(1)[0])
    assert np.array_equal(read_image(f"{name}.png"), ramp(1)[0])
    expected = {"x.mp4", "a.mp4", "001.mp4", f"{name}.mp4", f"{name}.gif", f"{name}.png"}
    assert set(os.listdir()) == expected
    assert len(read_video("x.mp4")) == 2


def test_folders():
    for name in NAMES:
        write_mp4(f"data/{name}/{name}.mp4", ramp(5))
    lines: list[str] = []
    store = prepare("data", "12:30", height=16, width=16, progress=False, say=lines.append)
    assert lines == []
    assert set(store.classes) == set(NAMES)
    assert [item.frames for item in store.items] == [5] * len(NAMES)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_captions_of_names_that_are_almost_alike(tmp_path):
    """A name on the disk is that name; in a caption's, spaces around it and backslashes are how people type."""
    for name in ("a.mp4", " a.mp4", "b/a.mp4", "b\\a.mp4", "c/a.mp4"):
        write_mp4("x.mp4", ramp(5))
        os.makedirs(os.path.dirname(f"data/{name}"), exist_ok=True)
        os.replace("x.mp4", f"data/{name}")
    rows = ("a.mp4", "one"), ("b\\a.mp4", "two"), (" c/a.mp4", "three")
    with open("c.jsonl", "w") as file:
        file.writelines(json.dumps({"file": name, "caption": text}) + "\n" for name, text in rows)
    lines: list[str] = []
    store = prepare("data", "out", captions="c.jsonl", height=16, width=16, progress=False, say=lines.append)
    captions = {item.name: item.caption for item in store.items}
    assert captions == {"a.mp4": "one", "b/a.mp4": "two", "c/a.mp4": "three", " a.mp4": None, "b\\a.mp4": None}
    assert lines[-1] == "2 files without a caption:  a.mp4, b\\a.mp4"


def test_names_on_the_terminal(capsys):
    """Those that it cannot show are escaped."""
    write_mp4("data/caf\udce9/a.mp4", ramp(5))
    assert main(["prepare", "--data", "data", "--out", "12:30 \udce9", "--size", "16"]) == 0
    assert capsys.readouterr().out.startswith("12:30 \\udce9: 1 videos with 1 shots")
    assert "no such folder: file:data" in fails(capsys, "prepare", "--data", "file:data", "--out", "out")


@pytest.mark.parametrize("content", ["ffconcat version 1.0\nfile a.mp4\n", "#EXTM3U\n#EXTINF:1,\na.mp4\n"])
def test_content_that_names_another_file(content):
    """Is not followed."""
    with open("list.mp4", "w") as file:
        file.write(content)
    with pytest.raises(WaltError, match=r"list\.mp4 is not a video that can be decoded"):
        read_video("list.mp4")


def test_writing_that_fails(monkeypatch):
    def full(file, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.open", lambda path, mode: type("Full", (io.FileIO,), {"write": full})(path, mode))
    with pytest.raises(WaltError, match=r"cannot write b\.mp4: No space left on device"):
        write_mp4("b.mp4", ramp(60))
    assert not os.path.exists("b.mp4")
