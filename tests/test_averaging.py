"""The moving average of the weights against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from walt.train.averaging import WeightAverage


class Scalar(nn.Module):
    def __init__(self, value: float = 5.0, dtype=torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], dtype=dtype))
        self.register_buffer("seen", torch.zeros(()))


def follow(module: Scalar, average: WeightAverage, values) -> float:
    for value in values:
        with torch.no_grad():
            module.weight.fill_(value)
        module.seen.fill_(value)
        average.update()
    return average.module().weight.item()


def test_the_start_is_forgotten_early_and_the_decay_is_reached():
    values = [float(i * i % 7) for i in range(40)]
    module = Scalar()
    average = WeightAverage(module, 0.8)
    expected = values[0]  # of the start, nothing
    for n, value in enumerate(values[1:], 1):
        decay = min(0.8, (1 + n) / (10 + n))
        expected += (1 - decay) * (value - expected)
    assert follow(module, average, values) == pytest.approx(expected, rel=1e-12)
    assert average.updates == 40
    assert average.module().seen == values[-1]  # buffers are those of now
    assert not average.module().training


def test_the_average_of_narrow_weights_is_wide():
    """Steps of 1 / 256 of a weight, of which bfloat16 keeps none."""
    module = Scalar(1.0, torch.bfloat16)
    average = WeightAverage(module, 0.999)
    average.updates = 10**6  # past the warm-up
    follow(module, average, [1.0078125] * 50)
    weight = average.tensors()["weight"]
    assert weight.dtype == torch.float32
    assert 1 < weight.item() < 1 + 50 * 0.0078125 / 1000
    assert module.weight.dtype == torch.bfloat16
