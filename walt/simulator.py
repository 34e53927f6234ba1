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
TICS_PER_FRAME = 2  # the game runs at 35 tics a second, so a clip plays at 17.5 frames a second
_ATTEMPTS = 20


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


def render_episode(game: Any, frames: int, seed: tuple[int, ...]) -> np.ndarray:
    """One clip uint8 [frames, 120, 160, 3]. An episode that ends too soon is tried again with the next seed."""
    for attempt in range(_ATTEMPTS):
        random = np.random.default_rng((*seed, attempt))
        game.set_seed(int(random.integers(1, 2**31)))
        game.new_episode()
        clip = _play(game, frames, random)
        if clip is not None:
            return clip
    raise WaltError(f"the simulator ended {_ATTEMPTS} episodes before {frames} frames; ask for fewer frames")


def _play(game: Any, frames: int, random: np.random.Generator) -> np.ndarray | None:
    """Random keys, each held for 4 to 8 frames. Firing is left out: its flash is noise to a small model."""
    usable = np.array([not button.name.startswith("ATTACK") for button in game.get_available_buttons()])
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
        game.make_action(keys, TICS_PER_FRAME)
        held -= 1
    return np.stack(pictures)
