"""What the denoiser is told beside the noisy latent.

As an addition to the AdaLN condition: diffusion step, class label, noise level of a low-resolution latent. As channels
beside the noisy latent: its own last estimate, known first frames, a low-resolution latent. As a context: text.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from walt_kernels.nn import CausalConv3d, reset_children

__all__ = ["ClassEmbedding", "TextEmbedding", "TimeEmbedding", "Upscale", "frame_condition", "frame_mask"]


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
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=0.02)

    def forward(self, label: Tensor) -> Tensor:
        """label int64 [...] in 0 .. classes (`classes` itself: no label) -> [..., width]."""
        if label.dtype != torch.int64:
            raise TypeError(f"label: got dtype {label.dtype}; expected torch.int64")
        _check_values("label", label, self.classes + 1, f"0 .. {self.classes - 1}")
        return F.embedding(label, self.table)


class TextEmbedding(nn.Module):
    """Text tokens -> the context [B, L, width] of the cross-attention, with a learned token for "no text".

    Tokens are features of a frozen encoder [B, L, text_width], or with a vocabulary token ids [B, L], which are
    embedded with their position by learned tables. Ours: one linear layer for all layers of the denoiser, a LayerNorm
    after it (encoders differ in scale), and the null token in place of a text of which nothing is visible.
    """

    def __init__(self, width: int, text_width: int, length: int, vocabulary: int = 0) -> None:
        super().__init__()
        self.text_width, self.length, self.vocabulary = text_width, length, vocabulary
        self.project = nn.Linear(text_width, width)
        self.null = nn.Parameter(torch.empty(text_width))
        self.table: nn.Parameter | None = None
        self.positions: nn.Parameter | None = None
        if vocabulary:
            self.table = nn.Parameter(torch.empty(vocabulary, text_width))
            self.positions = nn.Parameter(torch.empty(length, text_width))
        self.reset_parameters(recurse=False)

    def reset_parameters(self, *, recurse: bool = True) -> None:
        if recurse:
            reset_children(self)
        for table in (self.null, self.table, self.positions):
            if table is not None:
                nn.init.normal_(table)

    def null_text(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens and mask of `batch` samples without text."""
        shape = (batch, 1) if self.vocabulary else (batch, 1, self.text_width)
        tokens = torch.zeros(shape, dtype=torch.int64 if self.vocabulary else torch.float32, device=device)
        return tokens, torch.zeros(batch, 1, dtype=torch.bool, device=device)

    def forward(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """text int64 [B, L] or float [B, L, text_width], mask bool [B, L] -> context [B, L, width] and its mask."""
        self._check(text, mask)
        if self.table is not None and self.positions is not None:
            tokens = F.embedding(text, self.table) + self.positions[: text.shape[1]]
        else:
            tokens = text.to(self.project.weight.dtype)
        absent = ~mask.any(dim=1, keepdim=True) & (torch.arange(mask.shape[1], device=mask.device) == 0)
        tokens = torch.where(absent[..., None], self.null, tokens)
        context = self.project(tokens)
        return F.layer_norm(context, context.shape[-1:], eps=1e-6), mask | absent

    def _check(self, text: Tensor, mask: Tensor) -> None:
        got = f"got {text.dtype} {tuple(text.shape)}"
        if self.vocabulary:
            if text.dtype != torch.int64 or text.ndim != 2 or not 1 <= text.shape[1] <= self.length:
                raise ValueError(f"text: {got}; expected token ids, torch.int64 [B, 1 to {self.length}]")
            _check_values("text", text, self.vocabulary, f"0 .. {self.vocabulary - 1}")
        else:
            good = text.ndim == 3 and 1 <= text.shape[1] <= self.length and text.shape[2] == self.text_width
            if not good or not text.is_floating_point():
                expected = f"floating point [B, 1 to {self.length}, {self.text_width}]"
                raise ValueError(f"text: {got}; expected features, {expected}")
        if mask.dtype != torch.bool or mask.shape != text.shape[:2]:
            raise ValueError(f"text_mask: got {mask.dtype} {tuple(mask.shape)}; expected bool {tuple(text.shape[:2])}")


class Upscale(nn.Module):
    """Depth-to-space convolution of a low-resolution latent (paper section 3.5): twice the height and width.

    Ours: a kernel of 3x3 within each frame, since the frames of an image stack must not see one another.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, 4 * channels, (1, 3, 3))

    def forward(self, latent: Tensor) -> Tensor:
        """[B, c, T, h, w] -> [B, c, T, 2h, 2w]."""
        return F.pixel_shuffle(self.conv(latent).transpose(1, 2), 2).transpose(1, 2)


def frame_mask(known: Tensor, frames: int) -> Tensor:
    """known int64 [B], the number of known first frames -> bool [B, 1, frames, 1, 1], True where a frame is known."""
    return (torch.arange(frames, device=known.device) < known[:, None])[:, None, :, None, None]


def frame_condition(clean: Tensor, known: Tensor) -> Tensor:
    """c_fp = concat(m_fp * z, m_fp) (paper section 3.4): [B, c, T, H, W] -> [B, c + 1, T, H, W].

    Of the clean latent z only the first `known` int64 [B] frames are seen, whatever the others hold.
    """
    mask = frame_mask(known, clean.shape[2])
    return torch.cat([torch.where(mask, clean, 0), mask.to(clean.dtype).expand_as(clean[:, :1])], dim=1)


def _check_values(name: str, ids: Tensor, limit: int, expected: str) -> None:
    # Looking at the values of a GPU tensor would stall the device; a compiled graph and vmap have none.
    captured = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if ids.device.type == "cpu" and not captured and ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= limit:
            raise ValueError(f"{name}: got values {low} .. {high}; expected {expected}")
