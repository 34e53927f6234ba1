"""The functions of the Triton backend, by the names of the ops: native.py's, with launches of Triton's kernels."""

from __future__ import annotations

from typing import Any

from . import triton_backward, triton_forward, triton_lora
from .native import Kernels

_RUN: dict[str, Any] = {"adaln_forward": triton_forward.forward, "adaln_backward": triton_backward.backward}
_kernels = Kernels(lambda name, inputs, outputs, **options: _RUN[name](**inputs, **outputs, **options))

adaln_lora = triton_lora.adaln_lora
adaln_lora_backward = triton_lora.adaln_lora_backward
adaln_modulate = _kernels.adaln_modulate
adaln_modulate_backward = _kernels.adaln_modulate_backward
adaln_residual = _kernels.adaln_residual
adaln_residual_backward = _kernels.adaln_residual_backward
adaln_residual_modulate = _kernels.adaln_residual_modulate
adaln_residual_modulate_backward = _kernels.adaln_residual_modulate_backward
