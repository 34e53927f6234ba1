"""Arrays out of a pickle without running any of its code: nothing that the pickle names is ever imported or called."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from walt.errors import WaltError

__all__ = ["read_arrays"]


class _Dtype:
    """Stands for numpy.dtype: little-endian float32 and nothing else."""

    def __init__(self, code: str, *_: bool) -> None:
        if code != "f4":
            raise pickle.UnpicklingError(f"an array of dtype {code!r}; expected 'f4'")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] != "<":
            raise pickle.UnpicklingError(f"an array of byte order {state[1]!r}; expected '<'")


class _Array:
    """Stands for numpy.ndarray and for the function with which numpy's pickles begin an array."""

    def __init__(self, *_: object) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or fortran is not False or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array that is not float32 in C order")
        self.value = np.frombuffer(data, "<f4").reshape(shape)


_KNOWN = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of a NumPy array") from None


def read_arrays(path: str | Path, content: bytes | None = None) -> dict[str, Any]:
    """Nested dicts of read-only float32 arrays, as `pickle.dump` wrote them; `content` if the file has been read.

    Every class or function that a pickle refers to comes from `find_class`, which knows two stand-ins of ours for
    numpy's and refuses all other names: no pickle, however made, reaches a function that does anything. WaltError for
    whatever else the file holds.
    """
    try:
        return _plain(_Unpickler(io.BytesIO(Path(path).read_bytes() if content is None else content)).load())
    except OSError as error:
        raise WaltError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a broken or hostile pickle may raise anything
        raise WaltError(f"{path} is not a pickle of nested dicts of float32 arrays: {error}") from error


def _plain(document: Any) -> dict[str, Any]:
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise ValueError(f"expected a dict with names, got {type(document).__name__}")
    return {key: value.value if _is_array(value) else _plain(value) for key, value in document.items()}


def _is_array(value: object) -> bool:
    return isinstance(value, _Array) and value.value is not None
