"""What the denoiser is told beside the noisy latent: diffusion step, class label, its own last estimate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ClassEmbedding", "TimeEmbedding", "join_self_condition"]


class TimeEmbedding(nn.Module):
    """Diffusion step -> [..., width]: sines and cosines of geometric frequencies, then linear, swish, linear."""

    def __init__(self, width: int, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.first = nn.Linear(features, width)
        self.second = nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        """time [...] in steps (integer or float) -> [..., width], in the dtype of the parameters."""
        half = self.features // 2
        # float32 whatever the model's dtype: bfloat16 cannot tell step 998 from 999.
        frequencies = torch.exp(torch.arange(half, device=time.device) * (-math.log(10000.0) / half))
        angles = time.to(torch.float32)[..., None] * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.second(F.silu(self.first(features.to(self.first.weight.dtype))))


class ClassEmbedding(nn.Module):
    """Class label -> [..., width]. The row after the last class stands for "no label"."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.table = nn.Parameter(torch.empty(classes + 1, width))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, label: Tensor) -> Tensor:
        """label int64 [...] in 0 .. classes (`classes` itself: no label) -> [..., width]."""
        if label.dtype != torch.int64:
            raise TypeError(f"label: got dtype {label.dtype}; expected torch.int64")
        # Looking at the values of a GPU tensor would stall the device, and would break a compiled graph.
        if label.device.type == "cpu" and not torch.compiler.is_compiling() and label.numel():
            low, high = int(label.min()), int(label.max())
            if low < 0 or high > self.classes:
                raise ValueError(f"label: got values {low} .. {high}; expected 0 .. {self.classes - 1}")
        return F.embedding(label, self.table)


def join_self_condition(z_t: Tensor, estimate: Tensor | None) -> Tensor:
    """[B, c, T, H, W] and the model's last estimate of the clean latent (None: zeros) -> [B, 2c, T, H, W]."""
    if estimate is None:
        estimate = torch.zeros_like(z_t)
    if estimate.shape != z_t.shape:
        raise ValueError(f"self_condition: got shape {tuple(estimate.shape)}; expected {tuple(z_t.shape)}, like z_t")
    return torch.cat([z_t, estimate.to(z_t.dtype)], dim=1)
