"""Trainable kernels for video diffusion: causal 3D convolution, window attention, fused AdaLN-LoRA."""

from . import nn
from ._dispatch import explain, use_backend
from ._version import __version__
from .adaln_lora import adaln_lora, adaln_modulate, adaln_residual, adaln_residual_modulate
from .causal_conv3d import causal_conv3d, next_history
from .window_attention import window_attention

__all__ = [
    "__version__",
    "adaln_lora",
    "adaln_modulate",
    "adaln_residual",
    "adaln_residual_modulate",
    "causal_conv3d",
    "explain",
    "next_history",
    "nn",
    "use_backend",
    "window_attention",
]
