"""Where the tensors of a planned launch lie, in terms of those that a call comes with (``_plans``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where a tensor of a launch lies: in which of the call's tensors (one more is the memory of the temporaries), and
    how many bytes behind its first element.
    """

    base: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self, tensors: Sequence[Tensor]) -> Tensor:
        base = tensors[self.base]
        first = (base.storage_offset() * base.itemsize + self.offset) // self.dtype.itemsize
        view = torch.empty(0, dtype=self.dtype, device=base.device)
        return view.set_(base.untyped_storage(), first, self.shape, self.stride)

    def pointer(self, addresses: Sequence[int]) -> int:
        return addresses[self.base] + self.offset


class Descriptor(NamedTuple):
    """A tensor descriptor of a launch: where its tensor lies, and all else, of a tensor without memory."""

    place: Place
    described: Any

    def tensor(self, tensors: Sequence[Tensor]) -> Any:
        return dataclasses.replace(self.described, base=self.place.tensor(tensors))

    def pointer(self, addresses: Sequence[int]) -> Box:
        return Box(self.place.pointer(addresses), self.described)


class Box:
    """What Triton's launcher reads of a tensor descriptor; its tensor is an address."""

    __slots__ = ("address", "padding", "round_f32_to_tf32", "shape", "strides")

    def __init__(self, address: int, described: Any) -> None:
        self.address = address
        self.shape, self.strides, self.padding = described.shape, described.strides, described.padding
        self.round_f32_to_tf32 = getattr(described, "round_f32_to_tf32", False)  # since Triton 3.7

    @property
    def base(self) -> Box:
        return self

    def data_ptr(self) -> int:
        return self.address


class Group(NamedTuple):
    """A tuple of a launch with tensors in it."""

    kind: Callable[[Sequence[Any]], tuple[Any, ...]]
    items: tuple[Any, ...]

    def tensor(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        return self.kind([item.tensor(tensors) if isinstance(item, PLACED) else item for item in self.items])

    def pointer(self, addresses: Sequence[int]) -> tuple[Any, ...]:
        return self.kind([item.pointer(addresses) if isinstance(item, PLACED) else item for item in self.items])


PLACED = (Place, Descriptor, Group)
