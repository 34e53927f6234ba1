"""Films to files of latents and back, a few frames at a time: memory does not grow with the length of a film."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from walt.atomic import atomic_write, writing
from walt.checkpoint import TensorFiles, fingerprint
from walt.data.pixels import to_model, to_pixels
from walt.data.video import IMAGE_SUFFIXES, check_size, frame_rate, iterate_video, read_image, write_video
from walt.errors import WaltError, as_user_error
from walt.model.config import SPACE_FACTOR
from walt.model.tokenizer import Tokenizer
from walt.model.tokenizer_tiles import Piece, decode_pieces, encode_pieces

LATENT = "latent"  # name of the tensor
FULL_FRAME = (1 << 16, 1 << 16)  # a tile that covers any frame


def encode_film(
    tokenizer: Tokenizer, path: Path, out: Path, *, tile: tuple[int, int] = FULL_FRAME, overlap: int = 0
) -> tuple[tuple[int, int, int], list[int]]:
    """Write the latents of a film or picture, float32 [1, c, 1+k, H/8, W/8], to a .safetensors file with the film's
    frame rate and the tokenizer's fingerprint -> the film's frames, height and width, and the shape.

    Its edges are cut to multiples of 8, and its end to 1 + 4k frames. It is read again for each tile. WaltError if it
    cannot be read, ValueError for a tile that does not fit.
    """
    is_image = path.suffix.lower() in IMAGE_SUFFIXES
    fps = 0.0 if is_image else frame_rate(path)

    def film() -> Iterator[np.ndarray]:
        return iter([read_image(path)]) if is_image else iterate_video(path)

    first = next(film(), None)
    if first is None:
        raise WaltError.of(path, "has no frames")
    height, width = (side // SPACE_FACTOR * SPACE_FACTOR for side in first.shape[:2])
    if min(height, width) < SPACE_FACTOR:
        raise WaltError.of(f"{path}:", f"{first.shape[0]}x{first.shape[1]} pixels; expected at least 8x8")
    count = 0

    def chunks(rows: slice, columns: slice) -> Iterator[Tensor]:
        nonlocal count
        count = 0
        held = []
        for picture in film():
            held.append(picture[rows, columns])
            count += 1
            if (count - 1) % tokenizer.config.time_factor == 0:
                yield to_model(np.stack(held)[None]).to(tokenizer.latent_mean)
                held.clear()

    sites = (tokenizer.config.latent_channels, height // SPACE_FACTOR, width // SPACE_FACTOR)
    with atomic_write(out) as temporary, tempfile.TemporaryFile(dir=out.parent) as frames:
        latents = _Frames(frames, sites)
        for piece in encode_pieces(tokenizer, chunks, (height, width), tile=tile, overlap=overlap):
            latents.add(piece)
        shape = [1, sites[0], latents.count, *sites[1:]]
        metadata = {"tokenizer": fingerprint(tokenizer)} | ({"fps": str(fps)} if fps else {})
        with temporary.open("wb") as file:
            file.write(_header(shape, metadata))
            for channel in range(sites[0]):
                for frame in range(latents.count):
                    file.write(latents.plane(frame, channel))
    return (count, *first.shape[:2]), shape


def decode_film(
    tokenizer: Tokenizer,
    files: TensorFiles,
    out: Path,
    fps: float,
    *,
    tile: tuple[int, int] = FULL_FRAME,
    overlap: int = 0,
) -> tuple[int, int, int]:
    """Write the film of what `encode_film` wrote to an .mp4 or .gif -> its frames, height and width.

    WaltError if the file holds no latents of this tokenizer's kind, ValueError for a tile that does not fit.
    """
    with as_user_error(str(files.path)):
        tokenizer.check_latent(torch.empty(files.shapes[LATENT], device="meta"))
    channels, count, height, width = tokenizer.config.video_shape(*files.shapes[LATENT][2:])
    check_size(out, height, width)
    latents = safe_open(files.path, "pt").get_slice(LATENT)

    def chunks(rows: slice, columns: slice) -> Iterator[Tensor]:
        for frame in range(files.shapes[LATENT][2]):
            yield latents[:1, :, frame : frame + 1, rows, columns].to(tokenizer.latent_mean)

    pieces = decode_pieces(tokenizer, chunks, files.shapes[LATENT][3:], tile=tile, overlap=overlap)
    videos: Iterator[Tensor] = (piece.values for piece in pieces)
    if tile[0] < height or tile[1] < width:
        videos = _blended(pieces, out, (channels, height, width))
    write_video(out, (picture for video in videos for picture in to_pixels(video.cpu())[0]), fps)
    return count, height, width


def _blended(pieces: Iterable[Piece], out: Path, shape: tuple[int, int, int]) -> Iterator[Tensor]:
    """The sum of the pieces, frame by frame: [1, C, 1, H, W]. Until then it lies in a file in the folder of `out`."""
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent) as file:
            frames = _Frames(file, shape)
            for piece in pieces:
                frames.add(piece)
            for frame in range(frames.count):
                yield frames.read(frame, 1).transpose(0, 1)[None]


class _Frames:
    """Frames float32 [T, C, H, W], in a file, to which pieces are added."""

    def __init__(self, file: IO[bytes], shape: tuple[int, int, int]) -> None:
        self.file, self.shape, self.bytes = file, shape, 4 * math.prod(shape)
        self.count = 0

    def add(self, piece: Piece) -> None:
        values = piece.values.float()
        values = (values * piece.weight.to(values))[0].transpose(0, 1).cpu()
        held = self.read(piece.frame, len(values))
        held[:, :, piece.rows, piece.columns] += values
        self.file.seek(piece.frame * self.bytes)
        self.file.write(held.numpy().tobytes())
        self.count = max(self.count, piece.frame + len(values))

    def read(self, first: int, count: int) -> Tensor:
        """[count, C, H, W]; those that nothing was added to are 0."""
        self.file.seek(first * self.bytes)
        held = self.file.read(count * self.bytes).ljust(count * self.bytes, b"\0")
        return torch.frombuffer(bytearray(held), dtype=torch.float32).reshape(count, *self.shape)

    def plane(self, frame: int, channel: int) -> bytes:
        size = self.bytes // self.shape[0]
        self.file.seek(frame * self.bytes + channel * size)
        return self.file.read(size)


def _header(shape: list[int], metadata: dict[str, str]) -> bytes:
    """How a .safetensors file begins that holds one float32 tensor."""
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}
    text = json.dumps({"__metadata__": metadata, LATENT: tensor}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
