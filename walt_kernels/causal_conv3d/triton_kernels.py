"""The Triton backend of causal_conv3d: what native.py is to the C++ kernels."""

from __future__ import annotations

from .triton_forward import causal_conv3d

__all__ = ["causal_conv3d"]
