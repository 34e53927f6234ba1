"""3D convolution that looks only at the present and the past, with streaming history and every gradient."""

from .op import causal_conv3d, next_history

__all__ = ["causal_conv3d", "next_history"]
