"""Numbers that users pass, whatever library they come from."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def is_int(value: Any) -> bool:
    """Whether it is an integer of Python or a symbolic size; a bool is none."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """Integers of any kind, NumPy's numbers, arrays and integer tensors as Python's numbers and lists.

    Anything else is returned as it is. What the numbers are is checked afterwards: bools stay bools, floats floats.
    """
    if value is None or type(value) in (int, float, str):  # nearly always, and calls are many
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Tensor):  # floating ones may carry a gradient, which would be lost
        return value if value.is_floating_point() else value.tolist()
    if isinstance(value, (tuple, list)):
        items = [plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, (int, float, torch.SymInt)):  # a symbolic size that is asked for its value becomes a constant
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value
