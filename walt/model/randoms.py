"""Random numbers that depend on a seed and a key alone, whatever is drawn beside them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from walt.model.config import as_int


def sample_noise(seed: int, keys: Sequence[Sequence[int]], shape: Sequence[int]) -> Tensor:
    """Normal noise [len(keys), *shape], float32 on the CPU: each sample's depends on the seed and its key alone.

    A key is a sample's number, then what tells its noises apart, such as the chunk of a long video.
    """
    return torch.stack([torch.randn(tuple(shape), generator=keyed_generator(seed, *key)) for key in keys])


def keyed_generator(seed: int, *key: int) -> torch.Generator:
    """A generator on the CPU whose numbers depend on the seed and the key alone; ValueError for numbers below 0.

    NumPy pads keys with zeros: no two may differ by zeros at their ends alone.
    """
    return torch.Generator().manual_seed(keyed_seed(seed, *key))


def keyed_seed(seed: int, *key: int) -> int:
    """The seed of `keyed_generator`, for generators that are not made here, such as torch's own."""
    seed = as_int("seed", seed)
    if seed < 0:
        raise ValueError(f"seed: got {seed}; expected an int >= 0")
    return int(np.random.SeedSequence((seed, *key)).generate_state(1, np.uint64)[0])
