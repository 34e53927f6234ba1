"""walt.data.batches: samples depend on their generators alone, microbatches join, stacks share a condition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from films import numbers, ramp, write_folder

from walt.data.batches import Bucket, Buckets, PixelSource, Stacks
from walt.data.loading import make_batch
from walt.data.pixels import to_pixels
from walt.data.prepare import prepare
from walt.data.video import write_mp4
from walt.errors import WaltError

pytest.importorskip("av", reason="PyAV is not installed")
pytest.importorskip("PIL", reason="Pillow is not installed")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Videos cats/one.mp4 (12 frames), dogs/two.mp4 (7 frames, brighter) and 4 images, prepared for 16x16."""
    source = write_folder(tmp_path_factory.mktemp("source"))
    write_mp4(source / "dogs/two.mp4", ramp(7, first=130))
    (source / "captions.jsonl").write_text(
        '{"file": "cats/one.mp4", "caption": "a cat"}\n{"file": "dogs/a.png", "caption": "a cat"}\n'
        '{"file": "dogs/b.png", "caption": "a dog"}'
    )
    captions = source / "captions.jsonl"
    return prepare(source, source / "store", height=16, width=16, captions=captions, progress=False, say=lambda _: None)


def equal(a, b) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items())


VIDEOS = Bucket(frames=5, height=16, width=16, stride=2)
STACKS = Bucket(frames=17, height=8, width=16, images=True, image_every=3)


def indices(source, count: int = 6, seed: int = 0):
    """rows, offset and flip of samples with generators of their own, those of `make_batch`."""
    drawn = []

    def spy(_, samples):
        drawn.extend(map(source.sample_indices, samples.values()))
        return {}

    make_batch(spy, seed, 0, range(count))
    return [torch.stack(tensors) for tensors in zip(*drawn, strict=True)]


def test_videos(store):
    source = PixelSource(store, VIDEOS)
    rows, offset, flip = indices(source)
    assert rows.shape == offset.shape == (6, 2)
    assert not flip.any()
    assert 0 <= offset.min() < offset.max() < 1
    batch = make_batch(source, 0, 0, range(6))
    assert batch["video"].shape == (6, 3, 5, 16, 16)
    assert batch["video"].dtype == torch.float32
    first = rows[:, 1].tolist()
    assert set(rows[:, 0].tolist()) == {1}  # of 12 frames; 9 are needed, and the other has 7
    assert numbers(to_pixels(batch["video"])).tolist() == [[n, n + 2, n + 4, n + 6, n + 8] for n in first]
    assert batch["label"].tolist() == [0] * 6
    assert batch["caption"] == ["a cat"] * 6
    assert not batch["image"].any()


def test_every_window_comes(store):
    source = PixelSource(store, Bucket(frames=5, height=16, width=16))
    drawn = {tuple(row) for row in indices(source, 400)[0].tolist()}
    assert drawn == {(1, first) for first in range(8)} | {(4, first) for first in range(3)}


def test_stacks_share_their_class(store):
    source = PixelSource(store, STACKS)
    rows, offset, flip = indices(source)
    assert rows.shape == offset.shape == (6, 5, 2)
    assert flip.shape == (6, 5)
    labels = torch.from_numpy(store.label)[rows[..., 0]]
    assert (labels == labels[:, :1]).all()
    assert len(labels.unique()) > 1
    batch = make_batch(source, 0, 0, range(6))
    assert batch["video"].shape == (6, 3, 5, 8, 16)
    assert torch.equal(batch["label"], labels[:, 0])
    assert batch["image"].all()
    one = store.read(rows[2, 3:4].numpy(), crop=(8, 16), offset=offset[2, 3:4].numpy())
    assert np.array_equal(to_pixels(batch["video"])[2, 3], one[0, 0])


def test_stacks_share_their_caption(store):
    source = PixelSource(store, STACKS, condition="caption")
    for seed in range(4):
        rows = indices(source, seed=seed)[0]
        texts = [[store.caption[item] or "" for item in stack] for stack in rows[..., 0].tolist()]
        assert all(len(set(stack)) == 1 for stack in texts)
        assert make_batch(source, seed, 0, range(6))["caption"] == [stack[0] for stack in texts]


