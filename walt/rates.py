"""Frame rates: which are valid, and which are equal."""

from __future__ import annotations

from numbers import Real
from typing import Any

from walt.errors import WaltError

RATES = (0.001, 1000)  # frames a second, least and most, of films that are read at a rate or written


def same_rate(rate: float, other: float) -> bool:
    """Within 1%, as 23.976 and 24 frames a second are."""
    return max(rate, other) <= 1.01 * min(rate, other)


def is_rate(fps: object) -> bool:
    """Whether it is a number within RATES."""
    return isinstance(fps, Real) and not isinstance(fps, bool) and RATES[0] <= float(fps) <= RATES[1]


def check_rate(fps: float) -> None:
    """WaltError unless `is_rate`."""
    if not is_rate(fps):
        raise WaltError(f"fps: got {fps}; expected {RATES[0]} to {RATES[1]} frames a second")


def expect_rate(fps: Any) -> float:
    """The rate as Python's float; ValueError unless `is_rate`, or 0 for every frame."""
    if not is_rate(fps) and (fps != 0 or isinstance(fps, bool)):
        raise ValueError(f"fps: got {fps}; expected {RATES[0]} to {RATES[1]} frames a second, or 0 for every frame")
    return float(fps)


def as_float(value: Any) -> float:
    """The float of a number, or of a text such as 24 or 30000/1001; ValueError for other texts."""
    if not isinstance(value, str):
        return float(value)
    top, slash, bottom = value.partition("/")
    if slash and float(bottom) == 0:
        raise ValueError(f"{value!r} is no number")
    return float(top) / float(bottom) if slash else float(top)
