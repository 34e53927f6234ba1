"""The functions of the Triton backend, by the names of the ops."""

from .triton_backward import adaln_modulate_backward, adaln_residual_backward, adaln_residual_modulate_backward
from .triton_forward import adaln_modulate, adaln_residual, adaln_residual_modulate
from .triton_lora import adaln_lora, adaln_lora_backward

__all__ = [
    "adaln_lora",
    "adaln_lora_backward",
    "adaln_modulate",
    "adaln_modulate_backward",
    "adaln_residual",
    "adaln_residual_backward",
    "adaln_residual_modulate",
    "adaln_residual_modulate_backward",
]
