"""Tensors to addresses: calls the C++ kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._layout import memory_format
from .._native import NAMES, C, view

VIDEO = ("x", "y", "grad_y", "grad_x")  # [B, C, T, H, W]
PER_SAMPLE = ("scale", "shift", "grad_scale", "grad_shift")  # [B, C] or [B, C, T]


def forward(**arguments: Any) -> None:
    if arguments["x"].numel() > 0:  # an empty tensor has no layout
        _call(C.video_norm, **arguments)


def backward(**arguments: Any) -> None:
    if arguments["x"].numel() == 0:
        for name, value in arguments.items():
            if name.startswith("grad_") and name != "grad_y" and value is not None:
                value.zero_()
        return
    _call(C.video_norm_backward, **arguments)


def _call(kernel: Any, center: bool, mean: Tensor, activation: str | None, **arguments: Any) -> None:
    form = memory_format(arguments["x"])
    frames = {n: _frames(arguments.pop(n), form) for n in VIDEO if arguments.get(n) is not None}  # kept alive
    views: dict[str, Any] = {name: _frames_view(tensor) for name, tensor in frames.items()}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and name in PER_SAMPLE and value.dim() == 2:
            value = value[:, :, None]
        views[name] = view(value) if isinstance(value, Tensor) else value
    views["mean"] = view(mean) if center else None
    kernel(**views, center=center, silu=activation == "silu", threads=torch.get_num_threads())


def _pixel_stride(x: Tensor) -> int | None:
    """The distance of a frame's pixels in memory where all of them stand in one line, or None."""
    (H, W), (of_row, of_pixel) = x.shape[3:], x.stride()[3:]
    if H == 1 or W == 1:
        return of_pixel if W > 1 else of_row if H > 1 else 1
    return of_pixel if of_row == W * of_pixel else None


def _frames(x: Tensor, form: torch.memory_format) -> Tensor:
    """x with unit stride over channels, or over the pixels of a frame, as its format says; only others are copied."""
    stride = _pixel_stride(x)
    if form is torch.channels_last_3d:
        fits = stride is not None and x.stride(1) == 1
    else:
        fits = stride == 1
    return x if fits else x.contiguous(memory_format=form)


def _frames_view(x: Tensor) -> Any:
    """[B, C, T, H * W]"""
    (B, channels, T, H, W), stride = x.shape, x.stride()
    return C.TensorView(x.data_ptr(), NAMES[x.dtype], (B, channels, T, H * W), (*stride[:3], _pixel_stride(x)))
