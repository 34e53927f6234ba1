"""The clips of a demo: rendered once into two prepared folders, `data` to train on and `held-out`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from walt.atomic import latest_complete, read_json, write_json
from walt.data.clips import INDEX, ClipStore, write_store
from walt.data.simulator import DEMO_FPS, demo_clips
from walt.errors import WaltError

FOLDERS = "data", "held-out"
NOTE = "demo.json"  # which clips these are


@dataclass(frozen=True)
class ClipSet:
    """What the clips depend on."""

    seed: int
    clips: int  # to train on, a class
    held_out: int  # a class
    frames: int
    size: int  # height and width in pixels
    scenarios: tuple[str, ...]  # of ViZDoom, each one a class; the film is one more

    def check_folder(self, out: Path) -> None:
        """WaltError if the folder holds other clips, or what is no demo's at all."""
        path = out / NOTE
        if path.is_file():
            found = read_json(path)
            for name, value in self._note().items():
                if found.get(name) != value:
                    raise WaltError(
                        f"{out} holds a demo of other clips ({name} is {found.get(name)} there, {value} here);"
                        " give the same settings, or another folder"
                    )
            return
        for name in ("tokenizer", "transformer", *FOLDERS):
            if latest_complete(out / name).exists():
                raise WaltError(
                    f"{out / name} is there already, of an older demo or from elsewhere; give another folder"
                )

    def open(self, out: Path) -> tuple[ClipStore, ClipStore]:
        """The clips to train on and those held out, rendered if they are not there."""
        self.check_folder(out)
        folders = [out / name for name in FOLDERS]
        if not all((folder / INDEX).is_file() for folder in folders):
            sets = demo_clips(
                self.clips, self.held_out, scenarios=self.scenarios, frames=self.frames, size=self.size, seed=self.seed
            )
            train, test = ({clip.name for clip in clips} for clips in sets)
            if train & test:
                raise WaltError(
                    f"{len(train & test)} clips are both trained on and held out, such as {min(train & test)}"
                )
            write_json(out / NOTE, self._note())
            for folder, clips in zip(folders, sets, strict=True):
                write_store(folder, clips, DEMO_FPS)
        return ClipStore.open(folders[0]), ClipStore.open(folders[1])

    def read(self, store: ClipStore, items: np.ndarray | None = None, *, size: int | None = None) -> np.ndarray:
        """The clips of items (None: all) at a size (None: as they are stored), uint8 [N, T, H, W, 3]."""
        clips = store.windows(self.frames, hop=self.frames)  # one for each item
        crop = None if size is None else (size, size)
        return store.read(clips if items is None else clips[items], self.frames, crop=crop)

    def _note(self) -> dict[str, object]:
        """As JSON reads it back."""
        return {**asdict(self), "scenarios": list(self.scenarios)}
