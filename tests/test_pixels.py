"""walt.data.pixels: area averages, crops and the numbers of the networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from walt.data.pixels import centre_square, cover, enlarge, shrink, to_model, to_pixels


def test_shrink_is_the_mean_of_blocks():
    video = np.random.default_rng(0).integers(0, 256, (2, 12, 18, 3), np.uint8)
    expected = video.reshape(2, 4, 3, 6, 3, 3).astype(np.float64).mean(axis=(2, 4))
    assert np.abs(shrink(video, 4, 6) - expected).max() <= 0.5 + 1e-4


def test_enlarge_is_what_other_programs_call_bicubic():
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    video = np.random.default_rng(0).integers(80, 176, (2, 8, 6, 3), np.uint8)  # it overshoots
    expected = [image.fromarray(frame).resize((12, 16), image.Resampling.BICUBIC) for frame in video]
    assert np.abs(enlarge(video, 16, 12).astype(int) - np.stack([np.asarray(frame) for frame in expected])).max() <= 1


def test_cover_is_the_mean_of_blocks_at_its_own_aspect():
    picture = np.random.default_rng(0).integers(0, 256, (12, 18, 3), np.uint8)
    expected = picture.reshape(4, 3, 6, 3, 3).astype(np.float64).mean(axis=(1, 3))
    for height, width in ((4, 4), (2, 6), (4, 6)):
        covering = cover(picture, height, width)
        assert covering.shape == (4, 6, 3)
        assert np.abs(covering - expected).max() <= 1
    assert np.array_equal(cover(picture, 12, 9), picture)
    assert cover(picture, 16, 16).shape == (16, 24, 3)
    ramp = np.arange(0, 200, 10, dtype=np.uint8)[None, :, None].repeat(10, axis=0).repeat(3, axis=2)
    larger = cover(ramp, 20, 20).astype(int)
    assert larger.shape == (20, 40, 3)
    assert set(np.unique(np.diff(larger, axis=1)[:, 1:-1])) == {5}


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1), (3, 100), (64, 64 * 17)])
def test_cover_of_a_strip_stays_small(shape):
    picture = np.zeros((*shape, 3), np.uint8)
    with pytest.raises(ValueError, match="so oblong that it would be over 16 times 64x64 to cover that; crop"):
        cover(picture, 64, 64)
    least = cover(np.zeros((10, 160, 3), np.uint8), 64, 64)
    assert least.shape == (64, 16 * 64, 3)


def test_centre_square():
    video = np.arange(6 * 10, dtype=np.uint8).reshape(1, 6, 10, 1).repeat(3, axis=3)
    assert np.array_equal(centre_square(video), video[:, :, 2:8])


def test_pixels_survive_the_model_range():
    video = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16, 1).repeat(3, axis=4)
    tensor = to_model(video)
    assert tensor.shape == (1, 3, 1, 16, 16)
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert np.array_equal(to_pixels(tensor), video)
    assert to_pixels(torch.full((1, 3, 1, 1, 1), 7.0)).item(0) == 255
