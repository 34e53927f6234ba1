"""What counts as right: the comparison that all tests and benchmarks share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from walt_kernels.testing import K_FORWARD, check_op, compare, random

TERMS = 5 * 32 * 32


def test_a_mean_whose_yardstick_is_right_by_luck_has_a_floor() -> None:
    """A loss of bfloat16 terms: off by a draw of their rounding, where the reference happened to be off by less."""
    truth, yardstick = torch.tensor(0.5), torch.tensor(0.5 + 2.1e-6)
    own = torch.tensor(0.5 + 5.3e-5)
    compare("loss", own, truth, yardstick, k=K_FORWARD, averaged=TERMS, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="loss: largest error"):
        compare("loss", own, truth, yardstick, k=K_FORWARD)


@pytest.mark.parametrize("error", [1e-3, -1e-3])
def test_a_mean_that_is_wrong_is_refused(error: float) -> None:
    truth, yardstick = torch.tensor(0.5), torch.tensor(0.5 + 2.1e-6)
    with pytest.raises(AssertionError, match="loss: largest error"):
        compare("loss", truth + error, truth, yardstick, k=K_FORWARD, averaged=TERMS, dtype=torch.bfloat16)


def norm_of_one_number(x: Tensor) -> Tensor:
    """0, and so is its gradient: that of its output, some hundred times as large, minus its mean."""
    return functional.layer_norm(x, (1,), eps=1e-6)


def attention_to_one_token(x: Tensor) -> Tensor:
    """1 for each query; the gradient of a score is that of the output minus its mean."""
    return torch.softmax(x @ x.new_ones(8, 1), -1)


CANCEL: dict[Callable[..., Tensor], tuple[tuple[int, ...], float]] = {
    norm_of_one_number: ((2, 5, 1), 1e-5),
    attention_to_one_token: ((2, 8), 3e-8),
}


def with_error(function: Callable[..., Tensor], error: float) -> Callable[..., Tensor]:
    """The same output; a gradient that is off by ``error`` times that of the output."""
    return lambda x: function(x) + error * (x - x.detach()).sum(-1, keepdim=True)


@pytest.mark.parametrize("function", CANCEL)
def test_terms_that_cancel_leave_their_rounding(function: Callable[..., Tensor]) -> None:
    """The truth is 0 and the yardstick has no error at all."""
    shape, error = CANCEL[function]
    x = random(*shape)
    assert not torch.autograd.grad(function(x).sum(), x)[0].any()
    check_op(with_error(function, error), function, {"x": x})


@pytest.mark.parametrize("function", CANCEL)
def test_more_than_the_rounding_of_terms_that_cancel_is_refused(function: Callable[..., Tensor]) -> None:
    shape, error = CANCEL[function]
    with pytest.raises(AssertionError, match="grad_x: largest error"):
        check_op(with_error(function, 200 * error), function, {"x": random(*shape)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_cancels_is_only_looked_at_where_the_yardstick_has_no_error(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("walt_kernels.testing.Unlucky.results")

    def silu(x: Tensor) -> Tensor:
        return functional.silu(x)

    with pytest.raises(AssertionError, match="grad_x: largest error"):
        check_op(with_error(silu, 0.1), silu, {"x": random(2, 5, 7, dtype=dtype)})
