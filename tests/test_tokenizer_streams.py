"""The tokenizer chunk by chunk: the same values as whole, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from small_tokenizer import SMALL, draw, make, peak_bytes
from small_tokenizer import one_thread as one_thread
from torch import Tensor


@pytest.fixture(params=["zeros", "first_frame"])
def time_padding(request: pytest.FixtureRequest) -> str:
    return request.param


def agree(code: Callable[[Tensor], Tensor], stream: Callable, whole: Tensor, plan: list[int]) -> None:
    """The chunks of `plan` give the whole, to the rounding of the dtype."""
    expected = code(whole)
    parts = list(stream(iter(whole.split(plan, dim=2))))
    assert len(parts) == len(plan)
    limit = 64 * torch.finfo(whole.dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("plan", [[1, 4, 4, 4], [1, 8, 4], [1, 12], [5, 8], [9, 4], [13]])
def test_encoding_in_chunks(plan: list[int], dtype: torch.dtype, time_padding: str) -> None:
    tokenizer = make(replace(SMALL, time_padding=time_padding), dtype)
    agree(tokenizer.encode, tokenizer.encode_chunks, draw(2, 3, 13, 16, 16, dtype=dtype), plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("plan", [[1, 1, 1, 1], [1, 2, 1], [1, 3], [2, 2], [3, 1], [4]])
def test_decoding_in_chunks(plan: list[int], dtype: torch.dtype, time_padding: str) -> None:
    tokenizer = make(replace(SMALL, time_padding=time_padding), dtype)
    agree(tokenizer.decode, tokenizer.decode_chunks, draw(2, 4, 4, 2, 2, dtype=dtype), plan)


@pytest.mark.parametrize("plan", [[1, 1, 1], [2, 1]])
def test_chunks_without_adaptive_norms(plan: list[int]) -> None:
    tokenizer = make(replace(SMALL, adaptive_norm=False))
    agree(tokenizer.decode, tokenizer.decode_chunks, draw(2, 4, 3, 2, 2), plan)


def test_streams_are_lazy_and_apart() -> None:
    tokenizer = make()
    video = draw(1, 3, 9, 16, 16)
    whole = tokenizer.encode(video)
    first, second = (tokenizer.encode_chunks(iter(video.split([1, 4, 4], dim=2))) for _ in range(2))
    pieces = [next(first), next(first), next(second), next(first), next(second), next(second)]
    for order in ((0, 1, 3), (2, 4, 5)):
        torch.testing.assert_close(torch.cat([pieces[i] for i in order], 2), whole)


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_the_memory_of_a_stream_does_not_grow_with_its_length(direction: str) -> None:
    tokenizer = make()
    code = getattr(tokenizer, f"{direction}_chunks")
    shape, length = ((1, 4, 1, 4, 4), 1) if direction == "decode" else ((1, 3, 4, 32, 32), 4)

    def stream(count: int) -> int:
        chunks = (draw(*shape)[:, :, : 1 if i == 0 else None] for i in range(count))
        return peak_bytes(lambda: [None for _ in code(chunks)])

    whole = draw(*shape[:2], 1 + 15 * length, *shape[3:])
    assert stream(16) <= stream(4) < peak_bytes(lambda: getattr(tokenizer, direction)(whole)) / 2


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([2, 4], "first chunk: got 2 frames; expected 1 [+] 4k, the nearest being 1 or 5"),
        ([1, 3], "chunk 1: got 3 frames; expected a multiple of 4"),
        ([5, 4, 1], "chunk 2: got 1 frames; expected a multiple of 4"),
    ],
)
def test_bad_chunks(plan: list[int], message: str) -> None:
    tokenizer = make()
    with pytest.raises(ValueError, match=message):
        list(tokenizer.encode_chunks(draw(1, 3, sum(plan), 8, 8).split(plan, dim=2)))


def test_chunks_must_be_alike() -> None:
    tokenizer = make()
    with pytest.raises(ValueError, match=r"chunk 1: got \(1, 3, 16, 8\) beside its frames; expected \(1, 3, 8, 8\)"):
        list(tokenizer.encode_chunks([draw(1, 3, 1, 8, 8), draw(1, 3, 4, 16, 8)]))
    with pytest.raises(ValueError, match=r"chunk 1: got \(1, 4, 2, 2\)"):
        list(tokenizer.decode_chunks([draw(2, 4, 1, 2, 2), draw(1, 4, 1, 2, 2)]))
