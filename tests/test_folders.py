"""walt.data.folders: which files of a folder are data, and that nothing else goes without a word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command_line import fails

from walt.data.folders import LEFT, PassedOver, find_files
from walt.errors import WaltError
from walt.evaluate import real_clips
from walt.settings import load_settings
from walt.train.run import captions_of, open_data

HIDDEN = "hidden or left by other software"
LINK = "link that cannot be followed"
AGAIN = "folder that is read already"


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def find(folder: Path, **options) -> tuple[list[str], dict[str, list[str]]]:
    names, passed = find_files(folder, (".mp4", ".png"), **options)
    return names, passed.names


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".Trash-1000", ".git", "__MACOSX", "@eaDir", *sorted(LEFT)])
def test_what_other_software_leaves(tmp_path, name):
    write(tmp_path, "a/x.mp4", f"{name}/x.mp4", f"a/{name}/b/x.mp4")
    assert find(tmp_path) == (["a/x.mp4"], {HIDDEN: [name, f"a/{name}"]})


def test_files_that_other_software_leaves(tmp_path):
    write(tmp_path, "a/x.mp4", "a/._x.mp4", "a/.DS_Store", "Thumbs.db")
    assert find(tmp_path) == (["a/x.mp4"], {HIDDEN: ["Thumbs.db", "a/.DS_Store", "a/._x.mp4"]})


def test_what_only_looks_like_it(tmp_path):
    """Accounts, tags and underscores are classes; a hidden folder that is asked for by name is data."""
    names = ["#cats/x.mp4", "@user/x.mp4", "__init/x.mp4", "a.b/x.MP4"]
    write(tmp_path / ".hidden", *names)
    assert find(tmp_path / ".hidden") == (names, {})


def test_links_are_followed(tmp_path):
    write(tmp_path / "clips", "a/x.mp4", "b/y.mp4")
    (tmp_path / "s").mkdir()
    (tmp_path / "s/b").symlink_to("../clips/b")
    (tmp_path / "s/z.mp4").symlink_to("../clips/a/x.mp4")
    assert find(tmp_path / "s") == (["b/y.mp4", "z.mp4"], {})
    (tmp_path / "t").symlink_to("s")
    assert find(tmp_path / "t") == (["b/y.mp4", "z.mp4"], {})


def test_links_in_circles(tmp_path):
    write(tmp_path / "s", "a/x.mp4", "b/y.mp4")
    for place, target in {"a/up": "..", "a/self": ".", "a/out": tmp_path, "b/a": "../a", "a/b": "../b"}.items():
        (tmp_path / "s" / place).symlink_to(target)
    names, passed = find(tmp_path / "s")
    assert names == ["a/x.mp4", "b/y.mp4"]
    assert {reason: sorted(names) for reason, names in passed.items()} == {
        AGAIN: ["a/b", "a/out", "a/self", "a/up", "b/a"]
    }


def test_links_to_one_folder(tmp_path):
    """It is read once, where it is rather than where a link is."""
    write(tmp_path / "s", "z/x.mp4")
    write(tmp_path / "other", "y.mp4")
    (tmp_path / "s/a").symlink_to("z")
    (tmp_path / "s/b").symlink_to("../other")
    (tmp_path / "s/c").symlink_to("../other")
    assert find(tmp_path / "s") == (["b/y.mp4", "z/x.mp4"], {AGAIN: ["a", "c"]})


def test_links_that_lead_nowhere(tmp_path):
    write(tmp_path, "x.mp4")
    (tmp_path / "a").symlink_to("gone")
    (tmp_path / "b.mp4").symlink_to("b.mp4")
    assert find(tmp_path) == (["x.mp4"], {LINK: ["a", "b.mp4"]})


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    write(tmp_path, "a/x.mp4", "b/y.mp4")
    iterdir = Path.iterdir

    def refuse(path):
        if path.name == "b":
            raise PermissionError(13, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert find(tmp_path) == (["a/x.mp4"], {"folder that cannot be read: Permission denied": ["b"]})
    with pytest.raises(WaltError, match=r"cannot read .*b: Permission denied"):
        find(tmp_path / "b")


@pytest.mark.parametrize("name", ["closed", "closed/below", "closed/below/a.mp4"])
def test_data_that_cannot_be_looked_at(tmp_path, monkeypatch, capsys, name):
    """By no command that reads data."""
    write(tmp_path, "closed/below/a.mp4")
    stat = Path.stat

    def refuse(path, **options):
        if path.is_relative_to(tmp_path / "closed") and path != tmp_path / "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    monkeypatch.setattr(Path, "iterdir", lambda path: refuse(path / "any"))
    monkeypatch.setattr(real_clips, "trained_on", lambda model: ({"frames": 5, "fps": 0}, {}))
    data, out = tmp_path / name, tmp_path / "out"
    for read in (
        lambda: find(data),
        lambda: captions_of(data, None),
        lambda: open_data(data, out, load_settings("base")),
        lambda: real_clips.real_clips(data, 1, 5, (16, 16), tmp_path),
    ):
        with pytest.raises(WaltError, match=f"^cannot read {data}: Permission denied$"):
            read()
    assert fails(capsys, "prepare", "--data", data, "--out", out).endswith(f"cannot read {data}: Permission denied")


def test_other_endings_and_other_things(tmp_path):
    write(tmp_path, "a/x.mp4", "a/x.json", "a/notes", "a/y.MTS", "a/captions.csv")
    os.mkfifo(tmp_path / "pipe.mp4")
    assert find(tmp_path, ignore=[tmp_path / "a/../a/captions.csv"]) == (
        ["a/x.mp4"],
        {"unknown ending": ["a/notes", "a/x.json", "a/y.MTS"], "neither file nor folder": ["pipe.mp4"]},
    )
    assert find(tmp_path, ignore=[tmp_path / "a"])[0] == []


def test_lines():
    """Ten names a reason, and ten reasons."""
    passed = PassedOver()
    assert list(passed.lines()) == []
    for i in range(12):
        passed.add("empty", f"{i:02d}.mp4")
    passed.add("unknown ending", "a\nb")
    first = ", ".join(f"{i:02d}.mp4" for i in range(10))
    assert list(passed.lines()) == [
        f"passed over, empty: 12 ({first} and 2 more)",
        r"passed over, unknown ending: 1 ('a\nb')",
    ]
    for i in range(20):
        passed.add(f"odd in way {i}", f"odd-{i:02d}")
    lines = list(passed.lines())
    assert len(lines) == 10
    assert lines[-1].startswith("passed over, 13 other reasons: 13 (odd-07, odd-08,")
    assert len(passed) == 33
