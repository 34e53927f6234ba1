"""W.A.L.T: a causal video tokenizer and a windowed-attention diffusion transformer on the kernels of walt_kernels."""

from __future__ import annotations

from walt.config import PRESETS, DiffusionConfig, TokenizerConfig, TransformerConfig
from walt.diffusion import Diffusion
from walt.tokenizer import Tokenizer
from walt.transformer import Transformer

__all__ = [
    "PRESETS",
    "Diffusion",
    "DiffusionConfig",
    "Tokenizer",
    "TokenizerConfig",
    "Transformer",
    "TransformerConfig",
]
