"""walt.data.shots: cuts are found to the frame, motion and flicker are none."""

from __future__ import annotations

import numpy as np
import pytest
from films import noise

from walt.data.pixels import cover
from walt.data.shots import ShotDetector, find_cuts
from walt.data.simulator import film_path
from walt.data.video import iterate_video
from walt.errors import WaltError


def shots_of(frames) -> tuple[tuple[int, int], ...]:
    detector = ShotDetector()
    for picture in frames:
        detector.add(picture)
    return detector.shots()


@pytest.mark.parametrize(
    ("name", "cuts"), [("bikes", [29, 75, 136, 186, 241]), ("bigbuckbunny", []), ("carphone_pristine", [])]
)
def test_real_films(name, cuts):
    pytest.importorskip("av", reason="PyAV is not installed")
    try:
        path = film_path().with_name(f"{name}.mp4")
    except WaltError as error:
        pytest.skip(str(error))
    shots = shots_of(cover(picture, 64, 64) for picture in iterate_video(path))
    assert len(shots) == len(cuts) + 1
    assert all(abs(first - cut) <= 1 for (first, _), cut in zip(shots[1:], cuts, strict=True))


def test_cut_between_still_scenes():
    assert shots_of(np.concatenate([noise(5, 0), noise(3, 1), noise(1, 2)])) == ((0, 5), (5, 8), (8, 9))


def test_short_films():
    assert shots_of([]) == ()
    assert shots_of(noise(1, 0)) == ((0, 1),)
    assert shots_of(noise(2, 0)) == ((0, 2),)


def test_a_moving_picture_on_twos_is_one_shot():
    scene = np.concatenate([noise(1, seed, 32, 96)[0] for seed in range(6)], axis=1)
    pan = [scene[:, shift : shift + 48] for shift in np.arange(0, 480, 20).repeat(2)]
    assert shots_of(pan) == ((0, len(pan)),)


def test_a_change_of_light_is_no_cut():
    scene = noise(1, 0)[0].astype(float)
    assert shots_of(np.stack([scene * light for light in np.linspace(1, 0.2, 12)]).astype(np.uint8)) == ((0, 12),)


def test_both_numbers_must_stand_out():
    quiet = np.tile([2.0, 0.03], (20, 1))
    for jump, cuts in (([60, 0.5], [11]), ([60, 0.05], []), ([5, 0.5], []), ([9.9, 0.5], []), ([60, 0.09], [])):
        differences = quiet.copy()
        differences[10] = jump
        assert find_cuts(differences) == cuts
    assert find_cuts(np.tile([60.0, 0.5], (20, 1))) == []
