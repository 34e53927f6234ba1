"""AdaLN of other libraries, by the adaln ops: LayerNorm without weight and bias, ``* (1 + scale) + shift``, gates.

Scale, shift and gate come out of the class's own layers, as [B, D] or [B, N, D]; from there on one pass of ours takes
the place of the norm, the product and the sum, and where a block does both, of the gated residual before them.
Where ours would have another dtype than theirs (autocast widens norms on a GPU; float32 scales widen 16-bit tokens), or
a norm has hooks, the helpers below compute the formula as it stands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._library import autocast_enabled
from ..adaln_lora import adaln_modulate, adaln_residual, adaln_residual_modulate
from .adapter import Adapter, class_path, fingerprint, is_bare

FAMILY = ("AdaLayerNorm", "AdaLN", "LayerNormZero", "AdaNorm")

_ROWS_ALONE = "computes scales, shifts and gates and has no norm"
LEFT = {
    "diffusers.models.normalization.AdaLayerNormSingle": _ROWS_ALONE,
    "diffusers.models.transformers.transformer_hunyuan_video.HunyuanVideoAdaNorm": _ROWS_ALONE,
}

_FP32 = ("diffusers.models.normalization.FP32LayerNorm", "1f774f77e5bd6205")


def _per_token(rows: Tensor) -> Tensor:
    return rows[:, None] if rows.dim() == 2 else rows


def _takes(x: Tensor, *rows: Tensor) -> bool:
    """Whether x is tokens [B, N, D] and every one of ``rows`` [B, D], [B, 1, D] or [B, N, D]."""
    if x.dim() != 3 or x.numel() == 0:
        return False
    batch, tokens, width = x.shape
    shapes = ((batch, width), (batch, 1, width), (batch, tokens, width))
    return all(tuple(row.shape) in shapes for row in rows)


def _plain(norm: Any, x: Tensor) -> bool:
    """Whether a call of ``norm`` is a LayerNorm over the last dimension in x's dtype or wider, and nothing else."""
    if type(norm) is not nn.LayerNorm and (class_path(type(norm)) != _FP32[0] or x.dtype == torch.float64):
        return False
    bare = norm.weight is None and norm.bias is None and norm.normalized_shape == x.shape[-1:]
    return bool(bare) and is_bare(norm)


def _normalizes(norm: Any, x: Tensor, scale: Tensor, shift: Tensor) -> bool:
    """Whether ``norm(x) * (1 + scale) + shift`` is what adaln_modulate returns, in the same dtype."""
    widened = x.device.type != "cpu" and autocast_enabled(x.device.type) and x.dtype.itemsize == 2
    return _takes(x, scale, shift) and _plain(norm, x) and _common(x, scale, shift) == x.dtype and not widened


