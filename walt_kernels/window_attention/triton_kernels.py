"""The functions of the Triton backend."""

from .triton_backward import window_attention_backward
from .triton_forward import window_attention

__all__ = ["window_attention", "window_attention_backward"]
