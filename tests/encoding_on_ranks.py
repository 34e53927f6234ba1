"""What each of two ranks does in tests/test_latents_on_ranks.py: `python tests/encoding_on_ranks.py FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from walt.data.clips import ClipStore
from walt.data.latents import LatentStore, encode_latents
from walt.distributed import process_group, rank
from walt.errors import WaltError


class Encoder:
    """Pixels [B, 3, 1+4t, H, W] -> [B, 3, 1+t, H/8, W/8]; keeps the brightness of the first clip of each batch."""

    def __init__(self, fails: int | None = None) -> None:
        self.seen: list[float] = []
        self.fails = fails

    def __call__(self, video: torch.Tensor) -> torch.Tensor:
        if len(self.seen) == self.fails:
            raise KeyboardInterrupt
        self.seen.append(round(float(video[0, 0, 0, 0, 0]), 4))
        return video[:, :, ::4, 3::8, 5::8] * 2


def encoded(store: ClipStore, folder: Path, encode) -> LatentStore:
    sizes = {"frames": 5, "height": 16, "width": 16, "hop": 1, "batch": 2, "dtype": "float32"}
    return encode_latents(store, folder, encode, key="weights", image_every=None, progress=False, **sizes)


def main(out: Path) -> None:
    store, said = ClipStore.open(out / "prepared"), {}
    for name in ("fresh", "resumed"):
        encode = Encoder()
        encoded(store, out / name, encode)
        said[name] = encode.seen
    again = Encoder()
    encoded(store, out / "fresh", again)
    said["again"] = again.seen
    try:
        encoded(store, out / "broken", lambda video: Encoder()(video) * (float("nan") if rank() == 1 else 1))
    except WaltError as error:
        said["broken"] = str(error)
    (out / f"said-{rank()}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group():
        main(Path(sys.argv[1]))
