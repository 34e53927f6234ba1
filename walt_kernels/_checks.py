"""Checks of arguments, all in one form of sentence: what the argument is or has, and what was expected.

Names of sizes stand in brackets, numbers in parentheses. A message is written only when it is raised: under
torch.compile, a formatted size becomes a constant of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ._library import autocast_enabled
from .values import is_int, plain

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensor(name: str, value: Any, layout: str = "", dims: tuple[int, ...] = ()) -> None:
    """``layout`` names the dimensions, as "[B, N, D]" does; ``dims`` are their possible numbers if it has several."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a tensor {layout}".rstrip())
    if layout and value.dim() not in (dims or (layout.count(",") + 1,)):
        counts = " or ".join(map(str, dims or (layout.count(",") + 1,)))
        raise shape_error(name, value, f"{counts} dimensions {layout}")


def shape_error(name: str, tensor: Tensor, expected: str) -> ValueError:
    return ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {expected}")


def fits(value: Any, shape: tuple[int, ...], x: Tensor) -> bool:
    """Whether it is a tensor of this shape on x's device that kernels take: nothing is left to check but its dtype
    beside x's. Calls are many, so the other questions are asked only where this one is answered with no.
    """
    return (
        isinstance(value, Tensor)
        and value.dim() == len(shape)  # for torch.compile, which compares sizes of different numbers too
        and value.shape == shape
        and value.dtype in DTYPES
        and value.device == x.device
    )


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    if tensor is not None and tensor.shape != shape:
        raise shape_error(name, tensor, f"{tuple(shape)}, {meaning}")


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype] = DTYPES) -> None:
    if tensor.dtype not in allowed:
        choice = "one of " if len(allowed) > 1 else ""
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {choice}{', '.join(map(str, allowed))}")


def check_same_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {other.dtype} as {other_name} has")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {other.device} as {other_name} is")


def number(name: str, value: Any) -> float:
    if type(value) is float and -math.inf < value < math.inf:
        return value
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        shown = repr(value) if isinstance(value, str | bool) else f"a {type(value).__name__}"
        raise TypeError(f"{name} is {shown}, expected a number")
    if not -math.inf < value < math.inf:  # what torch.compile can trace with a number that varies
        raise ValueError(f"{name} is {value}, expected a finite number")
    return float(value)


def positive(name: str, value: Any) -> int:
    if type(value) is int and value > 0:
        return value
    value = plain(value)
    if not is_int(value):
        raise TypeError(f"{name} is {value!r}, expected a positive int")
    if value < 1:
        raise ValueError(f"{name} is {value}, expected a positive int")
    return value


def positive_number(name: str, value: Any) -> float:
    value = number(name, value)
    if value <= 0:
        raise ValueError(f"{name} is {value}, expected a positive number")
    return value


def one_dtype(x: Tensor, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Checks that the rows that modulate x have one dtype, x's or float32 beside a 16-bit x; autocast widens them."""
    first_name, first = next(iter(rows.items()))
    allowed = (x.dtype,) if x.dtype in (torch.float32, torch.float64) else (x.dtype, torch.float32)
    for tensor in rows.values():
        if tensor.dtype is not first.dtype:
            break
    else:
        if first.dtype in allowed:
            return rows
    if autocast_enabled(x.device.type):
        wide = torch.promote_types(x.dtype, torch.float32)
        return {name: tensor.to(wide) for name, tensor in rows.items()}
    if first.dtype not in allowed:
        either = f"{' or '.join(map(str, allowed))} as x has{', or wider' * (len(allowed) > 1)}"
        raise TypeError(f"{first_name} has dtype {first.dtype}, expected {either}")
    for name, tensor in rows.items():
        check_same_dtype(name, tensor, first_name, first)
    return rows


def _are_three(value: Any) -> TypeGuard[tuple[int, int, int]]:
    """Whether they are positive integers of Python, as nearly always."""
    if type(value) is not tuple or len(value) != 3:
        return False
    t, h, w = value
    return type(t) is type(h) is type(w) is int and t > 0 and h > 0 and w > 0


def triple(name: str, value: Any) -> tuple[int, int, int]:
    """One positive int for each of time, height and width, or one for all."""
    if type(value) is int and value > 0:  # nearly always, and calls are many
        return value, value, value
    if _are_three(value):
        return value
    value = plain(value)
    values = (value, value, value) if is_int(value) else value
    if not isinstance(values, (tuple, list)) or len(values) != 3 or not all(map(is_int, values)):
        raise TypeError(f"{name} is {value!r}, expected an int or 3 ints (time, height, width)")
    t, h, w = values
    if t < 1 or h < 1 or w < 1:
        raise ValueError(f"{name} is {value!r}, expected integers of at least 1")
    return t, h, w


def three(name: str, value: Any, axes: str) -> tuple[int, int, int]:
    """One positive int for each of ``axes``."""
    if _are_three(value):
        return value
    values = plain(value)
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(map(is_int, values)):
        raise TypeError(f"{name} is {values!r}, expected three integers {axes}")
    if len(values) != 3 or min(values) < 1:
        raise ValueError(f"{name} is {tuple(values)}, expected three positive integers {axes}")
    return values[0], values[1], values[2]


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")
    return value
