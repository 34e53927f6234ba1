"""What runs on a GPU where no backend is forced: by architecture and class of calls, what was the fastest there.

What stands in no table has not been measured there, and a backend that is opt-in stays so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Fastest(NamedTuple):
    """The fastest backend of forward and backward together, and what says so."""

    backend: str
    row: str  # of benchmarks/results/ ("file: case"), or the figures themselves ("a ms against b of ...")


class Defaults(NamedTuple):
    """An op's table, ``fastest[architecture][classify(**inputs)]``. A call of class None is like none of the rows."""

    classify: Callable[..., str | None]
    fastest: Mapping[str, Mapping[str, Fastest]]


_architectures: dict[int, str] = {}  # by the index of a GPU; no functools.cache, which torch.compile does not read


def architecture(device: torch.device) -> str:
    """A GPU's in the tables' words, "none" for what is not one of NVIDIA's."""
    if device.type != "cuda":
        return "none"
    known = _architectures.get(device.index)
    if known is None:
        known = _architectures[device.index] = _ask(device)
    return known


def _ask(device: torch.device) -> str:
    if torch.version.hip is not None or not torch.cuda.is_available():  # not: a tensor without memory
        return "none"
    properties = torch.cuda.get_device_properties(device)  # not get_device_capability: torch.compile knows this one
    return f"sm_{properties.major}{properties.minor}"
