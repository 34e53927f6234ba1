"""Both stages of training on small films: their latents, and the pipeline that is read back from their folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_runs import fit, make

from walt.checkpoint import save_checkpoint
from walt.data.latents import LatentStore
from walt.errors import WaltError
from walt.model.diffusion import Diffusion
from walt.presets import PRESETS
from walt.pretrained import load_tokenizer
from walt.sample.pipeline import WaltPipeline

pytest.importorskip("av", reason="PyAV is not installed")

CLASSES = ("down", "up")


@pytest.fixture(scope="module")
def trained(films, tmp_path_factory) -> tuple[Path, WaltPipeline]:
    """The folder, and a pipeline of the networks that were trained, not read back."""
    out = tmp_path_factory.mktemp("trained")
    tokenizer, transformer = (fit(stage, films, out).averaged.eval() for stage in ("tokenizer", "base"))
    clip = make("base", films, out).clip
    return out, WaltPipeline(tokenizer, transformer, Diffusion(), clip=clip, classes=CLASSES)


def test_an_image_has_the_latent_of_a_first_frame(trained, films):
    store = make("base", films, trained[0]).store
    latents = LatentStore.open(trained[0] / "latents-16x16", store)
    assert latents.video.shape == (4, 4, 2, 2, 2)
    for row, clip in zip(latents.video_indices, latents.video, strict=True):
        image = latents.image[(latents.image_indices == row).all(axis=1)]
        assert np.abs(image[0].astype(np.float32) - clip[:, 0]).max() < 2e-3  # float16


def test_a_pipeline_from_its_folder_samples_the_same(trained, tmp_path):
    out, pipeline = trained
    expected = pipeline.generate(["down", "up"], 2, steps=3, seed=5, progress=False)
    assert expected.shape == (2, 5, 16, 16, 3)
    assert expected.dtype == np.uint8
    loaded = WaltPipeline.from_pretrained(out)
    assert np.array_equal(loaded.generate(["down", 1], 2, steps=3, seed=5, progress=False), expected)
    assert not np.array_equal(loaded.generate(["down", 1], 2, steps=3, seed=6, progress=False), expected)
    pipeline.save_pretrained(tmp_path / "export")
    again = WaltPipeline.from_pretrained(tmp_path / "export")
    assert np.array_equal(again.generate(["down", "up"], 2, steps=3, seed=5, progress=False), expected)
    assert again.classes == CLASSES


def test_pictures(trained):
    _, pipeline = trained
    pictures = pipeline.generate(["down", "up", "down"], 3, steps=2, images=True, progress=False)
    assert pictures.shape == (3, 16, 16, 3)
    assert np.array_equal(pictures, pipeline.generate(["down", "up", "down"], 3, steps=2, images=True, progress=False))


def test_generate_bad_values(trained):
    _, pipeline = trained
    with pytest.raises(WaltError, match="unknown class 'left'; the classes are down, up"):
        pipeline.generate("left")
    with pytest.raises(WaltError, match="2 labels for num=3"):
        pipeline.generate(["down", "up"], 3)
    with pytest.raises(WaltError, match=r"steps.*1001"):
        pipeline.generate("down", steps=1001)


def test_a_config_that_is_not_ours(tmp_path):
    save_checkpoint(tmp_path / "tokenizer", "tokenizer", {"config": {"channels": 4, "depth": 9}}, {})
    with pytest.raises(WaltError, match=r"config\.json: .*depth"):
        load_tokenizer(tmp_path / "tokenizer")


def test_the_tiny_preset_is_the_demo_shape():
    tokenizer, transformer = PRESETS["tiny"]
    assert tokenizer.latent_shape(17, 64, 64) == (transformer.latent_channels, *transformer.latent_size)
