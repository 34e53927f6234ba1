"""walt.evaluate: one pass over batches, numbers with their protocol, networks that follow the eye."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest

from walt.data.simulator import film_path, random_film_clips
from walt.errors import WaltError
from walt.evaluate.evaluate import Evaluation, batches, evaluate
from walt.evaluate.metrics import colour_error, frechet_distance, inception_score, psnr, ssim
from walt.evaluate.networks import FrameFeatures, Projected, Projection, VideoFeatures


class Means:
    """Mean colours: of whole clips [N, 3], or of frames [N, T, 3]. Counts the clips it has seen."""

    def __init__(self, axes: tuple[int, ...]) -> None:
        self.axes, self.seen, self.description = axes, 0, f"mean colours over axes {axes}"

    def __call__(self, clips: np.ndarray) -> np.ndarray:
        self.seen += len(clips)
        return clips.mean(axis=self.axes)


class Reddest:
    """A classifier: how the red of a clip is shared out over its frames."""

    description = "reddest frame"

    def __call__(self, clips: np.ndarray) -> np.ndarray:
        red = clips[..., 0].astype(np.float64).mean(axis=(2, 3))
        return red / red.sum(axis=1, keepdims=True)


def make(count: int, seed: int, shape: tuple[int, ...] = (4, 12, 16)) -> np.ndarray:
    random = np.random.default_rng(seed)
    base = random.integers(0, 200, (count, shape[0], 1, 1, 3))
    return (base + random.integers(0, 50, (count, *shape, 3))).astype(np.uint8)


CLIPS, FRAMES = (1, 2, 3), (2, 3)


def test_batches():
    clips = make(5, 0)
    assert [len(part) for part in batches(clips, 2)] == [2, 2, 1]
    assert np.array_equal(np.concatenate(list(batches(iter([clips[:1], clips[1:1], clips[1:]])))), clips)
    for bad, match in (
        (clips.astype(np.float32), r"real: got float32 \[5, 4, 12, 16, 3\]; expected uint8"),
        (clips[0], r"real: got uint8 \[4, 12, 16, 3\]; expected uint8 \[N, T, H, W, 3\]"),
        ([[1, 2]], "real: got list; expected uint8"),
        ([clips, clips[:, :3]], r"real: got clips of \[3, 12, 16, 3\]; expected \[4, 12, 16, 3\], like the first"),
    ):
        with pytest.raises(ValueError, match=match):
            list(batches(bad, name="real"))


def distance(real, fake, metric: str, network) -> float:
    return evaluate(real, fake, [metric], video=network, image=network, progress=False).values[metric]


def test_distances_of_two_sets():
    real, fake = make(20, 1), make(30, 2)
    network = Means(CLIPS)
    expected = frechet_distance(real.mean(axis=CLIPS), fake.mean(axis=CLIPS))
    assert distance(real, fake, "fvd", network) == pytest.approx(expected, rel=1e-12)
    assert distance((real[:7], real[7:]), iter([fake]), "fvd", network) == pytest.approx(expected, rel=1e-12)
    assert distance(real, real[::-1], "fvd", network) == pytest.approx(0, abs=1e-9)
    frames = [clips.mean(axis=FRAMES).reshape(-1, 3) for clips in (real, fake)]
    expected = frechet_distance(*frames)
    assert distance(real, fake, "frechet_image_distance", Means(FRAMES)) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="fake: got 1 clips; expected at least 2"):
        distance(real, fake[:1], "fvd", network)
    with pytest.raises(ValueError, match="real, fake: got no clips"):
        distance([], [], "fvd", network)


def test_evaluate_measures_everything_in_one_pass():
    real, fake = make(9, 3), make(9, 4)
    video, image, classifier = Means(CLIPS), Means(FRAMES), Reddest()
    consumed = (clips for clips in (iter([real[:4], real[4:]]), iter([fake[:4], fake[4:]])))
    every = ("fvd", "frechet_image_distance", "inception_score", "psnr", "ssim")
    result = evaluate(*consumed, every, video=video, image=image, classifier=classifier, progress=False)
    assert (video.seen, image.seen) == (18, 18)
    assert (result.real, result.fake, result.clip) == (9, 9, (4, 12, 16))
    assert result.values == pytest.approx(
        {
            "fvd": distance(real, fake, "fvd", Means(CLIPS)),
            "frechet_image_distance": distance(real, fake, "frechet_image_distance", Means(FRAMES)),
            "inception_score": inception_score(classifier(fake)),
            "psnr": psnr(fake, real).mean(),
            "ssim": ssim(fake, real).mean(),
        },
        rel=1e-12,
    )
    whole = evaluate(real, fake, every, video=video, image=image, classifier=classifier, progress=False)
    assert whole.values == pytest.approx(result.values, rel=1e-12)
    assert json.loads(json.dumps(asdict(result)))["values"] == result.values


def test_every_number_is_printed_with_its_protocol():
    real, fake = make(6, 5), make(8, 6)
    result = evaluate(real, fake, video=Means(CLIPS), image=Means(FRAMES), classifier=Reddest(), progress=False)
    text = str(result)
    assert "6 real clips and 8 compared with them, 4 frames of 12x16 pixels" in text
    assert f"FVD{result.values['fvd']:31.2f}" in text
    for line in (
        "Frechet distance in float64 of 6 and 8 clips; mean colours over axes (1, 2, 3)",
        "fewer than 2,048 clips a side: biased upwards, not comparable with published FVD",
        "published FVD is of clips of 16 frames; these have 4",
        "Frechet distance in float64 of 24 and 32 frames; mean colours over axes (2, 3)",
        "not comparable with published FID",
        "over 8 clips in one split; p(y|x): reddest frame",
        "between 1 and 4 here",
    ):
        assert line in text


def test_caveats_go_when_their_reason_goes():
    """Enough clips of 16 frames, and more frames than features, are not said to be too few."""
    clips = make(2048, 7, (16, 1, 1))
    lines = evaluate(
        clips, clips, ("fvd", "frechet_image_distance"), video=Means(CLIPS), image=Means(FRAMES), progress=False
    ).lines()
    assert not [line for line in lines if "biased" in line or "published FVD" in line]


def test_the_score_falls_back_on_the_logits_of_the_video_network():
    class Logits:
        description, seen = "logits", 0

        def __call__(self, clips: np.ndarray) -> np.ndarray:
            self.seen += len(clips)
            return 1e4 * np.eye(4, dtype=np.float32)[clips[:, 0, 0, 0, 0] % 4]

    fake = make(8, 8)
    fake[:, 0, 0, 0, 0] = range(8)
    network = Logits()
    result = evaluate(make(1, 9), fake, ["inception_score"], video=network, progress=False)
    assert network.seen == 8  # of the fake clips alone
    assert result.values["inception_score"] == pytest.approx(4)
    assert "p(y|x): softmax of logits" in result.lines()[2]


def test_evaluate_bad_input():
    real, fake = make(4, 10), make(4, 11)
    with pytest.raises(ValueError, match="metrics: got fid; expected some of fvd, "):
        evaluate(real, fake, ["fvd", "fid"], video=Means(CLIPS))
    with pytest.raises(ValueError, match="metrics: got none"):
        evaluate(real, fake, [])
    with pytest.raises(ValueError, match=r"fake: got clips of \[3, 12, 16\]; expected \[4, 12, 16\], like real"):
        evaluate(real, fake[:, :3], ["psnr"], progress=False)
    with pytest.raises(ValueError, match="fake: got batches of 4 and 3 clips; psnr pairs them"):
        evaluate(real, fake[:3], ["psnr"], progress=False)
    with pytest.raises(ValueError, match="fake: got batches of 1 and none clips"):
        evaluate([real, real[:1]], fake, ["ssim"], progress=False)
    with pytest.raises(ValueError, match="real: got 1 clips; expected at least 2"):
        evaluate(real[:1], fake, ["fvd"], video=Means(CLIPS), progress=False)
    with pytest.raises(ValueError, match="got no clips"):
        evaluate([], [], ["psnr"], progress=False)


def test_one_clip_is_enough_to_compare_a_reconstruction():
    real, fake = make(1, 12), make(1, 13)
    result = evaluate(real, fake, ["psnr", "ssim"], progress=False)
    assert isinstance(result, Evaluation)
    assert result.values["psnr"] == pytest.approx(psnr(fake, real)[0])
    assert "mean over 1 clips" in str(result)


def test_paired_metrics_class_by_class():
    real, fake = make(4, 12), make(4, 13)
    labels = ["b", "a", "b", ""]
    result = evaluate(real, fake, ["psnr", "colour"], labels=labels, progress=False)
    each = {"psnr": psnr(fake, real), "colour": colour_error(fake, real)}
    for name, values in each.items():
        assert result.values[name] == pytest.approx(values.mean())
        assert result.by_class[name] == pytest.approx({"a": values[1], "b": values[[0, 2]].mean()})
    assert f"  a{each['psnr'][1]:31.2f}" in str(result)
    with pytest.raises(ValueError, match="labels: got 3; expected 4, one for each clip"):
        evaluate(real, fake, ["psnr"], labels=labels[:3], progress=False)


def test_features_along_the_components_of_a_reference():
    reference, clips = make(20, 14), make(5, 15)
    network = Projected(Means(FRAMES), reference, 2)
    known = Means(FRAMES)(reference)
    np.testing.assert_allclose(network(clips), Projection(known, 2)(Means(FRAMES)(clips)))
    assert network.description == "mean colours over axes (2, 3), first 2 principal components of 80 real frames"


def test_projection_keeps_the_directions_of_most_variance():
    scale = np.array([0.1, 5.0, 0.2, 3.0])
    rows = np.random.default_rng(10).standard_normal((500, 4)) * scale + 7
    projected = Projection(rows, 2)(rows)
    assert np.abs(projected.mean(axis=0)).max() < 1e-9
    kept = projected.var(axis=0).sum() / rows.var(axis=0).sum()
    assert kept > 0.99
    with pytest.raises(ValueError, match="dimensions is 600, but there are only 500"):
        Projection(rows, 600)


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
        rows = [network(video) for video in sets]
        assert rows[0].shape == (12, 2, 1280)
        small, large = (frechet_distance(r.reshape(24, -1), rows[0].reshape(24, -1)) for r in rows[1:])
        assert 0 < 2 * small < large

    def test_frames_are_independent_of_the_batch(self, network):
        video = np.random.default_rng(13).integers(0, 256, (2, 3, 32, 32, 3), np.uint8)
        whole = network(video)
        pieces = network(video, batch=2)
        assert np.abs(whole - pieces).max() < 1e-4
        assert np.abs(whole[0, 0] - whole[0, 1]).max() > 0.01


class TestVideoFeatures:
    def test_distances_follow_the_eye(self):
        """Noise counts by its strength, and so does the order of the frames, which no frame shows."""
        try:
            network, path = VideoFeatures(), film_path()
        except WaltError as error:
            pytest.skip(str(error))
        assert "Kinetics-400" in network.description
        assert "not DeepMind's" not in network.description
        pytest.importorskip("av", reason="av is not installed")
        real = np.stack([clip.video for clip in random_film_clips(path, (60, 80), 2, frames=9, seed=1)])
        noise = np.random.default_rng(17).standard_normal(real.shape)
        weak, strong = (np.clip(real + s * noise, 0, 255).astype(np.uint8) for s in (8, 32))
        shuffled = real[:, [4, 0, 7, 2, 8, 1, 6, 3, 5]]
        known = network(real)
        low, high, order = (frechet_distance(network(clips), known) for clips in (weak, strong, shuffled))
        assert 1 < low < high
        assert order > 1
