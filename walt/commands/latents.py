"""`walt encode` and `walt decode`: the tokenizer alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from walt.atomic import atomic_write
from walt.checkpoint import TensorFiles, fingerprint, write_tensors
from walt.commands.model import ModelCommand
from walt.commands.options import Rate, Size
from walt.data.pixels import to_model, to_pixels
from walt.data.video import (
    FPS,
    IMAGE_SUFFIXES,
    check_output,
    check_size,
    frame_rate,
    read_image,
    read_video,
    write_video,
)
from walt.errors import WaltError, as_user_error
from walt.evaluate.real_clips import trained_on
from walt.model.config import SPACE_FACTOR
from walt.model.tokenizer_tiles import decode_tiled, encode_tiled
from walt.rates import check_rate
from walt.sample.denoiser import local_folder

TILE = (1 << 16, 1 << 16)  # the whole frame


@dataclass(kw_only=True)
class Tiled(ModelCommand):
    tile: Size | None = None  # work on overlapping tiles of so many pixels

    def tiles(self) -> dict[str, Any]:
        if self.tile is None:
            return {"tile": TILE, "overlap": 0}
        return {"tile": self.tile, "overlap": min(self.tile) // 4 // SPACE_FACTOR * SPACE_FACTOR}


@dataclass(kw_only=True)
class Encode(Tiled):
    video: Path  # its edges are cut to multiples of 8 pixels
    out: Path  # .safetensors

    examples = ("walt encode --from runs/mine --video film.mp4 --out film.safetensors",)

    def run(self) -> None:
        check_output(self.out, (".safetensors",))
        tokenizer = self.tokenizer()
        if self.video.suffix.lower() in IMAGE_SUFFIXES:
            video, fps = read_image(self.video)[None], 0.0
        else:
            video, fps = read_video(self.video), frame_rate(self.video)
        factor = tokenizer.config.time_factor
        frames = 1 + (len(video) - 1) // factor * factor
        height, width = (side // SPACE_FACTOR * SPACE_FACTOR for side in video.shape[1:3])
        if min(height, width) < SPACE_FACTOR:
            raise WaltError(f"{self.video}: {video.shape[1]}x{video.shape[2]} pixels; expected at least 8x8")
        pixels = to_model(video[None, :frames, :height, :width]).to(tokenizer.latent_mean)
        with as_user_error("--tile"):
            latent = encode_tiled(tokenizer, pixels, **self.tiles())
        with atomic_write(self.out) as temporary:
            metadata = {"tokenizer": fingerprint(tokenizer)} | ({"fps": str(fps)} if fps else {})
            write_tensors(temporary, {"latent": latent.cpu()}, metadata)
        cut = "" if frames == len(video) else f" (of {len(video)}: a clip has 1 + 4k)"
        print(f"{self.out}: {frames} frames{cut} of {height}x{width} -> latent {list(latent.shape)}")


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
            # Pictures have no rate, nor have files from before it was written.
            stored = float(files.metadata.get("fps", 0))
            fps = self.fps or stored or trained_on(local_folder(self.from_))[0]["fps"] or FPS
            latent = files.read("latent").to(tokenizer.latent_mean)
            check_rate(fps)
            check_size(self.out, *(SPACE_FACTOR * side for side in latent.shape[-2:]))
            video = decode_tiled(tokenizer, latent, **self.tiles())
        write_video(self.out, to_pixels(video.cpu())[0], fps)
        print(f"{self.out}: {video.shape[2]} frames of {video.shape[3]}x{video.shape[4]}, {fps:g} a second")
