"""walt.data.latents on two gloo ranks: each encodes its share, and the files are those of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from encoding_on_ranks import Encoder, encoded
from films import ramp
from launch import on_two_ranks
from torch import distributed

from walt.data.prepare import prepare
from walt.data.video import write_mp4

pytest.importorskip("av", reason="PyAV is not installed")
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")

CLIPS, BATCHES = 11, 6  # of a ramp of 15 frames; the last batch has one clip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[Path, list[float], list[dict]]:
    """The folder, the batches by the brightness of their first clip, and what each rank says."""
    out = tmp_path_factory.mktemp("ranks")
    write_mp4(out / "films/a.mp4", ramp(15))
    store = prepare(out / "films", out / "prepared", height=16, width=16, progress=False)
    encode = Encoder()
    assert len(encoded(store, out / "one", encode).video) == CLIPS
    with pytest.raises(KeyboardInterrupt):
        encoded(store, out / "resumed", Encoder(fails=4))  # the shape and three batches are done
    on_two_ranks("encoding_on_ranks.py", out)
    return out, encode.seen[1:], [json.loads((out / f"said-{i}.json").read_text()) for i in range(2)]


def test_each_rank_encodes_its_share(ranks):
    _, batches, said = ranks
    assert len(batches) == BATCHES
    assert [one["fresh"] for one in said] == [[batches[0], *batches[r::2]] for r in range(2)]


@pytest.mark.parametrize("name", ["fresh", "resumed"])
def test_the_files_are_those_of_one_process(ranks, name):
    out, _, _ = ranks
    names = sorted(path.name for path in (out / "one").iterdir())
    assert sorted(path.name for path in (out / name).iterdir()) == names
    for file in names:
        assert (out / name / file).read_bytes() == (out / "one" / file).read_bytes()


def test_ranks_go_on_with_what_one_process_left(ranks):
    _, batches, said = ranks
    assert [one["resumed"] for one in said] == [[batches[0], *batches[3:][r::2]] for r in range(2)]


def test_what_is_there_is_not_encoded_again(ranks):
    assert [one["again"] for one in ranks[2]] == [[], []]


def test_what_fails_on_one_rank_stops_both(ranks):
    out, _, said = ranks
    assert "another rank failed" in said[0]["broken"]
    assert "not finite in float32" in said[1]["broken"]
    assert not (out / "broken").exists()
