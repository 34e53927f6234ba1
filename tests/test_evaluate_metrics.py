"""walt.evaluate.metrics against closed forms and against independent implementations in SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import linalg, signal, stats

from walt.evaluate.metrics import clip_distances, colour_error, frechet_distance, inception_score, psnr, ssim


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


def test_colour_error_is_of_the_means_of_frames():
    target = np.full((2, 2, 4, 4, 3), 100, np.uint8)
    output = target.copy()
    output[0, 0, :2] += 51  # half of the first of two frames
    output[1, :, :2, :, 0] += 51
    output[1, :, 2:, :, 0] -= 51  # so that the mean stays
    assert colour_error(output, target) == pytest.approx([51 / 2 / 2 / 127.5, 0])
    with pytest.raises(ValueError, match="must both be uint8 and of one shape"):
        colour_error(output, target[:1])


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


def test_motion_distance_sees_what_frames_cannot():
    """Frames shuffled within each clip: the same pictures, another motion."""
    random = np.random.default_rng(11)
    walk = np.cumsum(random.standard_normal((40, 9, 3)), axis=1)
    shuffled = walk[:, random.permutation(9)]
    distances = clip_distances(shuffled, walk)
    assert distances["frames"] == pytest.approx(0, abs=1e-9)
    assert distances["motion"] > 1


def scipy_ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Of one channel of one frame, from the paper's definition: a two-dimensional window, centred moments."""
    offset = np.arange(11) - 5
    window = np.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for top in range(first.shape[0] - 10):
        for left in range(first.shape[1] - 10):
            x, y = (frame[top : top + 11, left : left + 11].astype(np.float64) for frame in (first, second))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            covariance = (window * (x - mx) * (y - my)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            similarity = (2 * mx * my + c1) * (2 * covariance + c2)
            values.append(similarity / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def test_ssim_is_the_definition():
    random = np.random.default_rng(14)
    smooth = signal.convolve(random.uniform(0, 255, (2, 3, 24, 28, 3)), np.ones((1, 1, 5, 5, 1)) / 25, "valid")
    target = smooth.astype(np.uint8)  # [2, 3, 20, 24, 3]
    output = np.clip(smooth + random.normal(0, [[[[[4]]]], [[[[20]]]]], smooth.shape), 0, 255).astype(np.uint8)
    expected = [
        np.mean([scipy_ssim(a[..., c], b[..., c]) for a, b in zip(*clips, strict=True) for c in range(3)])
        for clips in zip(output, target, strict=True)
    ]
    measured = ssim(output, target)
    assert measured.dtype == np.float64
    assert measured == pytest.approx(expected, rel=1e-9)
    assert measured[1] < measured[0] < 1
    assert ssim(target, output) == pytest.approx(expected, rel=1e-12)


def test_ssim_of_equal_and_of_flat_frames():
    random = np.random.default_rng(15)
    clips = random.integers(0, 256, (2, 11, 11, 3), np.uint8)
    assert ssim(clips, clips) == pytest.approx([1, 1], abs=1e-12)
    dark, light = np.full((1, 12, 12, 3), 60, np.uint8), np.full((1, 12, 12, 3), 180, np.uint8)
    c1 = 2.55**2
    assert ssim(dark, light) == pytest.approx([(2 * 60 * 180 + c1) / (60**2 + 180**2 + c1)], rel=1e-9)


def test_ssim_bad_input():
    small = np.zeros((1, 2, 10, 16, 3), np.uint8)
    with pytest.raises(ValueError, match=r"output: got \[1, 2, 10, 16, 3\]; expected .* at least 11"):
        ssim(small, small)
    with pytest.raises(ValueError, match="must both be uint8 and of one shape"):
        ssim(small, small[:, :1])


def test_inception_score_of_certain_and_of_blind_classifiers():
    """N different certain answers score N; the same answer, certain or not, scores 1."""
    assert inception_score(np.eye(5)) == pytest.approx(5, rel=1e-12)
    assert inception_score(np.eye(5)[[0, 1, 2, 0, 1, 2]]) == pytest.approx(3, rel=1e-12)
    assert inception_score(np.full((7, 10), 0.1)) == pytest.approx(1, rel=1e-12)
    assert inception_score(np.eye(4)[[2, 2, 2]]) == pytest.approx(1, rel=1e-12)


def test_inception_score_is_exp_of_the_mean_divergence():
    p = np.random.default_rng(16).dirichlet(np.ones(6), 30)
    divergence = [stats.entropy(row, p.mean(axis=0)) for row in p]
    assert inception_score(p.astype(np.float32)) == pytest.approx(np.exp(np.mean(divergence)), rel=1e-6)


def test_inception_score_bad_input():
    with pytest.raises(ValueError, match=r"probabilities: got \[1, 3\]; expected \[N, K\] with N >= 2"):
        inception_score(np.full((1, 3), 1 / 3))
    for bad in (np.array([[2.0, -1.0], [0.5, 0.5]]), np.array([[0.5, 0.6], [0.5, 0.5]]), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="rows that are no distributions"):
            inception_score(bad)
