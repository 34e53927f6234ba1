"""`walt encode` and `walt decode`: the tokenizer alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from walt.checkpoint import TensorFiles, fingerprint
from walt.commands.model import ModelCommand
from walt.commands.options import Rate, Size
from walt.data.video import FPS, check_output
from walt.errors import WaltError, as_user_error
from walt.evaluate.real_clips import trained_on
from walt.model.config import SPACE_FACTOR
from walt.pretrained import model_folder
from walt.rates import check_rate
from walt.sample.codec import decode_film, encode_film


@dataclass(kw_only=True)
class Tiled(ModelCommand):
    tile: Size | None = None  # size of overlapping tiles in pixels, to save memory (default: the frame)

    def tiles(self) -> dict[str, Any]:
        if self.tile is None:
            return {}
        return {"tile": self.tile, "overlap": min(self.tile) // 4 // SPACE_FACTOR * SPACE_FACTOR}


@dataclass(kw_only=True)
class Encode(Tiled):
    video: Path  # its edges are cut to multiples of 8 pixels
    out: Path  # .safetensors

    examples = ("walt encode --from runs/mine --video film.mp4 --out film.safetensors",)

    def run(self) -> None:
        check_output(self.out, (".safetensors",))
        tokenizer = self.tokenizer()
        with as_user_error("--tile"):
            film, shape = encode_film(tokenizer, self.video, self.out, **self.tiles())
        _, frames, height, width = tokenizer.config.video_shape(*shape[2:])
        cut = f" (cut from {film[0]} of {film[1]}x{film[2]}: 1 + 4k, multiples of 8)"
        size = f"{height}x{width}{'' if film == (frames, height, width) else cut}"
        print(f"{self.out}: {frames} frames of {size} -> latent {shape}")


@dataclass(kw_only=True)
class Decode(Tiled):
    latents: Path  # what walt encode wrote
    out: Path  # .mp4 or .gif
    fps: Rate | None = None  # frames a second, such as 24 or 30000/1001 (default: the encoded video's)

    examples = ("walt decode --from runs/mine --latents film.safetensors --out film.mp4",)

    def run(self) -> None:
        check_output(self.out)
        tokenizer = self.tokenizer()
        if not self.latents.is_file():
            raise WaltError(f"no such file: {self.latents}")
        files = TensorFiles(self.latents)
        if "latent" not in files.shapes:
            raise WaltError(f"{self.latents} holds no tensor named latent; expected what walt encode writes")
        key = fingerprint(tokenizer)
        if files.metadata.get("tokenizer", key) != key:
            raise WaltError(
                f"{self.latents} holds latents of another tokenizer than {self.from_};"
                " encode the video again, or name the model that it was encoded with"
            )
        with as_user_error(str(self.latents)):
            # Pictures and old files have no rate.
            stored = float(files.metadata.get("fps", 0))
            fps = self.fps or stored or trained_on(model_folder(self.from_))[0]["fps"] or FPS
            check_rate(fps)
            frames, height, width = decode_film(tokenizer, files, self.out, fps, **self.tiles())
        print(f"{self.out}: {frames} frames of {height}x{width}, {fps:g} a second")
