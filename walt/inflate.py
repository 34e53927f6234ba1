"""2D-to-3D inflation: a video tokenizer that starts from a trained image tokenizer (MAGVIT-v2's central inflation)."""

from __future__ import annotations

import dataclasses

import torch

from walt.config import TokenizerConfig
from walt.tokenizer import Tokenizer

__all__ = ["inflate"]


@torch.no_grad()
def inflate(image_tokenizer: Tokenizer, config: TokenizerConfig) -> Tokenizer:
    """A video tokenizer of `config` that codes every frame it looks at as `image_tokenizer` would code it alone.

    Each kernel goes into the last time slice of the video tokenizer's, where the present frame is; the other slices are
    zero. The channels of an up-sampling layer are repeated for each of the frames that it makes. To rounding, then,
    latent frame i is the image latent of frame 4i, and each frame is decoded as an image from its own latent frame;
    a one-frame video gives what the image gives, in both directions. Latent statistics, dtype and device are kept.

    The configurations have to agree but for `kind` and `time_padding`; ValueError names the field in which they do not.
    """
    if image_tokenizer.config.kind != "image":
        raise ValueError(f"image_tokenizer: got one of kind {image_tokenizer.config.kind!r}; expected 'image'")
    if config.kind != "video":
        raise ValueError(f"config: got kind {config.kind!r}; expected 'video'")
    for field in dataclasses.fields(config):
        found, expected = getattr(config, field.name), getattr(image_tokenizer.config, field.name)
        if field.name not in ("kind", "time_padding") and found != expected:
            raise ValueError(f"{field.name}: got {found!r}; expected the image tokenizer's {expected!r}")
    video_tokenizer = Tokenizer(config).to(image_tokenizer.latent_mean)
    targets = video_tokenizer.state_dict()
    for name, source in image_tokenizer.state_dict().items():
        target = targets[name]
        # Before depth-to-space channels are ordered (time, height, width, C): one block for each new frame.
        source = source.repeat(len(target) // len(source), *[1] * (source.ndim - 1))
        if source.ndim == 5:
            target.zero_()
            target[:, :, -1:] = source
        else:
            target.copy_(source)
    return video_tokenizer
