"""Features of captions, computed once by a frozen text encoder (`walt.data.encoded`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from walt.atomic import atomic_folder, latest_complete, write_json
from walt.data.encoded import DTYPES, INDEX, VERSION, holds, map_numbers, read_index
from walt.errors import WaltError
from walt.terminal import progress_bar

TEXT = "walt-text"

EncodeText = Callable[[list[str]], tuple[Tensor, Tensor]]


class TextFeatures:
    """Features of captions, tokens without padding end to end: [sum of lengths, D]."""

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder, self.key = folder, index["key"]
        lengths = np.array(index["lengths"], np.int64)
        self._place = {caption: i for i, caption in enumerate(index["captions"])}
        self._ends = lengths.cumsum()
        self._starts = self._ends - lengths
        self.length = int(lengths.max(initial=1))
        self._tokens = map_numbers(folder / "tokens.raw", (int(lengths.sum()), index["width"]), index["dtype"])

    @classmethod
    def open(cls, folder: str | Path, *, key: str | None = None) -> TextFeatures:
        """WaltError if the folder is missing, foreign or broken, or made by another encoder than `key` (None: any)."""
        folder = latest_complete(folder)
        index = read_index(folder, TEXT)
        if key is not None and index.get("key") != key:
            raise WaltError(f"{folder} was made by another text encoder; encode again")
        try:
            return cls(folder, index)
        except (KeyError, TypeError, ValueError) as error:
            raise WaltError(f"{folder / INDEX} is broken: {error}") from error

    def __contains__(self, caption: str) -> bool:
        return caption in self._place

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """tokens float32 [B, L, D] and mask bool [B, L], True where there is a token; L is that of the longest caption
        of all, so that a batch's shape does not depend on which captions it holds. ValueError for an unknown one."""
        tokens = torch.zeros((len(captions), self.length, self._tokens.shape[1]))
        mask = torch.zeros((len(captions), self.length), dtype=torch.bool)
        for i, caption in enumerate(captions):
            if caption not in self._place:
                raise ValueError(f"caption: got {caption!r}; expected one of the {len(self._place)} encoded ones")
            place = self._place[caption]
            stored = self._tokens[self._starts[place] : self._ends[place]]
            tokens[i, : len(stored)] = torch.from_numpy(stored.astype(np.float32))
            mask[i, : len(stored)] = True
        return tokens, mask


@torch.inference_mode()
def encode_captions(
    captions: Iterable[str | None],
    folder: str | Path,
    encode: EncodeText,
    *,
    key: str,
    batch: int = 64,
    dtype: str = "float16",
    progress: bool = True,
) -> TextFeatures:
    """Encode each distinct caption, and "" (which None stands for), unless `folder` has them already.

    `encode` maps B texts to tokens [B, L, D] and a mask [B, L] of those that count; `key` stands for its weights.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}; expected {' or '.join(DTYPES)}")
    folder = Path(folder)
    texts = sorted({caption or "" for caption in captions} | {""})
    if holds(folder, TEXT, {"key": key, "dtype": dtype}):
        features = TextFeatures.open(folder)
        if all(text in features for text in texts):
            return features
    lengths: list[int] = []
    width = 0
    with atomic_folder(folder) as temporary, (temporary / "tokens.raw").open("wb") as file:
        for start in progress_bar(range(0, len(texts), batch), desc="encode captions", unit="batch", shown=progress):
            tokens, mask = encode(texts[start : start + batch])
            width = tokens.shape[-1]
            lengths += mask.sum(dim=1).tolist()
            file.write(tokens[mask.bool()].to(getattr(torch, dtype)).cpu().numpy().tobytes())
        index = {"format": TEXT, "version": VERSION, "key": key, "dtype": dtype, "width": width}
        write_json(temporary / INDEX, {**index, "captions": texts, "lengths": lengths})
    return TextFeatures.open(folder)