def _common(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _modulate(norm: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift"""
    if _normalizes(norm, x, scale, shift):
        return adaln_modulate(x, shift.to(x.dtype), scale.to(x.dtype), eps=norm.eps)
    return norm(x) * (1 + _per_token(scale)) + _per_token(shift)


def _residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + gate * branch"""
    if _gates(x, branch, gate):
        return adaln_residual(x, branch.to(x.dtype), gate.to(x.dtype))
    return x + _per_token(gate) * branch


def _gates(x: Tensor, branch: Tensor, gate: Tensor) -> bool:
    return _takes(x, gate) and branch.shape == x.shape and _common(x, branch, gate) == x.dtype


def _residual_modulate(
    norm: Any, x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """The two above in turn: the new x, and what comes of it."""
    if _gates(x, branch, gate) and _normalizes(norm, x, scale, shift):
        rows = (row.to(x.dtype) for row in (gate, shift, scale))
        return adaln_residual_modulate(x, branch.to(x.dtype), *rows, eps=norm.eps)
    x = _residual(x, branch, gate)
    return x, _modulate(norm, x, scale, shift)


def _cosmos(self: Any, hidden_states: Tensor, embedded_timestep: Tensor, temb: Tensor | None = None) -> Tensor:
    rows = self.linear_2(self.linear_1(self.activation(embedded_timestep)))
    if temb is not None:
        rows = rows + temb[..., : 2 * self.embedding_dim]
    shift, scale = rows.chunk(2, dim=-1)
    return _modulate(self.norm, hidden_states, scale, shift)


def _cosmos_zero(
    self: Any, hidden_states: Tensor, embedded_timestep: Tensor, temb: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    rows = self.linear_2(self.linear_1(self.activation(embedded_timestep)))
    if temb is not None:
        rows = rows + temb
    shift, scale, gate = rows.chunk(3, dim=-1)
    return _modulate(self.norm, hidden_states, scale, shift), _per_token(gate)


def _ada(self: Any, x: Tensor, timestep: Tensor | None = None, temb: Tensor | None = None) -> Tensor:
    if self.emb is not None:
        temb = self.emb(timestep)
    shift, scale = self.linear(self.silu(temb)).chunk(2, dim=1)
    return _modulate(self.norm, x, scale, shift)


def _ada_zero(
    self: Any,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: torch.dtype | None = None,
    emb: Tensor | None = None,
) -> tuple[Tensor, ...]:
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, *others = self.linear(self.silu(emb)).chunk(6, dim=1)
    return _modulate(self.norm, x, scale, shift), *others


def _ada_zero_single(self: Any, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    return _modulate(self.norm, x, scale, shift), gate


def _ada_continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return _modulate(self.norm, x, scale, shift)


def _cogvideox(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shift, scale, gate, text_shift, text_scale, text_gate = self.linear(self.silu(temb)).chunk(6, dim=1)
    video = _modulate(self.norm, hidden_states, scale, shift)
    text = _modulate(self.norm, encoder_hidden_states, text_scale, text_shift)
    return video, text, gate[:, None], text_gate[:, None]


def _dit_block(self: Any, x: Tensor, c: Tensor) -> Tensor:
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(c).chunk(6, dim=1)
    branch = self.attn(_modulate(self.norm1, x, scale, shift))
    x, h = _residual_modulate(self.norm2, x, branch, gate, mlp_scale, mlp_shift)
    return _residual(x, self.mlp(h), mlp_gate)


def _dit_final(self: Any, x: Tensor, c: Tensor) -> Tensor:
    shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
    return self.linear(_modulate(self.norm_final, x, scale, shift))


def _basic_block(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Any = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """Latte's and PixArt's block (adaLN-single) and diffusers' DiT's (adaLN-zero)."""
    x, single = hidden_states, self.norm_type == "ada_norm_single"
    if x.dim() != 3 or cross_attention_kwargs or self._chunk_size is not None:
        return self.original_forward(
            x,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            timestep,
            cross_attention_kwargs,
            class_labels,
            added_cond_kwargs,
        )
    if single:
        rows = self.scale_shift_table + timestep.reshape(len(x), 6, -1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = rows.chunk(6, dim=1)
        h, norm = _modulate(self.norm1, x, scale, shift), self.norm2
    else:
        h, gate, mlp_shift, mlp_scale, mlp_gate = self.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
        norm = self.norm3
    context = encoder_hidden_states if self.only_cross_attention else None
    branch = self.attn1(h, encoder_hidden_states=context, attention_mask=attention_mask)
    if self.attn2 is None:
        x, h = _residual_modulate(norm, x, branch, gate, mlp_scale, mlp_shift)
    else:
        x = _residual(x, branch, gate)
        h = x if single else self.norm2(x)
        x = x + self.attn2(h, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
        h = _modulate(norm, x, mlp_scale, mlp_shift)
    return _residual(x, self.ff(h), mlp_gate)


def _wan_block(
    self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Tensor
) -> Tensor:
    """Scales, shifts and gates are float32, and so is what they do to tokens of any dtype before it is rounded."""
    x = hidden_states
    axis = temb.dim() - 2  # [B, 6, D], or of every token [B, N, 6, D]
    rows = (self.scale_shift_table + temb.float()).unbind(axis)
    wide = x.dtype == torch.float64 or rows[0].dtype != torch.float32
    if wide or not (_takes(x, *rows) and _plain(self.norm1, x) and _plain(self.norm3, x)):
        return self.original_forward(x, encoder_hidden_states, temb, rotary_emb)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = rows
    h = adaln_modulate(x, shift, scale, eps=self.norm1.eps)
    x = _wan_residual(x, self.attn1(h, None, None, rotary_emb), gate)
    x = x + self.attn2(self.norm2(x.float()).type_as(x), encoder_hidden_states, None, None)
    h = adaln_modulate(x, ffn_shift, ffn_scale, eps=self.norm3.eps)
    return _wan_residual(x, self.ffn(h), ffn_gate)


def _wan_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    if branch.shape == x.shape and _common(x, branch) == x.dtype:
        return adaln_residual(x, branch.to(x.dtype), gate)
    return (x.float() + branch * _per_token(gate)).type_as(x)


def _refuses(*norms: str) -> Any:
    """``norms`` are the names of the norms that the forward takes the place of."""

    def reason(module: Any) -> str | None:
        for name in norms:
            norm = getattr(module, name)
            if class_path(type(norm)) == _FP32[0]:
                if fingerprint(type(norm).forward) != _FP32[1]:
                    return f"its {name} is of a release that was not checked"
            elif type(norm) is not nn.LayerNorm:
                return f"its {name} is a {type(norm).__name__}"
            if norm.weight is not None or norm.bias is not None:
                return f"its {name} has a weight or a bias of its own"
        return None

    return reason


def _refuses_ada(module: Any) -> str | None:
    if module.chunk_dim != 1:
        return f"chunk_dim is {module.chunk_dim}: one scale and one shift for all samples"
    return _refuses("norm")(module)


def _refuses_basic_block(module: Any) -> str | None:
    norms = {"ada_norm_single": ("norm1", "norm2"), "ada_norm_zero": ("norm3",)}.get(module.norm_type)
    if norms is None:
        return f"norm_type is {module.norm_type!r}"
    return "it adds positions inside the block" if module.pos_embed is not None else _refuses(*norms)(module)


def _adapter(path: str, forward: Any, refuses: Any, known: str, op: str = "adaln_modulate", *called: str) -> Adapter:
    return Adapter(path, op, forward, frozenset({known}), refuses, ("forward", *called))


_NORMS, _BLOCKS = "diffusers.models.normalization", "diffusers.models.transformers"
_BOTH = "adaln_residual_modulate"

# Checked against diffusers 0.42.1 and the public sources of DiT (models.py) and Latte (models/latte.py).
ADAPTERS = (
    _adapter(f"{_BLOCKS}.transformer_cosmos.CosmosAdaLayerNorm", _cosmos, _refuses("norm"), "0bafbf304bae6b6e"),
    _adapter(
        f"{_BLOCKS}.transformer_cosmos.CosmosAdaLayerNormZero", _cosmos_zero, _refuses("norm"), "0032c82ed73099e8"
    ),
    _adapter(f"{_NORMS}.AdaLayerNorm", _ada, _refuses_ada, "ebbf8fbd282c8f42"),
    _adapter(f"{_NORMS}.AdaLayerNormZero", _ada_zero, _refuses("norm"), "51382d7ba9537d28"),
    _adapter(f"{_NORMS}.AdaLayerNormZeroSingle", _ada_zero_single, _refuses("norm"), "b33be1820cb44f10"),
    _adapter(f"{_NORMS}.AdaLayerNormContinuous", _ada_continuous, _refuses("norm"), "1b32b8d4f70c2ca6"),
    _adapter(f"{_NORMS}.CogVideoXLayerNormZero", _cogvideox, _refuses("norm"), "d68438e342aad89d"),
    _adapter(
        "diffusers.models.attention.BasicTransformerBlock",
        _basic_block,
        _refuses_basic_block,
        "ef029e74fb99e6fe",
        "adaln_residual",
    ),
    *(
        _adapter(f"{_BLOCKS}.{file}.WanTransformerBlock", _wan_block, _refuses("norm1", "norm3"), "b1c3724d168a629e")
        for file in ("transformer_wan", "transformer_wan_animate")
    ),
    *(
        _adapter(path, _dit_block, _refuses("norm1", "norm2"), "d0f52d6741866df6", _BOTH, "modulate")
        for path in ("models.DiTBlock", "models.latte.TransformerBlock")
    ),
    *(
        _adapter(path, _dit_final, _refuses("norm_final"), "d68ad339e0325403", "adaln_modulate", "modulate")
        for path in ("models.FinalLayer", "models.latte.FinalLayer")
    ),
)
