"""Low-rank AdaLN modulation for all layers at once, and residual + gate + LayerNorm + modulation in one pass."""

from .op import adaln_lora, adaln_modulate, adaln_residual, adaln_residual_modulate

__all__ = ["adaln_lora", "adaln_modulate", "adaln_residual", "adaln_residual_modulate"]
