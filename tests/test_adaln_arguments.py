"""Bad arguments of the adaln ops: each error names the argument, before anything is allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_adaln_lora import MODULATED
from torch import Tensor

import walt_kernels as wk

X, ROW = torch.zeros(2, 6, 8), torch.zeros(2, 8)
COND, BASE, DOWN, UP = torch.zeros(2, 8), torch.zeros(2, 24), torch.zeros(3, 4, 8), torch.zeros(3, 24, 4)
LORA = {"cond": COND, "base": BASE, "down": DOWN, "up": UP}
META = torch.zeros(2, 8, device="meta")
BAD = {
    "adaln_modulate": (
        ({"x": [1.0]}, TypeError, "x is a list, expected a tensor [B, N, D]"),
        ({"x": torch.zeros(2, 8)}, ValueError, "x has shape (2, 8), expected 3 dimensions [B, N, D]"),
        ({"x": torch.zeros(2, 6, 0)}, ValueError, "x has shape (2, 6, 0), expected [B, N, D] with D of at least 1"),
        ({"x": X.int()}, TypeError, "x has dtype torch.int32, expected one of torch.float32"),
        ({"shift": None}, TypeError, "shift is a NoneType, expected a tensor [B, D] or [B, F, D]"),
        ({"shift": ROW.long()}, TypeError, "shift has dtype torch.int64, expected one of torch.float32"),
        ({"scale": torch.zeros(3, 8)}, ValueError, "scale has shape (3, 8), expected [B, D] = (2, 8)"),
        ({"scale": torch.zeros(2, 4, 8)}, ValueError, "with F dividing N = 6"),
        ({"scale": torch.zeros(2, 0, 8)}, ValueError, "scale has shape (2, 0, 8)"),
        ({"scale": torch.zeros(2, 3, 4)}, ValueError, "scale has shape (2, 3, 4)"),
        ({"scale": torch.zeros(8)}, ValueError, "scale has shape (8,)"),
        ({"shift": ROW.double()}, TypeError, "shift has dtype torch.float64, expected torch.float32 as x"),
        (
            {"x": X.half(), "shift": ROW.bfloat16()},
            TypeError,
            "shift has dtype torch.bfloat16, expected torch.float16 or",
        ),
        (
            {"x": X.half(), "shift": ROW.half()},
            TypeError,
            "scale has dtype torch.float32, expected torch.float16 as shift",
        ),
        ({"shift": META}, ValueError, "shift is on meta, expected cpu as x"),
        ({"eps": 0.0}, ValueError, "eps is 0.0, expected a positive number"),
        ({"eps": float("nan")}, ValueError, "eps is nan, expected a finite number"),
        ({"eps": "small"}, TypeError, "eps is 'small', expected a number"),
    ),
    "adaln_residual": (
        ({"branch": torch.zeros(2, 5, 8)}, ValueError, "branch has shape (2, 5, 8), expected (2, 6, 8), x's shape"),
        ({"branch": X.half()}, TypeError, "branch has dtype torch.float16, expected torch.float32 as x"),
        ({"branch": X.to("meta")}, ValueError, "branch is on meta, expected cpu as x"),
        ({"gate": torch.zeros(2, 7)}, ValueError, "gate has shape (2, 7), expected [B, D] = (2, 8)"),
    ),
    "adaln_residual_modulate": (
        ({"branch": 1.0}, TypeError, "branch is a float, expected a tensor [B, N, D]"),
        ({"gate": torch.zeros(2, 4, 8)}, ValueError, "gate has shape (2, 4, 8)"),
        ({"eps": -1e-6}, ValueError, "eps is -1e-06, expected a positive number"),
    ),
    "adaln_lora": (
        ({"cond": 3}, TypeError, "cond is a int, expected a tensor [B, D]"),
        ({"cond": X}, ValueError, "cond has shape (2, 6, 8), expected 2 dimensions [B, D]"),
        ({"base": torch.zeros(3, 24)}, ValueError, "base has shape (3, 24), expected [B, K] with B = 2 as in cond"),
        ({"down": torch.zeros(3, 4, 9)}, ValueError, "down has shape (3, 4, 9), expected [layers, r, D] with D = 8"),
        ({"up": torch.zeros(3, 24, 5)}, ValueError, "up has shape (3, 24, 5), expected (3, 24, 4), [layers, K, r]"),
        ({"up": UP.half()}, TypeError, "up has dtype torch.float16, expected torch.float32 as cond"),
        ({"base": BASE.to("meta")}, ValueError, "base is on meta, expected cpu as cond"),
    ),
}
BAD_CALLS = [(name, *case) for name, cases in BAD.items() for case in cases]


@pytest.mark.parametrize(("name", "change", "error", "text"), BAD_CALLS, ids=[case[-1] for case in BAD_CALLS])
def test_bad_arguments(
    name: str, change: dict[str, Any], error: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "adaln_lora":
        inputs: dict[str, Any] = dict(LORA)
    else:
        tokens, modulation = MODULATED[name]
        inputs = dict.fromkeys(tokens, X) | dict.fromkeys(modulation, ROW)

    def allocated(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("an output was allocated before the arguments were checked")

    monkeypatch.setattr(torch, "empty", allocated)
    with pytest.raises(error) as caught:
        getattr(wk, name)(**(inputs | change))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
