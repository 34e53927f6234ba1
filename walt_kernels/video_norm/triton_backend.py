"""What the Triton backend runs."""

from .triton_backward import backward
from .triton_forward import forward

__all__ = ["backward", "forward"]
