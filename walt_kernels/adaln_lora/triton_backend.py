"""What the Triton backend runs."""

from .triton_backward import backward
from .triton_forward import forward
from .triton_lora import lora_backward, lora_forward

__all__ = ["backward", "forward", "lora_backward", "lora_forward"]
