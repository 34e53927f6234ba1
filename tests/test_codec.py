"""walt encode and decode: the numbers of the whole film, in memory that does not grow with its length."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import fails
from safetensors.torch import load_file, safe_open, save_file
from tiny_runs import fit, moving

from walt.cli import main
from walt.data.pixels import to_model, to_pixels
from walt.data.video import read_video, write_mp4
from walt.model.tokenizer_tiles import decode_tiled, encode_tiled
from walt.pretrained import load_tokenizer
from walt.sample import codec

pytest.importorskip("av", reason="PyAV is not installed")

FULL_FRAME = {"tile": (1 << 16, 1 << 16), "overlap": 0}
TILES = {"tile": (32, 48), "overlap": 8}
GROWTH = 10 << 20  # bytes; as numbers for a network, the pixels of the long film are 24 MB

# Encode and decode a short film, and then a long one, and print the most memory that was held until then. The tokenizer
# is quick: that its own streams do not grow is tested in test_tokenizer_streams.py.
LONG = """
import resource, sys
from pathlib import Path
from walt.checkpoint import TensorFiles
from walt.model.config import TokenizerConfig
from walt.model.tokenizer import Tokenizer
from walt.sample.codec import decode_film, encode_film

class Quick(Tokenizer):
    def encode_chunks(self, chunks):
        return (chunk[:, [0, 1, 2, 0], -1:, ::8, ::8] for chunk in chunks)

    def decode_chunks(self, chunks):
        for i, chunk in enumerate(chunks):
            video = chunk[:, :3].repeat_interleave(8, 3).repeat_interleave(8, 4)
            yield video if i == 0 else video.expand(-1, -1, 4, -1, -1)

tokenizer = Quick(TokenizerConfig(channels=4, multipliers=(1, 1, 1, 1), blocks=1, latent_channels=4, groups=2))
folder = Path(sys.argv[1])
for name in ("short", "long"):
    for options in ({}, {"tile": (64, 40), "overlap": 8}):
        latents = folder / f"{name}.safetensors"
        encode_film(tokenizer, folder / f"{name}.mp4", latents, **options)
        frames, *_ = decode_film(tokenizer, TensorFiles(latents), folder / "again.mp4", 8, **options)
    print(frames, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.fixture(scope="module")
def model(films, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("model") / "run"
    fit("tokenizer", films, out)
    return out


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


@pytest.mark.parametrize(("options", "tiles"), [((), FULL_FRAME), (("--tile", "32x48"), TILES)], ids=["whole", "tiles"])
def test_the_bits_of_the_whole_film(model, tmp_path, monkeypatch, options, tiles):
    """13 frames of 15, of 56x96 pixels of 60x100."""
    write_mp4(tmp_path / "film.mp4", moving(3, 15, 60, 100), fps=8)
    tokenizer, film = load_tokenizer(model / "tokenizer"), read_video(tmp_path / "film.mp4")
    latents = tmp_path / "a.safetensors"
    run("encode", "--from", model, "--video", tmp_path / "film.mp4", "--out", latents, *options)
    latent = load_file(latents)["latent"]
    assert latent.dtype == torch.float32
    assert torch.equal(latent, encode_tiled(tokenizer, to_model(film[None, :13, :56, :96]), **tiles))
    assert float(safe_open(latents, "pt").metadata()["fps"]) == 8
    written = []
    monkeypatch.setattr(codec, "write_video", lambda path, frames, fps: written.append((np.stack(list(frames)), fps)))
    run("decode", "--from", model, "--latents", latents, "--out", tmp_path / "b.mp4", *options)
    assert np.array_equal(written[0][0], to_pixels(decode_tiled(tokenizer, latent, **tiles))[0])
    assert written[0][1] == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "film.mp4"]


def test_a_gif(model, tmp_path):
    write_mp4(tmp_path / "film.mp4", moving(3, 5, 16, 16), fps=8)
    run("encode", "--from", model, "--video", tmp_path / "film.mp4", "--out", tmp_path / "a.safetensors")
    run("decode", "--from", model, "--latents", tmp_path / "a.safetensors", "--out", tmp_path / "b.gif")
    assert read_video(tmp_path / "b.gif").shape == (5, 16, 16, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is that of Linux")
def test_memory_does_not_grow_with_the_film(tmp_path):
    """Whole and in tiles."""
    scene = moving(1, 50)
    write_mp4(tmp_path / "short.mp4", scene[:17])
    write_mp4(tmp_path / "long.mp4", (scene[i % 50] for i in range(500)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", LONG, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert process.returncode == 0, process.stderr
    frames, before, more_frames, after = map(int, process.stdout.split())
    assert (frames, more_frames) == (17, 497)
    assert (after - before) * 1024 < GROWTH


def test_a_film_that_breaks_off_leaves_nothing(model, tmp_path, capsys):
    write_mp4(tmp_path / "film.mp4", moving(3, 9))
    (tmp_path / "text.mp4").write_text("text")
    source = ("encode", "--from", model, "--out", tmp_path / "a.safetensors", "--video")
    assert "is not a video that can be decoded" in fails(capsys, *source, tmp_path / "text.mp4")
    save_file({"latent": torch.full((1, 4, 2, 2, 2), float("nan"))}, tmp_path / "nan.safetensors")
    save_file({"latent": torch.ones(4, 2)}, tmp_path / "flat.safetensors")
    decode = ("decode", "--from", model, "--out", tmp_path / "a.mp4", "--latents")
    assert "expected floating point [B, 4, 1+k, h, w]" in fails(capsys, *decode, tmp_path / "flat.safetensors")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"film.mp4", "text.mp4", "nan.safetensors", "flat.safetensors"}
