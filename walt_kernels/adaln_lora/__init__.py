"""Low-rank AdaLN modulation for all layers at once, and residual + gate + LayerNorm + modulation in one pass."""

from .api import adaln_residual

__all__ = ["adaln_residual"]
