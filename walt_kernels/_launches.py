"""The launches of a plan as objects of the native module, which hands them to the CUDA driver by itself.

Triton's launcher is general: it reads every argument of every call from Python. Of a planned launch all but addresses
is known. What is out of the ordinary is left to Triton's launcher.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

from . import _native, _triton
from ._places import Descriptor, Group, Place

WARP = 32
INTEGERS = {"i1": 1, "u1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4, "i64": 8, "u64": 8}  # bytes
FLOATS = {"fp32": ctypes.c_float, "fp64": ctypes.c_double}  # beyond float32 is infinite
# Some drivers need a bit set right in the maps of tensors that reach less far than this (bytes): Triton knows which.
SMALL = 128 << 10


class Unusual(Exception):
    """A launch that is left to Triton's launcher."""


def native(launches: Iterable[tuple[_triton.Launch, Any]]) -> Any:
    """Launches, whose tensors are places, with their compiled kernels. None where Triton's launcher has to do it."""
    if _native.C is None:
        return None
    try:
        made = [_launch(launch, compiled) for launch, compiled in launches]
    except (Unusual, AttributeError, ImportError, KeyError, TypeError, ValueError):  # the others: an unknown Triton
        return None
    return _native.C.Launches(made)


def _launch(launch: _triton.Launch, compiled: Any) -> Any:
    metadata = getattr(compiled, "metadata", None)
    if metadata is None or metadata.target.backend != "cuda":
        raise Unusual("not compiled for CUDA")
    if metadata.num_ctas != 1 or metadata.launch_cooperative_grid or metadata.launch_pdl:
        raise Unusual("launched with attributes")
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise Unusual("needs memory for each launch")
    x, y, z = (*launch.grid, 1, 1)[:3]
    made = _native.C.Launch(compiled.function, (x, y, z), WARP * metadata.num_warps, metadata.shared)
    boxes = iter(metadata.tensordesc_meta or ())
    for parameter in launch.kernel.params:
        value = launch.arguments.get(parameter.name, parameter.default)
        _add(made, compiled.src.signature[parameter.name], value, boxes)
    for _ in ("global scratch", "profile scratch"):
        made.constant(8, 0)
    if not made.fits():
        raise Unusual("another version of Triton has other parameters")
    return made


def _add(made: Any, kind: Any, value: Any, boxes: Any) -> None:
    """Adds what the kernel has for an argument of this type, in Triton's words."""
    if isinstance(kind, tuple):
        for each, item in zip(kind, value.items if isinstance(value, Group) else value, strict=True):
            _add(made, each, item, boxes)
    elif kind == "constexpr":
        pass
    elif isinstance(value, Descriptor):
        _add_box(made, value, next(boxes, None))
    elif isinstance(value, Place):
        made.pointer(value.base, value.offset)
    elif kind in INTEGERS:
        made.constant(INTEGERS[kind], value % (1 << 64))
    elif kind in FLOATS:
        memory = bytes(FLOATS[kind](value))
        made.constant(len(memory), int.from_bytes(memory, "little"))
    else:
        raise Unusual(f"an argument of type {kind}")


def _add_box(made: Any, value: Descriptor, metadata: Any) -> None:
    """A tensor map and, behind it, sizes and strides."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST as DTYPES

    described, place = value.described, value.place
    sizes, strides = list(described.shape), list(described.strides)
    if metadata is None or metadata["fp4_padded"] or getattr(described, "round_f32_to_tf32", False):
        raise Unusual("a descriptor that is no plain tensor map")
    width = metadata["elem_size"]
    if sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) * width < SMALL:
        raise Unusual("a map of a small tensor")
    dtype, fill = DTYPES[metadata["elem_type"]], int(described.padding == "nan")
    across = [width * stride for stride in strides[-2::-1]]
    made.box(
        place.base, place.offset, dtype, metadata["swizzle"], fill, sizes[::-1], across, metadata["block_size"][::-1]
    )
    for size in sizes:
        made.constant(4, size)
    for stride in strides:
        made.constant(8, stride)
