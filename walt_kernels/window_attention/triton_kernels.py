"""The functions of the Triton backend."""

from .triton_forward import window_attention

__all__ = ["window_attention"]
