"""walt.evaluate: PSNR and Frechet distance against closed forms; features that follow what the eye sees."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import linalg

from walt.errors import WaltError
from walt.evaluate import FrameFeatures, Projection, clip_distances, frechet_distance, psnr


def features_with(mean: np.ndarray, covariance: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Samples whose mean and covariance (N - 1) are exactly these."""
    rows = np.random.default_rng(seed).standard_normal((count, len(mean)))
    rows -= rows.mean(axis=0)
    whitened = np.linalg.solve(np.linalg.cholesky(np.cov(rows.T)), rows.T).T
    return whitened @ linalg.sqrtm(covariance).real + mean


def spd(size: int, seed: int) -> np.ndarray:
    root = np.random.default_rng(seed).standard_normal((size, size))
    return root @ root.T + 0.1 * np.eye(size)


def test_psnr_closed_form():
    target = np.full((3, 2, 4, 4, 3), 100, np.uint8)
    output = target.copy()
    output[1] += 10
    output[2, 0] += 20
    assert psnr(output, target) == pytest.approx([np.inf, 20 * math.log10(25.5), 10 * math.log10(255**2 / 200)])


def test_psnr_does_not_wrap_around():
    black, white = np.zeros((1, 4), np.uint8), np.full((1, 4), 255, np.uint8)
    assert psnr(black, white) == pytest.approx([0])


def test_psnr_bad_input():
    with pytest.raises(ValueError, match=r"uint8 \[1, 4\] and target float64 \[1, 4\]"):
        psnr(np.zeros((1, 4), np.uint8), np.zeros((1, 4)))


def test_frechet_of_commuting_gaussians():
    """With diagonal covariances the distance is |m1 - m2|^2 + sum (s1 - s2)^2."""
    m1, m2 = np.array([1.0, 2.0, -3.0]), np.array([0.0, 2.5, 1.0])
    s1, s2 = np.array([1.0, 0.5, 2.0]), np.array([2.0, 0.1, 3.0])
    first = features_with(m1, np.diag(s1**2), 50, 0)
    second = features_with(m2, np.diag(s2**2), 80, 1)
    expected = np.square(m1 - m2).sum() + np.square(s1 - s2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_any_gaussians():
    """Against the definition with scipy's matrix square root."""
    m1, m2, c1, c2 = np.zeros(6), np.linspace(-1, 2, 6), spd(6, 2), spd(6, 3)
    expected = np.square(m1 - m2).sum() + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)
    first, second = features_with(m1, c1, 40, 4), features_with(m2, c2, 30, 5)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)


def test_frechet_with_fewer_samples_than_dimensions():
    """Two sets in a plane of a space of 50 dimensions: the distance is that within the plane."""
    plane = np.linalg.qr(np.random.default_rng(6).standard_normal((50, 2)))[0]
    first = features_with(np.zeros(2), np.diag([1.0, 4.0]), 10, 7)
    second = features_with(np.array([3.0, 0.0]), np.diag([4.0, 1.0]), 12, 8)
    expected = 9 + (1 - 2) ** 2 + (2 - 1) ** 2
    assert frechet_distance(first @ plane.T, second @ plane.T) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_equal_sets_is_zero():
    rows = np.random.default_rng(9).standard_normal((30, 8)).astype(np.float32)
    assert frechet_distance(rows, rows[::-1]) == pytest.approx(0, abs=1e-10)


def test_frechet_bad_input():
    with pytest.raises(ValueError, match=r"first \[3, 4\] and second \[3, 5\]"):
        frechet_distance(np.zeros((3, 4)), np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"N, M >= 2"):
        frechet_distance(np.zeros((1, 4)), np.zeros((3, 4)))


def test_projection_keeps_the_directions_of_most_variance():
    scale = np.array([0.1, 5.0, 0.2, 3.0])
    rows = np.random.default_rng(10).standard_normal((500, 4)) * scale + 7
    projected = Projection(rows, 2)(rows)
    assert np.abs(projected.mean(axis=0)).max() < 1e-9
    kept = projected.var(axis=0).sum() / rows.var(axis=0).sum()
    assert kept > 0.99
    with pytest.raises(ValueError, match="dimensions is 600, but there are only 500"):
        Projection(rows, 600)


def test_motion_distance_sees_what_frames_cannot():
    """Frames shuffled within each clip: the same pictures, another motion."""
    random = np.random.default_rng(11)
    walk = np.cumsum(random.standard_normal((40, 9, 3)), axis=1)
    shuffled = walk[:, random.permutation(9)]
    distances = clip_distances(shuffled, walk)
    assert distances["frames"] == pytest.approx(0, abs=1e-9)
    assert distances["motion"] > 1


@pytest.fixture(scope="module")
def network() -> FrameFeatures:
    try:
        return FrameFeatures()
    except WaltError as error:
        pytest.skip(str(error))


class TestFrameFeatures:
    def test_distance_grows_with_noise(self, network):
        random = np.random.default_rng(12)
        y, x = np.mgrid[0:32, 0:32]
        phase = random.uniform(0, 6, (12, 1, 1, 3))
        waves = 127 + 90 * np.sin(x[None, :, :, None] / random.uniform(1, 6, (12, 1, 1, 1)) + y[..., None] / 5 + phase)
        clean = waves[:, None].repeat(2, axis=1)
        sets = [np.clip(clean + random.normal(0, s, clean.shape), 0, 255).astype(np.uint8) for s in (0, 10, 40)]
        rows = [network(video, progress=False) for video in sets]
        assert rows[0].shape == (12, 2, 1280)
        small, large = (frechet_distance(r.reshape(24, -1), rows[0].reshape(24, -1)) for r in rows[1:])
        assert 0 < 2 * small < large

    def test_frames_are_independent_of_the_batch(self, network):
        video = np.random.default_rng(13).integers(0, 256, (2, 3, 32, 32, 3), np.uint8)
        whole = network(video, progress=False)
        pieces = network(video, batch=2, progress=False)
        assert np.abs(whole - pieces).max() < 1e-4
        assert np.abs(whole[0, 0] - whole[0, 1]).max() > 0.01
