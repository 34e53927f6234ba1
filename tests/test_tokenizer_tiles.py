"""Tiled encoding and decoding: partitions of unity, an independent blend, one tile, memory, errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_tokenizer import SMALL, draw, make, native, peak_bytes
from small_tokenizer import one_thread as one_thread

from walt.model.tokenizer_tiles import decode_tiled, encode_tiled, tile_starts, tile_weights

SIZES = [(size, side, overlap) for size in range(1, 40) for side in (1, 2, 5, 8) for overlap in range(side)]


def test_tiles_cover_every_size_and_share_what_was_asked() -> None:
    for size, side, overlap in SIZES:
        starts = tile_starts(size, min(side, size), min(overlap, size - 1))
        steps = np.diff(starts)
        assert starts[0] == 0
        assert starts[-1] + min(side, size) == size
        assert (steps >= 1).all()
        assert (steps <= side - overlap).all()
        if size > side:  # one tile fewer could not cover it
            assert (len(starts) - 1) * (side - overlap) < size - overlap <= len(starts) * (side - overlap)


def test_weights_sum_to_exactly_one() -> None:
    for size, side, overlap in SIZES:
        side = min(side, size)
        starts = tile_starts(size, side, min(overlap, side - 1))
        weights = tile_weights(starts, side)
        total = torch.zeros(size, 3)  # float32, and products with another axis' weights
        other = torch.tensor([1.0, 1365 / 4096, 1 - 1365 / 4096])
        for start, weight in zip(starts, weights, strict=True):
            assert (weight >= 0).all()
            total[start : start + side] += torch.outer(weight.float(), other)
        assert torch.equal(total, other.expand(size, 3))


def test_an_overlap_of_two_tiles_is_a_linear_ramp() -> None:
    first, second = tile_weights([0, 6], 10)
    assert first[:6].tolist() == second[4:].tolist() == [1.0] * 6
    assert second[:4].tolist() == [0.125, 0.375, 0.625, 0.875]
    assert first[6:].tolist() == [0.875, 0.625, 0.375, 0.125]


def ramp(count: int, side: int, before: int, after: int) -> np.ndarray:
    """Weights along a tile's side that shares `before` and `after` places with its neighbours."""
    weights = np.ones(side)
    for k in range(before):
        weights[k] *= (k + 0.5) / before
    for k in range(after):
        weights[side - 1 - k] *= (k + 0.5) / after
    return weights


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_a_blend_by_hand(direction: str) -> None:
    """56x40 pixels are 7x5 sites: rows 0-4 and 3-7 (one shared), columns 0-4 and 1-5 (three shared)."""
    tokenizer = make(dtype=torch.float64)
    if direction == "encode":
        whole, scale_in, scale_out = draw(1, 3, 5, 56, 40, dtype=torch.float64), 8, 1
        code, tiled = tokenizer.encode, encode_tiled
    else:
        whole, scale_in, scale_out = draw(1, 4, 2, 7, 5, dtype=torch.float64), 1, 8
        code, tiled = tokenizer.decode, decode_tiled
    expected = np.zeros(code(whole).shape)
    for y, rows in ((0, (0, 1)), (3, (1, 0))):
        for x, columns in ((0, (0, 3)), (1, (3, 0))):
            part = whole[..., y * scale_in : (y + 4) * scale_in, x * scale_in : (x + 4) * scale_in]
            weights = np.outer(*(ramp(4, 4 * scale_out, *(scale_out * n for n in ends)) for ends in (rows, columns)))
            target = expected[..., y * scale_out : (y + 4) * scale_out, x * scale_out : (x + 4) * scale_out]
            target += code(part).numpy() * weights
    actual = tiled(tokenizer, whole, tile=(32, 32), overlap=8)
    assert actual.dtype == torch.float64
    # The ramps are rounded to multiples of 2^-12.
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=2**-11 * np.abs(expected).max() * 2)


