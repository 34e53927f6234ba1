"""What counts as right: the comparison that all tests and benchmarks share."""

import pytest
import torch

from walt_kernels.testing import K_FORWARD, compare

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
