"""A share of the files that training never sees: which they are, that they stay the same, and who reads them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from command_line import fails
from films import ramp
from tiny_runs import fit, moving

import walt.data.prepare
from walt.cli import main
from walt.data.clips import ClipStore
from walt.data.latents import LatentStore
from walt.data.prepare import prepare
from walt.data.video import write_mp4, write_png
from walt.errors import WaltError
from walt.train import tokenizer

pytest.importorskip("av", reason="PyAV is not installed")


def make(source, folder, **options) -> tuple[ClipStore, list[str]]:
    lines: list[str] = []
    options = {"height": 16, "width": 16, "progress": False, **options}
    return prepare(source, folder, say=lines.append, **options), lines


def held(store: ClipStore) -> set[str]:
    return {item.name for item in store.items if item.held_out}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """40 images and, in another class, 6 films of 9 frames."""
    folder = tmp_path_factory.mktemp("held") / "source"
    for i in range(40):
        write_png(folder / f"images/{i:02}.png", np.full((20, 20, 3), 6 * i, np.uint8))
    for i in range(6):
        write_mp4(folder / f"films/{i}.mp4", moving(i, 9, 32, 32), fps=8)
    return folder


class TestTheSplit:
    def test_a_share_of_the_files(self, source, tmp_path):
        store, lines = make(source, tmp_path / "a", held_out=0.3)
        names = held(store)
        assert 6 <= len(names) <= 22  # 46 fair draws of 0.3 leave this range in one of 5000 cases
        (line,) = lines
        assert line.startswith(f"held out: {len(names)} of 46 files (")
        index = json.loads((tmp_path / "a/index.json").read_text())
        assert index["held_out"] == 0.3
        assert {item["name"] for item in index["items"] if item["held_out"]} == names
        assert held(ClipStore.open(tmp_path / "a")) == names
        nothing, lines = make(source, tmp_path / "b")
        assert (held(nothing), lines) == (set(), [])
        assert nothing.fingerprint != store.fingerprint

    def test_it_stays_when_files_are_added_moved_and_renamed(self, source, tmp_path):
        before = held(make(source, tmp_path / "a", held_out=0.3)[0])
        shutil.copytree(source, tmp_path / "elsewhere")
        (tmp_path / "elsewhere/images").rename(tmp_path / "elsewhere/pictures")
        for i in range(30):
            write_png(tmp_path / f"elsewhere/more/{i}.png", np.full((10, 10, 3), 3 * i, np.uint8))
        after = held(make(tmp_path / "elsewhere", tmp_path / "b", held_out=0.3)[0])
        assert {name for name in after if "more/" not in name} == {n.replace("images/", "pictures/") for n in before}
        assert any("more/" in name for name in after)

    def test_a_larger_share_holds_the_smaller_one(self, source, tmp_path, monkeypatch):
        """It is marked anew; nothing is decoded again."""
        small, _ = make(source, tmp_path / "a", held_out=0.2)
        monkeypatch.setattr(walt.data.prepare, "iterate_video", None)
        monkeypatch.setattr(walt.data.prepare, "read_image", None)
        large, _ = make(source, tmp_path / "a", held_out=0.5)
        assert held(small) < held(large)
        again, _ = make(source, tmp_path / "a")  # no share: that of before
        assert held(again) == held(large)
        assert not held(make(source, tmp_path / "a", held_out=0.0)[0])

    @pytest.mark.parametrize("share", [-0.1, 1.0, float("nan"), True, "half"])
    def test_no_share(self, source, tmp_path, share):
        with pytest.raises(ValueError, match=r"held_out: got .*; expected a share from 0, below 1"):
            make(source, tmp_path / "a", held_out=share)

    def test_a_broken_index(self, source, tmp_path):
        make(source, tmp_path / "a")
        path = tmp_path / "a/index.json"
        index = json.loads(path.read_text())
        for change, message in (
            ({"held_out": 1}, "is broken: held_out: got 1"),
            ({"items": [{**index["items"][0], "held_out": "no"}]}, "the entry of 'films/0.mp4' is malformed"),
            ({"version": 2}, "has version 2; this walt reads version 3: delete that folder, or prepare into another"),
        ):
            path.write_text(json.dumps({**index, **change}))
            with pytest.raises(WaltError, match=message):
                ClipStore.open(tmp_path / "a")


def test_clips_and_images_of_each_part(source, tmp_path):
    store, _ = make(source, tmp_path / "a", held_out=0.3)
    everything, _ = make(source, tmp_path / "b")
    for rows in (lambda store, **part: store.windows(5, hop=2, **part), lambda store, **part: store.images(3, **part)):
        mine, others = rows(store), rows(store, held_out=True)
        assert not store.held_out[mine[:, 0]].any()
        assert store.held_out[others[:, 0]].all()
        assert sorted([*mine.tolist(), *others.tolist()]) == rows(everything).tolist()
        assert len(rows(everything, held_out=True)) == 0
    too_short = [set(store.too_short(99, held_out=part).names["no shot of 99 frames"]) for part in (False, True)]
    films = {name for name in held(store) if name.endswith(".mp4")}
    assert too_short[1] == films
    assert too_short[0] == {f"films/{i}.mp4" for i in range(6)} - films


@pytest.fixture(scope="module")
def trained(source, tmp_path_factory):
    """A tokenizer and a base model on 16 films, some held out; the items that each call of ClipStore.read reads, by
    whether it is for a preview."""
    folder = tmp_path_factory.mktemp("trained")
    for i in range(16):
        write_mp4(folder / f"films/{'up' if i % 2 else 'down'}/{i}.mp4", ramp(9, 16, 16, first=5 * i, step=3), fps=8)
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    preview = False
    with pytest.MonkeyPatch.context() as patch:
        read, make_preview = ClipStore.read, tokenizer.tokenizer_preview

        def spy(self, rows, *arguments, **options):
            seen[preview] |= set(np.asarray(rows)[:, 0].tolist())
            return read(self, rows, *arguments, **options)

        def told(run):
            show = make_preview(run)

            def preview_(module, step):
                nonlocal preview
                preview = True
                show(module, step)
                preview = False

            return preview_

        patch.setattr(ClipStore, "read", spy)
        patch.setattr(tokenizer, "tokenizer_preview", told)
        settings = ("data.held_out=0.3", "data.images=2", "training.steps=6", "training.preview_every=3")
        fit("tokenizer", folder / "films", folder / "run", *settings)
        fit("base", folder / "films", folder / "run", *settings[1:3])
    return folder, seen


class TestWhoReadsThem:
    def test_training_never_does(self, trained):
        folder, seen = trained
        store = ClipStore.open(folder / "run/data-16x16")
        assert 0 < store.held_out.sum() < 16
        assert seen[False]
        assert not store.held_out[list(seen[False])].any()
        latents = LatentStore.open(folder / "run/latents-16x16", store)
        for rows in (latents.video_indices, latents.image_indices):
            assert set(rows[:, 0]) == set(np.flatnonzero(~store.held_out))

    def test_previews_do(self, trained):
        folder, seen = trained
        store = ClipStore.open(folder / "run/data-16x16")
        assert seen[True]
        assert store.held_out[list(seen[True])].all()

    def test_evaluation_does_and_says_so(self, trained, capsys):
        folder, _ = trained
        store = ClipStore.open(folder / "run/data-16x16")
        count = int(store.held_out.sum())
        arguments = ["--from", folder / "run", "--data", folder / "run/data-16x16", "--metrics", "psnr"]
        assert main([str(argument) for argument in ["evaluate", *arguments]]) == 0
        captured = capsys.readouterr()
        assert f"{count} real clips" in captured.out
        assert f"the real clips are of the {count} files that are held out of 16" in captured.err
        assert "warning" not in captured.err
        # Of a folder that is not prepared they are not known.
        assert main([str(argument) for argument in ["evaluate", *arguments[:3], folder / "films", *arguments[4:]]]) == 0
        captured = capsys.readouterr()
        assert "16 real clips" in captured.out
        assert "was trained without the held-out files of its data" in captured.err
        assert f"walt: warning: {16 - count} of the 16 files with the real clips were trained on" in captured.err

    def test_another_share_is_refused(self, trained, tmp_path):
        folder, _ = trained
        prepared = folder / "run/data-16x16"
        with pytest.raises(WaltError, match=r"was prepared with 0\.3 of its files held out; 0\.1 are wanted"):
            fit("tokenizer", prepared, tmp_path / "run", "data.held_out=0.1")
        fit("tokenizer", prepared, tmp_path / "run", "data.held_out=0.3")
        fit("base", prepared, tmp_path / "run")

    def test_what_counts_is_what_the_model_was_trained_without(self, trained, tmp_path, capsys):
        """Not how the folder was marked since, which would pass training data off as held out, or the reverse."""
        folder, _ = trained
        arguments = ["evaluate", "--from", str(folder / "run"), "--metrics", "psnr", "--data"]
        shown = []
        for share in (0.0, 0.3, 0.9):
            make(folder / "films", tmp_path / str(share), held_out=share)
            assert main([*arguments, str(tmp_path / str(share))]) == 0
            captured = capsys.readouterr()
            shown.append(captured.out)
            told = f"{folder / 'run'} was trained with 0.3, which counts here" in captured.err
            assert told == (share != 0.3)
        assert shown == [shown[1]] * 3

    def test_a_refused_training_marks_nothing_anew(self, trained):
        folder, _ = trained
        with pytest.raises(
            WaltError, match=r"data-16x16 was prepared with 0\.3 of its files held out; 0\.5 are wanted"
        ):
            fit("base", folder / "films", folder / "run", "data.held_out=0.5")
        assert ClipStore.open(folder / "run/data-16x16").settings.held_out == 0.3

    def test_the_share_is_in_the_settings_of_the_stage(self, trained):
        folder, _ = trained
        for stage in ("tokenizer", "transformer"):
            assert "held_out: 0.3" in (folder / f"run/{stage}.yaml").read_text()


def test_a_share_that_leaves_something_out(source, tmp_path):
    """Nothing held out, a class without a file to train on, and nothing to train on are told."""
    _, lines = make(source, tmp_path / "a", held_out=1e-9)
    assert lines == ["held out: 0 of 46 files (the share is too small)"]
    store, _ = make(source, tmp_path / "b", held_out=0.3)
    alone = tmp_path / "alone"
    shutil.copytree(source / "images", alone / "images")
    kept = next(item for item in store.items if item.held_out and item.kind == "video")
    (alone / "films").mkdir()
    shutil.copy(source / kept.name, alone / kept.name)
    _, lines = make(alone, tmp_path / "c", held_out=0.3)
    assert "classes of which all files are held out, so that no model learns them: films" in lines
    with pytest.raises(WaltError, match="all clips of 5 frames are held out; prepare it with a smaller --held-out"):
        fit("tokenizer", tmp_path / "c", tmp_path / "run")


def test_the_command(source, tmp_path, capsys):
    arguments = ["prepare", "--data", str(source), "--out", str(tmp_path / "a"), "--size", "16", "--held-out", "0.3"]
    assert main(arguments) == 0
    assert "held out: " in capsys.readouterr().err
    assert ClipStore.open(tmp_path / "a").settings.held_out == 0.3
    assert "--held-out: 1 must be below 1" in fails(capsys, *arguments[:-1], "1")
