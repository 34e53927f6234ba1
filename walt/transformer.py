"""The denoiser: a transformer over latent video with windowed attention (W.A.L.T, paper sections 3.2 to 3.4).

Our own choices, where the paper is silent: GELU in the MLP, initial values, and the class table's row for "no label".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from walt.conditioning import ClassEmbedding, TimeEmbedding, join_self_condition
from walt.config import TransformerConfig
from walt_kernels import adaln_modulate, adaln_residual_modulate
from walt_kernels.nn import AdaLNLoRA, WindowAttention

__all__ = ["Transformer"]


class SeparateAdaLN(nn.Module):
    """Modulation with a full linear for each layer: what `AdaLNLoRA` stands in for."""

    def __init__(self, width: int, layers: int, chunks: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, chunks * width) for _ in range(layers))

    def forward(self, cond: Tensor) -> Tensor:
        """cond [..., width] -> [layers, ..., chunks * width]."""
        activated = F.silu(cond)
        return torch.stack([layer(activated) for layer in self.layers])


class Layer(nn.Module):
    """Window attention and MLP; the norms, modulations and residuals around them are fused in `Transformer.forward`."""

    def __init__(self, config: TransformerConfig, window: tuple[int, int, int]) -> None:
        super().__init__()
        width = config.width
        self.attention = WindowAttention(
            width, config.heads, window, qk_norm=config.qk_norm, bias_table=config.bias_tables
        )
        self.mlp = nn.Sequential(
            nn.Linear(width, config.mlp_ratio * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.mlp_ratio * width, width),
        )
        self.spatial = window[0] == 1

    def attend(self, tokens: Tensor, grid: tuple[int, int, int], image: Tensor | None) -> Tensor:
        """Attention over tokens [B, N, width]. S layers need no mask: frames are apart anyway."""
        out = self.attention(tokens.unflatten(1, grid), image=None if self.spatial else image)
        return out.flatten(1, 3)


class Transformer(nn.Module):
    """v-prediction of a noisy latent video, or of a stack of independent noisy latent images.

    Modulations and the last projection are zero at first (adaLN-Zero): every layer is the identity and the output 0.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width, pixels = config.width, config.patch**2
        frames, height, columns = config.grid
        self.project_in = nn.Linear(config.input_channels * pixels, width)
        self.space_table = nn.Parameter(torch.empty(height, columns, width))
        self.time_table = nn.Parameter(torch.empty(frames, width))
        self.embed_time = TimeEmbedding(width, config.time_features)
        self.embed_class = ClassEmbedding(config.classes, width) if config.classes else None
        self.modulation: nn.Module
        if config.adaln == "lora":
            self.modulation = AdaLNLoRA(width, config.layers, config.adaln_rank)
        else:
            self.modulation = SeparateAdaLN(width, config.layers)
        layers = nn.ModuleList(Layer(config, window) for window in config.windows())
        self.layers = cast(Sequence[Layer], layers)  # what type checkers cannot know of a ModuleList
        self.final_modulation = nn.Linear(width, 2 * width)
        self.project_out = nn.Linear(width, config.latent_channels * pixels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for the linear layers, normal(0.02) for the tables, zeros for modulations and the last projection."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.space_table, self.time_table):
            nn.init.normal_(table, std=0.02)
        for part in (self.modulation, self.final_modulation, self.project_out):
            for linear in part.modules():
                if isinstance(linear, nn.Linear):
                    nn.init.zeros_(linear.weight)

    def forward(
        self,
        z_t: Tensor,
        time: Tensor,
        *,
        label: Tensor | None = None,
        image: Tensor | None = None,
        self_condition: Tensor | None = None,
    ) -> Tensor:
        """Predict v, in the shape of z_t.

        z_t [B, c, 1+t, h, w]; time [B], diffusion steps; label int64 [B], or [B, 1+t] where the images of a stack
        differ (None: no label); image bool [B], True where the sample is a stack of images that must not see
        one another; self_condition, the last estimate of the clean latent, in the shape of z_t (None: zeros).
        """
        self._check(z_t, time, label, image, self_condition)
        joined = join_self_condition(z_t, self_condition) if self.config.self_condition else z_t
        patches, grid = patchify(joined, self.config.patch)
        x = self.project_in(patches)
        x = x + self._positions(grid[0], image).flatten(1, 3).to(x.dtype)  # under autocast, tokens stay narrow

        cond = self.embed_time(time)
        if self.embed_class is not None:
            labels = label if label is not None else torch.full_like(time, self.embed_class.classes, dtype=torch.int64)
            classes = self.embed_class(labels)
            cond = classes + (cond[:, None] if classes.ndim == 3 else cond)

        # g scales, b shifts, a gates; 1 is attention, 2 the MLP. The norm before each sub-layer is fused with the
        # residual of the one before it, so the last layer's MLP meets the final modulation.
        modulations = [layer.chunk(6, dim=-1) for layer in self.modulation(cond).unbind(0)]
        g_final, b_final = self.final_modulation(F.silu(cond)).chunk(2, dim=-1)
        following = [(m[0], m[2]) for m in modulations[1:]] + [(g_final, b_final)]
        h = adaln_modulate(x, modulations[0][2], modulations[0][0])
        for layer, (_, g2, _, b2, a1, a2), (g_next, b_next) in zip(self.layers, modulations, following, strict=True):
            x, h = adaln_residual_modulate(x, layer.attend(h, grid, image), a1, b2, g2)
            x, h = adaln_residual_modulate(x, layer.mlp(h), a2, b_next, g_next)
        return unpatchify(self.project_out(h), grid, self.config.patch)

    def _positions(self, frames: int, image: Tensor | None) -> Tensor:
        """Space table + time table, [B or 1, frames, h, w, width]; every image of a stack stands at frame 0."""
        times = self.time_table[None, :frames]
        if image is not None:
            times = torch.where(image[:, None, None], times[:, :1], times)
        return times[:, :, None, None] + self.space_table

    def _check(
        self, z_t: Tensor, time: Tensor, label: Tensor | None, image: Tensor | None, self_condition: Tensor | None
    ) -> None:
        frames, height, width = self.config.latent_size
        channels = self.config.latent_channels
        got = tuple(z_t.shape)
        if z_t.ndim != 5 or got[1] != channels or not 1 <= got[2] <= frames or got[3:] != (height, width):
            raise ValueError(f"z_t: got shape {got}; expected [B, {channels}, 1 to {frames}, {height}, {width}]")
        if tuple(time.shape) != got[:1]:
            raise ValueError(f"time: got shape {tuple(time.shape)}; expected [{got[0]}], one step per sample")
        if label is not None:
            if self.embed_class is None:
                raise ValueError("label: got a tensor; expected None, since the model has no classes")
            if tuple(label.shape) not in (got[:1], (got[0], got[2])):
                raise ValueError(f"label: got shape {tuple(label.shape)}; expected [{got[0]}] or [{got[0]}, {got[2]}]")
        if image is not None and (image.dtype != torch.bool or tuple(image.shape) != got[:1]):
            raise ValueError(f"image: got {image.dtype} {tuple(image.shape)}; expected torch.bool [{got[0]}]")
        if self_condition is not None and not self.config.self_condition:
            raise ValueError("self_condition: got a tensor; expected None, since the model has no self-conditioning")


def patchify(x: Tensor, patch: int) -> tuple[Tensor, tuple[int, int, int]]:
    """[B, c, T, H, W] -> tokens [B, T * H/p * W/p, c * p * p] and the grid (T, H/p, W/p)."""
    x = x.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # B c T H/p p W/p p
    x = x.permute(0, 2, 3, 5, 1, 4, 6)
    return x.flatten(4).flatten(1, 3), (x.shape[1], x.shape[2], x.shape[3])


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: int) -> Tensor:
    """The inverse of `patchify`: [B, N, c * p * p] -> [B, c, T, H, W]."""
    x = tokens.unflatten(2, (-1, patch, patch)).unflatten(1, grid)  # B T H/p W/p c p p
    return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
