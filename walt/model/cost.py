"""Parameters, FLOPs and memory of networks, found on tensors without storage."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from walt.model.config import DiffusionConfig, TokenizerConfig, TransformerConfig
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer

STATES = 4  # float32 numbers for each parameter that AdamW with an average keeps: weight, two moments, average


def activation_bytes(config: TransformerConfig, batch: int, *, checkpointing: bool = False) -> int:
    """Bytes of float32 tensors that one training pass of `batch` videos keeps for its backward pass.

    Measured on fake tensors for two and for four layers (three and five if the number is odd), since every two layers
    more keep as much again. Labels and token ids are left out, as the model checks their values: a few numbers a
    sample.
    """
    config = replace(config, classes=0, text_vocabulary=0)
    few = 2 + config.layers % 2
    with FakeTensorMode():
        if config.layers <= few:
            return saved_bytes(config, batch, checkpointing=checkpointing)
        first, second = (
            saved_bytes(replace(config, layers=few + more), batch, checkpointing=checkpointing) for more in (0, 2)
        )
    return first + (config.layers - few) // 2 * (second - first)


def saved_bytes(config: TransformerConfig, batch: int, *, checkpointing: bool = False) -> int:
    """Bytes of what autograd saves in a forward pass: each storage counted once, weights left out."""
    model = Transformer(config)
    model.checkpointing = checkpointing
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no storage is freed and its number used again

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    x0 = torch.zeros(batch, config.latent_channels, *config.latent_size)
    time = torch.zeros(batch, dtype=torch.int64)
    conditions: dict[str, Tensor] = {}
    if config.low_resolution:
        half = (config.latent_size[0], config.latent_size[1] // 2, config.latent_size[2] // 2)
        conditions = {"low_resolution": torch.zeros(batch, config.latent_channels, *half), "noise_level": time}
    if config.text_width:
        shape = (batch, config.text_length)
        ids = bool(config.text_vocabulary)
        text = torch.zeros(shape, dtype=torch.int64) if ids else torch.zeros(*shape, config.text_width)
        conditions |= {"text": text, "text_mask": torch.ones(shape, dtype=torch.bool)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x0, time, **conditions)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def denoiser_flops(config: TransformerConfig, diffusion: DiffusionConfig) -> int:
    """FLOPs of training on one sample: three forward passes, with self-conditioning four."""
    passes = 4 if config.self_condition and diffusion.self_condition_probability > 0 else 3
    return passes * sum(config.flops().values())


@functools.cache
def tokenizer_flops(config: TokenizerConfig, frames: int, height: int, width: int) -> int:
    """FLOPs of training on one video: encode, decode and backward, as PyTorch counts products.

    Of the tokenizer alone: the discriminator and the perceptual loss are not counted.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, as it imports Triton

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        tokenizer = Tokenizer(config)
        tokenizer.decode(tokenizer.encode(torch.zeros(1, 3, frames, height, width))).sum().backward()
    return counter.get_total_flops()
