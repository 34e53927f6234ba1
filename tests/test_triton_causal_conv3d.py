"""The Triton kernels of causal_conv3d against the float64 reference, and exact properties (``pytest.mark.gpu``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from on_gpu import DTYPES, check, marks
from test_causal_conv3d import OPTIONS, sample, terms

from walt_kernels import causal_conv3d
from walt_kernels.testing import LAYOUTS

pytestmark = marks()


def compare(inputs: dict[str, Any]) -> None:
    check(causal_conv3d, inputs, rows=terms(inputs))


# A frame a sample that keeps rows of one program's tiles partly empty, and few steps: the interpreter is slow.
SMALL = {"batch": 1, "frames": 2, "size": (4, 5), "channels": 6, "out_channels": 6}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_matches_the_truth_for_every_option(option: str, dtype: torch.dtype) -> None:
    compare(sample(dtype=dtype, **{**SMALL, **OPTIONS[option]}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_the_truth_in_every_layout(layout: str, dtype: torch.dtype) -> None:
    options = {"frames": 2, "size": (4, 5), "history": True, "kernel": (2, 2, 3), "stride": (1, 1, 2)}
    compare(sample(dtype=dtype, layout=layout, channels=19, out_channels=17, **options))
