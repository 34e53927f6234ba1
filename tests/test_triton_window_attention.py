"""The Triton kernels of window_attention against the float64 reference, and exact properties (``pytest.mark.gpu``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from on_gpu import DTYPES, check, marks
from test_window_attention import keys_of, make, mask

from walt_kernels import window_attention

pytestmark = marks()

SMALL = {"B": 1, "heads": 1}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"T": 1, "window": (1, 8, 8), "table": False, "norm": False, "dim": 16},
    "bias and norms, two tiles of tokens, dim in two tiles": {"T": 2, "H": 5, "W": 4, "window": (2, 5, 4), "dim": 72},
    "edges": {"B": 2, "heads": 2, "T": 3, "H": 2, "W": 3, "window": (2, 2, 2), "dim": 12},
    "window wider than the video": {"T": 2, "H": 3, "W": 3, "window": (4, 4, 8), "dim": 24},
    "one token": {"T": 1, "H": 1, "W": 1, "window": (1, 1, 1), "dim": 8},
    "dim 131": {"T": 1, "H": 3, "W": 3, "window": (1, 3, 3), "dim": 131},
    "dim 256": {"T": 1, "H": 2, "W": 2, "window": (1, 2, 2), "dim": 256},
    "images": {"B": 2, "T": 2, "H": 4, "W": 4, "window": (1, 4, 4), "image": torch.tensor([True, False]), "dim": 16},
    "image frames": {"T": 3, "H": 3, "W": 3, "window": (3, 3, 3), "image": torch.tensor([[0, 1, 0]]) > 0, "dim": 24},
    "context": {"B": 2, "T": 1, "H": 3, "W": 4, "window": (1, 3, 2), "context": 35, "masked": True, "dim": 24},
    "dim in two tiles, context": {"T": 1, "H": 3, "W": 3, "window": (1, 3, 3), "context": 2, "dim": 88},
    "empty context": {"T": 1, "H": 2, "W": 2, "window": (1, 2, 2), "context": 0, "dim": 8},
    "own scale": {"T": 1, "H": 4, "W": 4, "window": (1, 4, 4), "context": 3, "dim": 8, "norm": False},
}


def sample(case: str, **more: Any) -> dict[str, Any]:
    options = SMALL | CASES[case] | more
    if options.pop("masked", False):
        options["context_mask"] = mask(options["B"], options["context"])
    inputs = make(**options)
    return inputs | {"scale": 0.5} if case == "own scale" else inputs


def matches(inputs: dict[str, Any], **options: Any) -> None:
    check(window_attention, inputs, rows=keys_of(inputs), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case: str, dtype: torch.dtype) -> None:
    matches(sample(case, dtype=dtype))
