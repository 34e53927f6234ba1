"""walt.data.latents: latents and text features are those of the network, made once, and never those of another."""

from __future__ import annotations

import json
import os
from itertools import starmap
from pathlib import Path

import numpy as np
import pytest
import torch
from films import write_folder
from torch import nn

from walt.checkpoint import fingerprint
from walt.data.batches import LatentSource
from walt.data.clips import ClipStore, PrepareSettings
from walt.data.latents import LatentStore, encode_latents
from walt.data.loading import make_batch
from walt.data.pixels import to_model
from walt.data.prepare import prepare
from walt.data.text_features import TextFeatures, encode_captions
from walt.errors import WaltError

pytest.importorskip("av", reason="PyAV is not installed")
pytest.importorskip("PIL", reason="Pillow is not installed")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Videos of 12 and 7 frames and 4 images, prepared for 16x16."""
    source = write_folder(tmp_path_factory.mktemp("source"))
    captions = source / "captions.jsonl"
    captions.write_text('{"file": "cats/one.mp4", "caption": "a cat"}\n{"file": "dogs/a.png", "caption": "a dog"}')
    return prepare(
        source, source / "prepared", height=16, width=16, captions=captions, progress=False, say=lambda _: None
    )


class Encoder:
    """Pixels [B, 3, 1+4t, H, W] -> [B, 3, 1+t, H/8, W/8]; counts its calls, and fails at call `fails`."""

    def __init__(self, fails: int | None = None) -> None:
        self.calls, self.fails = 0, fails

    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        if self.calls == self.fails:
            raise KeyboardInterrupt
        self.calls += 1
        return video[:, :, ::4, 3::8, 5::8] * 2


def encoded(store, folder, encode=None, **options) -> LatentStore:
    options = {
        "key": "weights",
        "frames": 5,
        "height": 16,
        "width": 16,
        "hop": 2,
        "batch": 2,
        "dtype": "float32",
    } | options
    return encode_latents(store, folder, encode or Encoder(), progress=False, **options)


@pytest.fixture
def latents(store, tmp_path) -> LatentStore:
    return encoded(store, tmp_path / "latents")


def one_video(store) -> ClipStore:
    return ClipStore(store.folder, PrepareSettings(16, 16, True), store.items[1:2], store._shards)


def test_latents_are_those_of_the_encoder(store, latents):
    assert np.array_equal(latents.video_indices, store.windows(5, hop=2))
    assert np.array_equal(latents.image_indices, store.images(4))
    assert latents.video.shape == (6, 3, 2, 2, 2)
    assert latents.image.shape == (9, 3, 2, 2)
    assert latents.video.dtype == np.float32
    assert np.array_equal(latents.video, Encoder()(to_model(store.read(latents.video_indices, 5))).numpy())
    assert np.array_equal(latents.image, Encoder()(to_model(store.read(latents.image_indices)))[:, :, 0].numpy())
    again = LatentStore.open(latents.folder, store, key="weights")
    assert np.array_equal(again.video, latents.video)
    assert np.array_equal(again.image, latents.image)


def test_defaults(store, tmp_path):
    latents = encode_latents(store, tmp_path / "l", Encoder(), key="k", frames=5, height=8, width=8, progress=False)
    assert latents.video_indices.tolist() == [[1, 0], [1, 5], [4, 0]]  # end to end
    assert latents.video.dtype == np.float16
    expected = Encoder()(to_model(store.read(latents.video_indices, 5, crop=(8, 8)))).half().numpy()
    assert np.array_equal(latents.video, expected)


def test_what_is_there_is_not_encoded_again(store, latents):
    encode = Encoder(fails=0)
    assert np.array_equal(encoded(store, latents.folder, encode).video, latents.video)


@pytest.mark.parametrize(
    "change", [{"key": "other"}, {"hop": 3}, {"height": 8}, {"dtype": "float16"}, {"image_every": 2}]
)
def test_what_is_stale_is_made_anew(store, latents, change):
    encode = Encoder()
    changed = encoded(store, latents.folder, encode, **change)
    assert encode.calls > 0
    assert LatentStore.open(latents.folder, store, key=change.get("key", "weights")).index == changed.index


def test_stale_latents_are_refused(store, latents, tmp_path):
    with pytest.raises(WaltError, match="was made by another tokenizer; encode again"):
        LatentStore.open(latents.folder, store, key="other")
    source = write_folder(tmp_path / "source")
    other = prepare(source, tmp_path / "prepared", height=16, width=24, progress=False)
    with pytest.raises(WaltError, match="was made from other data than"):
        LatentStore.open(latents.folder, other)


@pytest.mark.parametrize("call", [0, 1, 3, 4, 5, 7])
def test_interrupted_work_goes_on(store, latents, tmp_path, call):
    first = Encoder(fails=call)
    with pytest.raises(KeyboardInterrupt):
        encoded(store, tmp_path / "again", first)
    assert not (tmp_path / "again").exists()
    with pytest.raises(WaltError, match="is not a folder of encoded data"):
        LatentStore.open(tmp_path / "again", store)
    for raw, rows in (("video.raw", latents.video_indices), ("image.raw", latents.image_indices)):
        size = (latents.folder / raw).stat().st_size // len(rows)  # of a latent: half a batch
        if (tmp_path / "again.partial" / raw).exists():
            with (tmp_path / "again.partial" / raw).open("ab") as file:
                file.write(b"\1" * (size + 7))
    second = Encoder()
    whole = encoded(store, tmp_path / "again", second)
    # 1 clip for the shape and 3 batches, then 1 image and 5 batches.
    assert second.calls == 10 - max(0, min(call, 4) - 1) - max(0, call - 5)
    for name in ("video.raw", "image.raw"):
        assert (whole.folder / name).read_bytes() == (latents.folder / name).read_bytes()
    assert not (tmp_path / "again.partial").exists()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="names of open files are read from /proc")
def test_latents_are_on_the_disk_before_the_index(store, tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync

    def spy(handle):
        flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    encoded(store, tmp_path / "l")
    last = max(i for i, name in enumerate(flushed) if name.startswith(".index"))
    assert {"video.raw", "image.raw"} <= set(flushed[:last])


def test_a_kill_before_the_rename_costs_no_work(store, latents, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            encoded(store, tmp_path / "again")
    encode = Encoder()
    again = encoded(store, tmp_path / "again", encode)
    assert encode.calls == 2  # for the shapes
    assert np.array_equal(again.video, latents.video)
    assert sorted(path.name for path in again.folder.iterdir()) == ["image.raw", "index.json", "video.raw"]


def test_partial_work_of_other_settings_is_dropped(store, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        encoded(store, tmp_path / "l", Encoder(fails=3), key="other")
    encode = Encoder()
    encoded(store, tmp_path / "l", encode)
    assert encode.calls == 10


def test_latents_that_are_not_finite(store, tmp_path):
    with pytest.raises(WaltError, match=r"not finite in float16, for one of cats/one\.mp4"):
        encoded(store, tmp_path / "l", lambda video: video[:, :, ::4] * 1e6, dtype="float16")
    with pytest.raises(WaltError, match="not finite in float32"):
        encoded(store, tmp_path / "l", lambda video: video[:, :, ::4] * float("nan"))
    assert not (tmp_path / "l").exists()


def test_nothing_to_encode(store, tmp_path):
    with pytest.raises(WaltError, match="holds no image, and no shot of 13 frames"):
        encoded(one_video(store), tmp_path / "l", frames=13, image_every=None)


def test_other_folders_are_left_alone(store, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(WaltError, match="is not a folder of encoded data"):
        encoded(store, tmp_path / "mine")
    (tmp_path / "mine/index.json").write_text('{"format": "recipes"}')
    with pytest.raises(WaltError, match="'recipes', expected 'walt-latents'"):
        encoded(store, tmp_path / "mine")
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2; this walt reads version 1"),
        ({"video_shape": None}, r"index\.json is broken"),
        ({"video_shape": [3, 2, 2, 3]}, r"video\.raw is broken: it holds 576 bytes, its index speaks of 864"),
        ({"dtype": "object"}, r"index\.json is broken: dtype is 'object'"),
        ({"hop": 0}, r"index\.json is broken: hop: got 0"),
        ({"frames": "5"}, r"index\.json is broken"),
    ],
)
def test_broken_latents(store, latents, change, message):
    path = latents.folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(WaltError, match=message):
        LatentStore.open(latents.folder, store)


def test_truncated_latents(store, latents):
    path = latents.folder / "image.raw"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WaltError, match=r"image\.raw is broken: it holds 431 bytes, its index speaks of 432"):
        LatentStore.open(latents.folder, store)


def indices(source: LatentSource, count: int, seed: int = 0) -> list[list[int]]:
    """Which clip, or which images, each sample of `make_batch` has."""
    drawn = []

    def spy(_, samples):
        drawn.extend(starmap(source.sample_indices, samples.items()))
        return {}

    make_batch(spy, seed, 0, range(count))
    return [index.tolist() for index in drawn]


def test_joint_batches(store, latents):
    source = LatentSource(latents, 6, images=3)
    loaded = make_batch(source, 1, 0, range(6))
    assert loaded["image"].tolist() == [False] * 3 + [True] * 3
    assert loaded["latent"].shape == (6, 3, 2, 2, 2)
    assert loaded["latent"].dtype == torch.float32
    for sample, index in enumerate(indices(source, 6, seed=1)):
        if sample < 3:
            assert len(index) == 1
            expected, item = latents.video[index[0]], latents.video_indices[index[0], 0]
        else:
            expected = np.stack([latents.image[i] for i in index], axis=1)
            items = latents.image_indices[index, 0]
            assert len(set(store.label[items].tolist())) == 1
            item = items[0]
        assert np.array_equal(loaded["latent"][sample].numpy(), expected)
        assert loaded["label"][sample] == store.label[item]
        assert loaded["caption"][sample] == (store.caption[item] or "")


def test_parts_of_the_ranks_join_to_the_batch(latents):
    source = LatentSource(latents, 6, images=2, low=latents)
    whole = make_batch(source, 0, 0, range(6))
    assert torch.equal(whole["low_resolution"], whole["latent"])  # of the same clips and images
    for rank in range(2):
        part = make_batch(source, 0, 0, range(rank, 6, 2))
        for name in ("latent", "label", "image"):
            assert torch.equal(part[name], whole[name][rank::2])
        assert part["caption"] == whole["caption"][rank::2]


def test_batches_of_one_kind(store, latents, tmp_path):
    clips = LatentSource(latents, 4)
    assert not make_batch(clips, 0, 0, range(4))["image"].any()
    stacks = LatentSource(latents, 4, images=4, condition="caption")
    texts = [{store.caption[item] for item in latents.image_indices[row, 0]} for row in indices(stacks, 4)]
    assert all(len(text) == 1 for text in texts)
    no_images = encoded(one_video(store), tmp_path / "l", image_every=None)
    with pytest.raises(WaltError, match="holds no image, but batches are to have some"):
        LatentSource(no_images, 4, images=1)
    pictures = encoded(store, tmp_path / "p", frames=13, image_every=None)
    with pytest.raises(WaltError, match="holds no clip, but batches are to have some"):
        LatentSource(pictures, 4, images=1)
    only = LatentSource(pictures, 4, images=4)
    assert make_batch(only, 0, 0, range(4))["latent"].shape == (4, 3, 1, 2, 2)
    with pytest.raises(ValueError, match=r"images: got 5 of a batch of 4; expected 0 \.\. 4"):
        LatentSource(latents, 4, images=5)


def encode_text(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """A token (code, position) for each letter, with padding on the left, which no mask lets through."""
    length = max(1, *map(len, texts))
    tokens, mask = torch.full((len(texts), length, 2), float("nan")), torch.zeros(len(texts), length)
    for row, text in enumerate(texts):
        for i, letter in enumerate(text):
            tokens[row, length - len(text) + i] = torch.tensor([ord(letter) / 8, i])
            mask[row, length - len(text) + i] = 1
    return tokens, mask


def test_text_features(tmp_path):
    captions = ["dog", None, "a cat", "dog", "grün"]
    features = encode_captions(captions, tmp_path / "t", encode_text, key="k", batch=2, progress=False)
    tokens, mask = features(["grün", "", "dog"])
    assert tokens.shape == (3, 5, 2)
    assert mask.sum(dim=1).tolist() == [4, 0, 3]
    assert tokens[0, :4].tolist() == [[ord(c) / 8, i] for i, c in enumerate("grün")]
    assert tokens[2, :3].tolist() == [[ord(c) / 8, i] for i, c in enumerate("dog")]
    assert (tokens[~mask] == 0).all()
    with pytest.raises(ValueError, match="caption: got 'cow'; expected one of the 4 encoded ones"):
        features(["cow"])
    assert torch.equal(TextFeatures.open(tmp_path / "t", key="k")(["a cat"])[0], features(["a cat"])[0])


def test_text_features_are_made_once(tmp_path):
    def never(texts):
        raise AssertionError

    encode_captions(["dog", "cat"], tmp_path / "t", encode_text, key="k", progress=False)
    encode_captions(["dog"], tmp_path / "t", never, key="k", progress=False)
    with pytest.raises(AssertionError):
        encode_captions(["dog"], tmp_path / "t", never, key="other", progress=False)
    with pytest.raises(AssertionError):
        encode_captions(["cow"], tmp_path / "t", never, key="k", progress=False)
    with pytest.raises(WaltError, match="was made by another text encoder"):
        TextFeatures.open(tmp_path / "t", key="other")
    assert "cow" in encode_captions(["cow"], tmp_path / "t", encode_text, key="k", progress=False)
    path = tmp_path / "t/tokens.raw"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(WaltError, match=r"tokens\.raw is broken"):
        TextFeatures.open(tmp_path / "t")


def test_batches_with_text(store, latents, tmp_path):
    text = encode_captions(store.caption, tmp_path / "t", encode_text, key="k", progress=False)
    source = LatentSource(latents, 8, images=4, condition="caption", text=text)
    loaded = make_batch(source, 0, 0, range(8))
    assert loaded["text"].shape == (8, 5, 2)
    assert loaded["text_mask"].sum(dim=1).tolist() == [len(caption) for caption in loaded["caption"]]


def test_fingerprint():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(torch.bfloat16)
    before = fingerprint(module)
    assert fingerprint(module) == before
    with torch.no_grad():
        module[0].weight[1, 2] += 1
    assert fingerprint(module) != before
    assert fingerprint(nn.Linear(3, 2)) != fingerprint(nn.Linear(2, 3))
