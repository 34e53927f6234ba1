"""A trained network in another form: an image tokenizer for videos, a denoiser for other sizes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from walt.model.config import TokenizerConfig, TransformerConfig
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer

__all__ = ["inflate", "interpolate"]


@torch.no_grad()
def inflate(image_tokenizer: Tokenizer, config: TokenizerConfig) -> Tokenizer:
    """2D-to-3D inflation (MAGVIT-v2's central inflation): a video tokenizer of `config` that codes every frame it looks
    at as `image_tokenizer` would code it alone.

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


CHANGEABLE = ("latent_size", "spatial_window", "spacetime_window")


@torch.no_grad()
def interpolate(model: Transformer, config: TransformerConfig) -> Transformer:
    """The denoiser for another latent size or other windows, its position tables resampled; dtype and device stay.

    The paper fine-tunes the 128x128 model on 128x224 clips after interpolating its absolute and its relative tables;
    how, it leaves open. Ours: bicubic for the space table, over patch centres; linear for the time table, frame 0
    staying frame 0; trilinear for the bias tables, from the largest offset to the largest, offset 0 staying offset 0.

    Only latent_size, spatial_window and spacetime_window may differ from the model's own configuration (ValueError
    otherwise). Tables whose shape stays are the same bits.
    """
    for field in dataclasses.fields(config):
        old, new = getattr(model.config, field.name), getattr(config, field.name)
        if old != new and field.name not in CHANGEABLE:
            raise ValueError(f"config.{field.name}: got {new!r}; expected {old!r}, as the model has")
    with torch.device("meta"):
        resized = Transformer(config)
    shapes = {name: tensor.shape for name, tensor in resized.state_dict().items()}
    state = {
        name: tensor.clone() if tensor.shape == shapes[name] else _resize(name, tensor, shapes[name])
        for name, tensor in model.state_dict().items()
    }
    resized.load_state_dict(state, assign=True)
    resized.checkpointing = model.checkpointing
    return resized.train(model.training)


def _resize(name: str, table: Tensor, shape: torch.Size) -> Tensor:
    exact = table.double()
    if name == "space_table":  # [h, w, width]
        size = (shape[0], shape[1])
        resized = F.interpolate(exact.permute(2, 0, 1)[None], size, mode="bicubic")[0].permute(1, 2, 0)
    elif name == "time_table":  # [frames, width]
        resized = F.interpolate(exact.T[None], shape[0], mode="linear", align_corners=True)[0].T
    else:  # [heads, 2t-1, 2h-1, 2w-1]
        resized = _resize_bias(exact, shape[1:])
    return resized.to(table.dtype).contiguous()


def _resize_bias(table: Tensor, shape: torch.Size) -> Tensor:
    for axis, size in enumerate(shape, 1):
        if size == 1:  # offset 0 is all there is
            table = table.narrow(axis, table.shape[axis] // 2, 1)
    return F.interpolate(table[None], tuple(shape), mode="trilinear", align_corners=True)[0]
