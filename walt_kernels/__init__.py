"""Trainable kernels for video diffusion: causal 3D convolution, video norm, window attention, fused AdaLN-LoRA."""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from . import _dispatch
from . import nn as nn
from ._define import folders as _find_folders
from ._dispatch import explain, use_backend
from ._version import __version__ as __version__
from ._warm import warm
from .adaln_lora import adaln_lora, adaln_modulate, adaln_residual, adaln_residual_modulate
from .causal_conv3d import causal_conv3d, next_history
from .video_norm import video_norm
from .window_attention import window_attention

# What `from walt_kernels import *` brings: not `nn`, which would take the place of torch's.
__all__ = [
    "adaln_lora",
    "adaln_modulate",
    "adaln_residual",
    "adaln_residual_modulate",
    "causal_conv3d",
    "explain",
    "next_history",
    "use_backend",
    "video_norm",
    "warm",
    "window_attention",
]

# The ops of all folders. They are named above, too, for readers and type checkers alone.
_folders = _find_folders()
for _folder in _folders:
    importlib.import_module(f"{__name__}.{_folder}.op")
globals().update({_op: _dispatch.op(_op).function for _op in _dispatch.ops()})

# A function hides the package that it has its name of. What is in the package is found through the function, too, or
# `import walt_kernels.causal_conv3d.op as op` would fail.
for _folder in _folders:
    _package, _function = sys.modules[f"{__name__}.{_folder}"], globals()[_folder]
    vars(_package).update(vars(_function))
    _function.__dict__ = vars(_package)


if not TYPE_CHECKING:  # or a type checker would take every name

    def __getattr__(name: str) -> Any:
        if name in nn.__all__:  # of an AttributeError, `from walt_kernels import name` would not show the text
            raise ImportError(f"{name} is in walt_kernels.nn, write: from walt_kernels.nn import {name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
