"""Labelled clips from ViZDoom: a class is a scenario, a clip is one episode played by random key presses.

Each episode has a seed of its own, so a clip depends on (seed, scenario, episode) alone, and a split by episode
shares no episode. ViZDoom renders on the CPU at thousands of frames a second and needs no screen.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from walt.errors import WaltError, require

SCENARIOS = (
    "basic",
    "deadly_corridor",
    "defend_the_center",
    "defend_the_line",
    "health_gathering",
    "my_way_home",
    "take_cover",
)
# What a captioned clip may show: where a scenario takes place, and the keys that seldom lead into a wall there.
CAPTIONED = {
    "basic": ("in a brick hall", ("MOVE_LEFT", "MOVE_RIGHT")),
    "deadly_corridor": ("in a dark corridor", ("TURN_LEFT", "TURN_RIGHT")),
    "defend_the_center": ("in a round arena", ("TURN_LEFT", "TURN_RIGHT")),
    "defend_the_line": ("in a grey hall", ("TURN_LEFT", "TURN_RIGHT")),
    "health_gathering": ("on a green field", ("TURN_LEFT", "TURN_RIGHT", "MOVE_FORWARD")),
    "my_way_home": ("in a maze", ("TURN_LEFT", "TURN_RIGHT", "MOVE_FORWARD")),
    "take_cover": ("before a brick wall", ("MOVE_LEFT", "MOVE_RIGHT")),
}
ACTIONS = {
    "TURN_LEFT": "turning left",
    "TURN_RIGHT": "turning right",
    "MOVE_LEFT": "stepping left",
    "MOVE_RIGHT": "stepping right",
    "MOVE_FORWARD": "moving forward",
}
TICS_PER_FRAME = 2  # the game runs at 35 tics a second, so a clip plays at 17.5 frames a second
_ATTEMPTS = 20
_MOVES = 2.0  # grey levels of 255 by which neighbouring frames differ, on average, if the player moves


@contextlib.contextmanager
def open_game(scenario: str) -> Iterator[Any]:
    """A running game without window, sound or status bar. ViZDoom litters the working folder, so it gets its own."""
    vizdoom = require("vizdoom", "demo")
    if scenario not in SCENARIOS:
        raise WaltError(f"unknown scenario {scenario!r}; there are {', '.join(SCENARIOS)}")
    home = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="walt-vizdoom-", ignore_cleanup_errors=True) as folder:
        game = vizdoom.DoomGame()
        try:
            os.chdir(folder)
            game.load_config(os.path.join(vizdoom.scenarios_path, f"{scenario}.cfg"))
            game.set_window_visible(False)
            game.set_sound_enabled(False)
            game.set_render_hud(False)
            game.set_mode(vizdoom.Mode.PLAYER)
            game.set_screen_resolution(vizdoom.ScreenResolution.RES_160X120)
            game.set_screen_format(vizdoom.ScreenFormat.RGB24)
            game.init()
            yield game
        finally:
            game.close()
            os.chdir(home)


def render_episode(game: Any, frames: int, seed: tuple[int, ...], key: str | None = None) -> np.ndarray:
    """One clip uint8 [frames, 120, 160, 3], of random keys or with one key held down.

    An episode that ends too soon, or stops moving because the held key leads into a wall, is tried again with the next
    seed.
    """
    for attempt in range(_ATTEMPTS):
        random = np.random.default_rng((*seed, attempt))
        game.set_seed(int(random.integers(1, 2**31)))
        game.new_episode()
        clip = _play(game, frames, random, key)
        if clip is not None and (key is None or _moves(clip)):
            return clip
    raise WaltError(f"{_ATTEMPTS} episodes ended, or stood still, before {frames} frames; ask for fewer frames")


def _play(game: Any, frames: int, random: np.random.Generator, key: str | None) -> np.ndarray | None:
    """Random keys, each held for 4 to 8 frames. Firing is left out: its flash is noise to a small model.

    With `key`, random keys only lead to where the clip starts.
    """
    names = [button.name for button in game.get_available_buttons()]
    usable = np.array([not name.startswith("ATTACK") for name in names])
    warm_up = int(random.integers(8, 24))
    pictures: list[np.ndarray] = []
    keys, held = [0.0] * len(usable), 0
    for index in range(warm_up + frames):
        if game.is_episode_finished():
            return None
        if index >= warm_up:
            pictures.append(np.array(game.get_state().screen_buffer))
        if held == 0:
            keys = ((random.random(len(usable)) < 0.4) & usable).astype(float).tolist()
            held = int(random.integers(4, 9))
        if index >= warm_up and key is not None:
            keys = [float(name == key) for name in names]
        game.make_action(keys, TICS_PER_FRAME)
        held -= 1
    return np.stack(pictures)


def _moves(clip: np.ndarray) -> bool:
    """Whether at least three quarters of its frames differ from those before."""
    change = np.abs(np.diff(clip.astype(np.int16), axis=0)).mean(axis=(1, 2, 3))
    return bool(np.mean(change >= _MOVES) >= 0.75)
