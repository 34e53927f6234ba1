"""W.A.L.T: a causal video tokenizer and a windowed-attention diffusion transformer on the kernels of walt_kernels."""

from __future__ import annotations

from walt.model.config import DiffusionConfig, TokenizerConfig, TransformerConfig
from walt.model.diffusion import Diffusion
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.presets import PRESETS

__all__ = [
    "PRESETS",
    "Diffusion",
    "DiffusionConfig",
    "Tokenizer",
    "TokenizerConfig",
    "Transformer",
    "TransformerConfig",
]
