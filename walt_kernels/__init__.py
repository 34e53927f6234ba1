"""Trainable kernels for video diffusion: causal 3D convolution, window attention, fused AdaLN-LoRA."""

import sys

from . import nn as nn
from ._dispatch import explain, use_backend
from ._version import __version__ as __version__
from .adaln_lora import adaln_lora, adaln_modulate, adaln_residual, adaln_residual_modulate
from .causal_conv3d import causal_conv3d, next_history
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
    "window_attention",
]

# These functions hide the packages that they have their names of. What is in the package is found through the function,
# too, or `import walt_kernels.causal_conv3d.api as api` would fail.
for _function in (adaln_lora, causal_conv3d, window_attention):
    _function.__dict__ = vars(sys.modules[f"{__name__}.{_function.__name__}"])