@native
@pytest.mark.parametrize(("latent_frames", "plan"), [(1, [1, 1, 1]), (2, [2, 1]), (5, [3])])
def test_one_tile_is_the_stream(latent_frames: int, plan: list[int]) -> None:
    tokenizer = make()
    video = draw(2, 3, 9, 24, 16)
    latent = encode_tiled(tokenizer, video, tile=(24, 64), latent_frames=latent_frames, overlap=8)
    frames = [4 * plan[0] - 3, *(4 * count for count in plan[1:])]
    assert torch.equal(latent, torch.cat(list(tokenizer.encode_chunks(video.split(frames, dim=2))), dim=2))
    torch.testing.assert_close(latent, tokenizer.encode(video))
    decoded = decode_tiled(tokenizer, latent, tile=(24, 64), latent_frames=latent_frames, overlap=8)
    assert torch.equal(decoded, torch.cat(list(tokenizer.decode_chunks(latent.split(plan, dim=2))), dim=2))
    torch.testing.assert_close(decoded, tokenizer.decode(latent))


def test_a_plain_colour_has_no_seams() -> None:
    """Where nothing differs between tiles, tiled equals whole: no borders, and norms that pool over the same.

    Decoding has no such case: depth-to-space makes a pattern of a plain latent, and padding does not go on with it.
    """
    tokenizer = make(replace(SMALL, space_padding="replicate"), torch.float64)
    colour = torch.tensor([0.1, -0.5, 0.8], dtype=torch.float64)[:, None, None, None]
    video = colour.expand(1, 3, 5, 40, 32)
    latent = tokenizer.encode(video)
    torch.testing.assert_close(encode_tiled(tokenizer, video, tile=(16, 16), overlap=8), latent, rtol=0, atol=1e-10)


def test_half_precision_comes_back_as_it_went_in() -> None:
    tokenizer = make().bfloat16()
    latent = encode_tiled(tokenizer, draw(1, 3, 1, 24, 24).bfloat16(), tile=(16, 16), overlap=8)
    assert latent.dtype == torch.bfloat16
    assert decode_tiled(tokenizer, latent, tile=(16, 16), overlap=8).dtype == torch.bfloat16


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_memory_grows_by_the_result_alone(direction: str) -> None:
    tokenizer = make().requires_grad_(True)  # gradients would keep every activation
    code, shape, per_site = (
        (encode_tiled, (1, 3, 5, 32, 32), 4) if direction == "encode" else (decode_tiled, (1, 4, 2, 4, 4), 3 * 64 * 4)
    )

    def peak(frames: int, factor: int) -> int:
        whole = draw(*shape[:2], frames, factor * shape[3], factor * shape[4])
        return peak_bytes(lambda: code(tokenizer, whole, tile=(32, 32), overlap=8))

    step = 4 if direction == "encode" else 1
    small, large = peak(1 + 2 * step, 1), peak(1 + 4 * step, 2)
    result = 4 * per_site * 5 * 8 * 8  # bytes of float32; decoded frames count four for each latent frame
    assert large <= small + 1.25 * result


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": (20, 16)}, r"tile: got \(20, 16\); expected a height and a width that are multiples of 8"),
        ({"tile": (16,)}, r"tile: got \(16,\)"),
        ({"tile": (0, 16)}, r"tile: got \(0, 16\)"),
        ({"overlap": 4}, "overlap: got 4; expected a multiple of 8 from 0, below both sides"),
        ({"overlap": 16}, "overlap: got 16"),
        ({"overlap": -8}, "overlap: got -8"),
        ({"latent_frames": 0}, "latent_frames: got 0; expected an int >= 1"),
    ],
)
def test_bad_tiles(options: dict, message: str) -> None:
    for code, whole in ((encode_tiled, draw(1, 3, 1, 32, 32)), (decode_tiled, draw(1, 4, 1, 4, 4))):
        with pytest.raises(ValueError, match=message):
            code(make(), whole, **{"tile": (16, 32), "overlap": 8, **options})


def test_bad_videos() -> None:
    with pytest.raises(ValueError, match=r"video: got 4 frames; expected 1 \+ 4k"):
        encode_tiled(make(), draw(1, 3, 4, 32, 32))
    with pytest.raises(ValueError, match="height: got 20 pixels"):
        encode_tiled(make(), draw(1, 3, 5, 20, 32))
    with pytest.raises(ValueError, match="latent: got"):
        decode_tiled(make(), draw(1, 5, 1, 4, 4))
