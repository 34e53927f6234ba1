"""Trainable kernels for video diffusion: causal 3D convolution, window attention, fused AdaLN-LoRA."""

from ._dispatch import explain, use_backend
from ._version import __version__
from .adaln_lora import adaln_residual

__all__ = ["__version__", "adaln_residual", "explain", "use_backend"]
