"""W.A.L.T: a causal video tokenizer and a windowed-attention diffusion transformer on the kernels of walt_kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from walt.model.config import DiffusionConfig, TokenizerConfig, TransformerConfig
    from walt.model.diffusion import Diffusion
    from walt.model.tokenizer import Tokenizer
    from walt.model.transformer import Transformer
    from walt.presets import PRESETS
    from walt.sample.pipeline import WaltPipeline

__all__ = [
    "PRESETS",
    "Diffusion",
    "DiffusionConfig",
    "Tokenizer",
    "TokenizerConfig",
    "Transformer",
    "TransformerConfig",
    "WaltPipeline",
]

# Loaded on first use: they import PyTorch, which `walt --help` does not need.
_MODULES = {
    "PRESETS": "walt.presets",
    "Diffusion": "walt.model.diffusion",
    "DiffusionConfig": "walt.model.config",
    "Tokenizer": "walt.model.tokenizer",
    "TokenizerConfig": "walt.model.config",
    "Transformer": "walt.model.transformer",
    "TransformerConfig": "walt.model.config",
    "WaltPipeline": "walt.sample.pipeline",
}


if not TYPE_CHECKING:  # a type checker that saw this would accept any name

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'walt' has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
