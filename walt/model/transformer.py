"""The denoiser: a transformer over latent video with windowed attention (W.A.L.T, paper sections 3.2 to 3.5).

Our own choices, where the paper is silent: GELU in the MLP, initial values, the class table's row for "no label", no
bias table in the cross-attention, and 9d of modulations in place of 6d where there is text (which brings the text
models to the paper's 419 M and 1.3 B parameters).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from walt.model.conditioning import ClassEmbedding, TextEmbedding, TimeEmbedding, Upscale, frame_condition
from walt.model.config import TransformerConfig
from walt_kernels import adaln_modulate, adaln_residual_modulate, window_attention
from walt_kernels.nn import AdaLNLoRA, WindowAttention, reset_children

__all__ = ["Transformer"]

Context = tuple[Tensor, Tensor]  # tokens [B, L, width] and mask bool [B, L]
Rows = tuple[Tensor, ...]  # [B, (T,) width], one for each branch of a layer
Modulation = tuple[Rows, Rows, Rows]  # scales, shifts, gates


class SeparateAdaLN(nn.Module):
    """Modulation with a full linear for each layer: what `AdaLNLoRA` approximates."""

    def __init__(self, width: int, layers: int, chunks: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, chunks * width) for _ in range(layers))

    def forward(self, cond: Tensor) -> Tensor:
        """cond [..., width] -> [layers, ..., chunks * width]."""
        activated = F.silu(cond)
        return torch.stack([layer(activated) for layer in self.layers])


class CrossAttention(nn.Module):
    """Attention of a window's tokens to themselves and to the text: k and v from concat[window tokens, text tokens]."""

    q_norm: nn.Parameter | None
    k_norm: nn.Parameter | None

    def __init__(self, width: int, heads: int, window: tuple[int, int, int], *, qk_norm: bool = True) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = nn.Parameter(torch.empty(width // heads)) if qk_norm else None
        self.k_norm = nn.Parameter(torch.empty(width // heads)) if qk_norm else None
        self.reset_parameters(recurse=False)

    def reset_parameters(self, *, recurse: bool = True) -> None:
        if recurse:
            reset_children(self)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                nn.init.ones_(norm)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x [B, T, H, W, width], context tokens [B, L, width] and mask [B, L] -> [B, T, H, W, width]."""
        tokens, mask = context
        rows = x.flatten(0, -2)
        dim = x.shape[-1] // self.heads  # not -1, which is no size in an empty batch
        q = self.q(rows).reshape(*x.shape[:-1], self.heads, dim)
        k, v = self.kv(rows).reshape(*x.shape[:-1], 2, self.heads, dim).unbind(-3)
        context_k, context_v = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        out = window_attention(
            q,
            k,
            v,
            window=self.window,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            context_k=context_k,
            context_v=context_v,
            context_mask=mask,
        )
        return self.proj(out.reshape(rows.shape)).reshape(x.shape)


class Layer(nn.Module):
    """Window attention, cross-attention to a text if there is one, and MLP, with modulations and residuals.

    The norm before each branch is fused with the residual of the one before it, so a layer takes its first branch's
    input from the layer before and makes the next layer's.
    """

    def __init__(
        self, config: TransformerConfig, window: tuple[int, int, int], cross_window: tuple[int, int, int]
    ) -> None:
        super().__init__()
        width = config.width
        self.attention = WindowAttention(
            width, config.heads, window, qk_norm=config.qk_norm, bias_table=config.bias_tables
        )
        self.cross: CrossAttention | None = None
        if config.text_width:
            self.cross = CrossAttention(width, config.heads, cross_window, qk_norm=config.qk_norm)
        self.mlp = nn.Sequential(
            nn.Linear(width, config.mlp_ratio * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.mlp_ratio * width, width),
        )
        self.spatial = window[0] == 1

    def forward(
        self,
        x: Tensor,
        h: Tensor,
        modulation: Modulation,
        following: tuple[Tensor, Tensor],
        grid: tuple[int, int, int],
        image: Tensor | None,
        context: Context | None,
    ) -> tuple[Tensor, Tensor]:
        """x, the residual stream, and h, the normed and modulated input of the attention [B, N, width] -> the same.

        following: the scale and shift of the next layer's input, [B, (T,) width]. image: bool [B, T].
        """
        scales, shifts, gates = modulation
        # Spatial windows lie inside one frame and need no mask.
        out = self.attention(h.unflatten(1, grid), image=None if self.spatial else image).flatten(1, 3)
        x, h = adaln_residual_modulate(x, out, gates[0], shifts[1], scales[1])
        if self.cross is not None and context is not None:
            out = self.cross(h.unflatten(1, grid), context).flatten(1, 3)
            x, h = adaln_residual_modulate(x, out, gates[1], shifts[2], scales[2])
        out = self.mlp(h.flatten(0, 1)).view_as(h)  # linear layers of matrices make no views
        return adaln_residual_modulate(x, out, gates[-1], following[1], following[0])


def split(modulations: Tensor, branches: int) -> list[Modulation]:
    """[layers, ..., 3 * branches * width] -> what each layer is modulated by.

    Of all layers at once: in the backward pass, every split is launches that join its gradients.
    """
    chunks = [chunk.unbind(0) for chunk in modulations.chunk(3 * branches, dim=-1)]
    return [(row[:branches], row[branches:-branches], row[-branches:]) for row in zip(*chunks, strict=True)]


class Transformer(nn.Module):
    """v-prediction of a noisy latent video, or of a stack of independent noisy latent images.

    Modulations and the last projection are zero at first (adaLN-Zero): every layer is the identity and the output 0.

    With `checkpointing` (False at first; set it before training) the backward pass computes each layer again instead of
    keeping its activations: the same gradients, less memory, a third more time.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        width, pixels = config.width, config.patch**2
        frames, height, columns = config.grid
        self.project_in = nn.Linear(config.input_channels * pixels, width)
        self.space_table = nn.Parameter(torch.empty(height, columns, width))
        self.time_table = nn.Parameter(torch.empty(frames, width))
        self.embed_time = TimeEmbedding(width, config.time_features)
        self.embed_class = ClassEmbedding(config.classes, width) if config.classes else None
        self.embed_text: TextEmbedding | None = None
        if config.text_width:
            self.embed_text = TextEmbedding(width, config.text_width, config.text_length, config.text_vocabulary)
        self.embed_noise = TimeEmbedding(width, config.time_features) if config.low_resolution else None
        self.upscale = Upscale(config.latent_channels) if config.low_resolution else None
        chunks = 3 * config.sublayers
        self.modulation: nn.Module
        if config.adaln == "lora":
            self.modulation = AdaLNLoRA(width, config.layers, config.adaln_rank, chunks)
        else:
            self.modulation = SeparateAdaLN(width, config.layers, chunks)
        windows = zip(config.windows(), config.cross_windows(), strict=True)
        layers = nn.ModuleList(Layer(config, *pair) for pair in windows)
        self.layers = cast(Sequence[Layer], layers)  # type checkers see no layers in a ModuleList
        self.final_modulation = nn.Linear(width, 2 * width)
        self.project_out = nn.Linear(width, config.latent_channels * pixels)
        self.reset_parameters(recurse=False)

    def reset_parameters(self, *, recurse: bool = True) -> None:
        """Xavier for the linear layers, normal(0.02) for the tables, zeros for modulations and the last projection.

        With recurse=False all else stays as it is: norms, bias tables, LoRA, embeddings of classes and text.
        """
        if recurse:
            reset_children(self)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for table in (self.space_table, self.time_table):
            nn.init.normal_(table, std=0.02)
        for module in (self.modulation, self.final_modulation, self.project_out):
            for linear in module.modules():
                if isinstance(linear, nn.Linear):
                    nn.init.zeros_(linear.weight)

    def forward(
        self,
        z_t: Tensor,
        time: Tensor,
        *,
        label: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        image: Tensor | None = None,
        self_condition: Tensor | None = None,
        frames: Tensor | None = None,
        known: Tensor | None = None,
        low_resolution: Tensor | None = None,
        noise_level: Tensor | None = None,
    ) -> Tensor:
        """Predict v, in the shape of z_t.

        Args:
            z_t: [B, c, 1+t, h, w], noisy.
            time: [B], diffusion steps.
            label: int64 [B], or [B, 1+t] where the images of a stack differ. None, or `classes`: no label.
            text: features [B, L, text_width], or with a vocabulary token ids int64 [B, L]. None: no text.
            text_mask: bool [B, L], True where a token is visible (None: everywhere). A text without one is no text.
            image: bool [B], True where the sample is a stack of images that must not see one another.
            self_condition: the last estimate of the clean latent, in the shape of z_t. None: zeros.
            frames, known: a clean latent in the shape of z_t, of which the first `known` int64 [B] frames are seen.
            low_resolution: [B, c, 1+t, h/2, w/2], noised to `noise_level` [B], in diffusion steps.
        """
        self._check(z_t, time, label, image)
        joined = self._join(z_t, self_condition, frames, known, low_resolution, noise_level)
        patches, grid = patchify(joined, self.config.patch)
        x = self.project_in(patches)
        x = x + self._positions(grid[0], image).flatten(1, 3).to(x.dtype)  # under autocast, tokens stay narrow
        cond = self._condition(time, label, noise_level)
        context = self._context(text, text_mask, z_t)

        if image is not None:
            image = image[:, None].expand(-1, grid[0])
        modulations = split(self.modulation(cond), self.config.sublayers)
        inputs = [(scales[0], shifts[0]) for scales, shifts, _ in modulations]
        scale, shift = self.final_modulation(F.silu(cond)).chunk(2, dim=-1)
        h = adaln_modulate(x, inputs[0][1], inputs[0][0])
        for layer, modulation, following in zip(self.layers, modulations, [*inputs[1:], (scale, shift)], strict=True):
            arguments = (x, h, modulation, following, grid, image, context)
            if self.checkpointing and torch.is_grad_enabled():
                x, h = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x, h = layer(*arguments)
        return unpatchify(self.project_out(h), grid, self.config.patch)

    def _join(
        self,
        z_t: Tensor,
        self_condition: Tensor | None,
        frames: Tensor | None,
        known: Tensor | None,
        low_resolution: Tensor | None,
        noise_level: Tensor | None,
    ) -> Tensor:
        """z_t and the conditions that are channels beside it: [B, input_channels, 1+t, h, w]."""
        config, shape = self.config, tuple(z_t.shape)
        channels = [z_t]
        if config.self_condition:
            channels.append(_or_zeros("self_condition", self_condition, shape, z_t))
        elif self_condition is not None:
            raise ValueError("self_condition: got a tensor; expected None, since the model has no self-conditioning")
        if (frames is None) != (known is None):
            missing, other = ("frames", "known") if frames is None else ("known", "frames")
            raise ValueError(f"{missing}: got None beside {other}; expected both or neither")
        if config.frame_condition:
            if known is None:
                known = torch.zeros(shape[0], dtype=torch.int64, device=z_t.device)
            if known.dtype != torch.int64 or tuple(known.shape) != shape[:1]:
                raise ValueError(f"known: got {known.dtype} {tuple(known.shape)}; expected torch.int64 [{shape[0]}]")
            channels.append(frame_condition(_or_zeros("frames", frames, shape, z_t), known))
        elif frames is not None:
            raise ValueError("frames: got a tensor; expected None, since the model has no frame_condition")
        if self.upscale is not None:
            for name, tensor in (("low_resolution", low_resolution), ("noise_level", noise_level)):
                if tensor is None:
                    raise ValueError(
                        f"{name}: got None; expected a tensor, since the model is a super-resolution stage"
                    )
            half = (*shape[:3], shape[3] // 2, shape[4] // 2)
            channels.append(self.upscale(_or_zeros("low_resolution", low_resolution, half, z_t)))
        elif low_resolution is not None or noise_level is not None:
            name = "noise_level" if low_resolution is None else "low_resolution"
            raise ValueError(f"{name}: got a tensor; expected None, since the model is no super-resolution stage")
        return torch.cat(channels, dim=1) if len(channels) > 1 else z_t

    def _condition(self, time: Tensor, label: Tensor | None, noise_level: Tensor | None) -> Tensor:
        """The input of the modulations: [B, width], or [B, 1+t, width] with labels for each image of a stack."""
        cond = self.embed_time(time)
        if self.embed_noise is not None and noise_level is not None:
            if noise_level.shape != time.shape:
                raise ValueError(f"noise_level: got shape {tuple(noise_level.shape)}; expected {tuple(time.shape)}")
            cond = cond + self.embed_noise(noise_level)
        if self.embed_class is not None:
            labels = label if label is not None else torch.full_like(time, self.embed_class.classes, dtype=torch.int64)
            classes = self.embed_class(labels)
            cond = classes + (cond[:, None] if classes.ndim == 3 else cond)
        return cond

    def _context(self, text: Tensor | None, mask: Tensor | None, z_t: Tensor) -> Context | None:
        if self.embed_text is None:
            if text is not None or mask is not None:
                name = "text_mask" if text is None else "text"
                raise ValueError(f"{name}: got a tensor; expected None, since the model takes no text")
            return None
        if text is None:
            if mask is not None:
                raise ValueError("text_mask: got a tensor; expected None without text")
            text, mask = self.embed_text.null_text(z_t.shape[0], z_t.device)
        if text.shape[:1] != z_t.shape[:1]:
            raise ValueError(f"text: got {text.shape[0]} texts; expected {z_t.shape[0]}, one for each sample")
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        return self.embed_text(text, mask)

    def _positions(self, frames: int, image: Tensor | None) -> Tensor:
        """Space table + time table, [B or 1, frames, h, w, width]; every image of a stack stands at frame 0."""
        times = self.time_table[None, :frames]
        if image is not None:
            times = torch.where(image[:, None, None], times[:, :1], times)
        return times[:, :, None, None] + self.space_table

    def _check(self, z_t: Tensor, time: Tensor, label: Tensor | None, image: Tensor | None) -> None:
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
        if image is not None:
            if image.dtype != torch.bool or tuple(image.shape) != got[:1]:
                raise ValueError(f"image: got {image.dtype} {tuple(image.shape)}; expected torch.bool [{got[0]}]")
            if self.config.text_width and self.config.cross_attention == "all":
                raise ValueError(
                    'image: got a tensor; expected None: with cross_attention="all" the images of a stack would see one'
                    ' another, so joint training needs cross_attention="spatial"'
                )


def _or_zeros(name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The tensor in z_t's dtype, zeros for None; ValueError unless it has the shape."""
    if tensor is None:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}; expected {shape}, to fit z_t")
    return tensor.to(like.dtype)


def patchify(x: Tensor, patch: int) -> tuple[Tensor, tuple[int, int, int]]:
    """[B, c, T, H, W] -> tokens [B, T * H/p * W/p, c * p * p] and the grid (T, H/p, W/p)."""
    x = x.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # B c T H/p p W/p p
    x = x.permute(0, 2, 3, 5, 1, 4, 6)
    return x.flatten(4).flatten(1, 3), (x.shape[1], x.shape[2], x.shape[3])


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: int) -> Tensor:
    """The inverse of `patchify`: [B, N, c * p * p] -> [B, c, T, H, W]."""
    x = tokens.unflatten(2, (-1, patch, patch)).unflatten(1, grid)  # B T H/p W/p c p p
    return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