def test_stacks_draw_all_images_alike():
    stacks, generator = Stacks(torch.tensor([1, 0, 1, 3, 1])), torch.Generator().manual_seed(0)
    drawn = torch.stack([stacks.sample_indices(3, generator) for _ in range(6000)])
    assert drawn.shape == (6000, 3)
    groups = torch.tensor([1, 0, 1, 3, 1])[drawn]
    assert (groups == groups[:, :1]).all()
    for column in drawn.T:
        assert ((column.bincount(minlength=5) - 1200).abs() < 150).all()


def test_flips(store):
    assert 5 < indices(PixelSource(store, STACKS, flip=True))[2].sum() < 25


def test_buckets(store):
    """A step has one bucket, by weight, whichever of its samples are made."""
    source = Buckets([PixelSource(store, VIDEOS, flip=True), PixelSource(store, STACKS)], [1, 3])
    before = torch.get_rng_state()
    batches = [make_batch(source, 0, step, range(6)) for step in range(20)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert all(equal(batch, make_batch(source, 0, step, range(6))) for step, batch in enumerate(batches))
    buckets = [batch["bucket"] for batch in batches]
    assert buckets == [make_batch(source, 0, step, [5])["bucket"] for step in range(20)]
    assert 0 < buckets.count(0) < buckets.count(1)
    assert {tuple(batch["video"].shape[2:]) for batch in batches} == {(5, 16, 16), (5, 8, 16)}
    only = Buckets(source.sources, [0, 1])
    assert all(make_batch(only, 0, step, [0])["bucket"] == 1 for step in range(20))


@pytest.mark.parametrize("bucket", [VIDEOS, STACKS])
def test_microbatches_of_the_ranks_join_to_the_batch(store, bucket):
    source = Buckets([PixelSource(store, bucket, flip=True)])
    whole = make_batch(source, 0, 0, range(6))
    for rank in range(3):
        part = make_batch(source, 0, 0, range(rank, 6, 3))
        for name in ("video", "label", "image"):
            assert torch.equal(part[name], whole[name][rank::3])
        assert part["caption"] == whole["caption"][rank::3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frames": 16}, r"frames: got 16 frames; expected 1 \+ 4k"),
        ({"stride": 0}, "stride: got 0; expected an int >= 1"),
        ({"height": 0}, "height: got 0; expected an int >= 1"),
    ],
)
def test_wrong_buckets(values, message):
    with pytest.raises(ValueError, match=message):
        Bucket(**{"frames": 5, "height": 16, "width": 16, **values})


def test_what_the_cache_cannot_give(store, tmp_path):
    with pytest.raises(WaltError, match=r"bucket of 16x32 pixels needs more than .* was prepared for, 16x16"):
        PixelSource(store, Bucket(frames=5, height=16, width=32))
    with pytest.raises(WaltError, match="no clip of 5 frames: it takes 13 frames of a shot, and the longest has 12"):
        PixelSource(store, Bucket(frames=5, height=16, width=16, stride=3))
    (tmp_path / "films").mkdir()
    write_mp4(tmp_path / "films/a.mp4", ramp(3))
    films = prepare(tmp_path / "films", tmp_path / "store", height=16, width=16, progress=False)
    with pytest.raises(WaltError, match="holds no image"):
        PixelSource(films, Bucket(frames=5, height=16, width=16, images=True, image_every=None))
    with pytest.raises(ValueError, match="condition: got 'mood'; expected label or caption"):
        PixelSource(store, STACKS, condition="mood")


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [1, float("nan")], [float("inf"), 1]])
def test_wrong_weights(store, weights):
    source = PixelSource(store, VIDEOS)
    with pytest.raises(ValueError, match=r"weights: got .*; expected 2 numbers >= 0, not all 0"):
        Buckets([source, source], weights)
