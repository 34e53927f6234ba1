"""Named pairs of tokenizer and transformer that fit together."""

from __future__ import annotations

from dataclasses import replace

from walt.model.config import TokenizerConfig, TransformerConfig

__all__ = ["PRESETS"]

# For 17x64x64 clips on two cores.
_TINY_TOKENIZER = TokenizerConfig(channels=8, multipliers=(2, 2, 4, 8), blocks=1, middle_blocks=0, groups=2)
_TINY = TransformerConfig(
    layers=6,
    width=192,
    heads=3,
    latent_size=(5, 8, 8),
    patch=2,
    spatial_window=(1, 4, 4),
    spacetime_window=(5, 4, 4),
    adaln_rank=8,
    classes=8,
)

# Text-to-video: T5-XL features. SR stages see the 16 x 28 tokens of the base model at 128x224 through larger patches.
_T5_XL = TransformerConfig(text_width=2048)
_WIDE = replace(_T5_XL, spatial_window=(1, 16, 28), spacetime_window=(5, 8, 14), low_resolution=True)

PRESETS: dict[str, tuple[TokenizerConfig, TransformerConfig]] = {
    "tiny": (_TINY_TOKENIZER, _TINY),
    # Class-conditional UCF-101, 17x128x128 pixels.
    "L": (TokenizerConfig(), TransformerConfig(classes=101)),
    "XL": (TokenizerConfig(), TransformerConfig(layers=28, width=1152, classes=101)),
    "tiny-text": (
        _TINY_TOKENIZER,
        replace(_TINY, classes=0, text_width=64, text_vocabulary=256, frame_condition=True),
    ),
    "tiny-sr": (_TINY_TOKENIZER, replace(_TINY, latent_size=(5, 16, 16), classes=0, low_resolution=True)),
    # Frame prediction on Kinetics-600, and ImageNet at 256x256 with the image tokenizer's widths; there the second kind
    # of window is the whole image (ours: 16x16 windows alone would never meet).
    "k600-L": (TokenizerConfig(), TransformerConfig(frame_condition=True)),
    "imagenet-L": (
        TokenizerConfig(multipliers=(1, 1, 2, 4)),
        TransformerConfig(latent_size=(1, 32, 32), spacetime_window=(1, 32, 32), adaln="separate", classes=1000),
    ),
    "L-T2V": (TokenizerConfig(), _T5_XL),
    # The paper prints a width of 9216, which would be 71 B parameters; 1920 with 52 layers makes 3.1 B.
    "base-3B": (TokenizerConfig(), replace(_T5_XL, layers=52, width=1920, frame_condition=True)),
    "sr-1.3B": (TokenizerConfig(), replace(_WIDE, layers=40, width=1408, latent_size=(5, 32, 56), patch=2)),
    "sr-419M": (TokenizerConfig(), replace(_WIDE, latent_size=(5, 64, 112), patch=4)),
    # For tests: learns nothing worth seeing, and runs anywhere.
    "minimal": (
        TokenizerConfig(
            channels=4,
            multipliers=(1, 1, 1, 1),
            blocks=1,
            middle_blocks=0,
            latent_channels=4,
            groups=2,
            adaptive_norm=False,
        ),
        TransformerConfig(
            layers=2,
            width=32,
            heads=2,
            latent_size=(2, 2, 2),
            latent_channels=4,
            patch=1,
            spatial_window=(1, 2, 2),
            spacetime_window=(2, 2, 2),
            adaln_rank=2,
            classes=2,
        ),
    ),
}
