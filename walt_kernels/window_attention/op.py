"""Schema, fake and autograd of window_attention, and its backend table."""

from __future__ import annotations

from typing import Any

import torch

from .. import _native
from .._dispatch import Backend, register
from . import reference

# The arguments that get a gradient, in the order of the backward's outputs.
DIFFERENTIABLE = ("q", "k", "v", "bias_table", "q_norm", "k_norm", "context_k", "context_v")
ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, int[] window, Tensor? bias_table, Tensor? image, Tensor? q_norm, Tensor? k_norm, "
    "float norm_eps, Tensor? context_k, Tensor? context_v, Tensor? context_mask, float scale"
)
NAMES = tuple(argument.split()[-1] for argument in ARGUMENTS.split(", "))


def _unsupported(**inputs: Any) -> str | None:
    return _native.unsupported(*(value for value in inputs.values() if isinstance(value, torch.Tensor)))


def register_op(prepare: Any) -> None:
    register(
        "window_attention",
        prepare,
        [
            Backend("reference", lambda **inputs: None, reference.window_attention),
        ],
    )
