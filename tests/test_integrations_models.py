"""Whole tokenizers of diffusers, small: encode and decode accelerated against the original, with gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from walt_kernels.integrations import accelerate, restore
from walt_kernels.testing import K_BACKWARD, K_FORWARD, compare, random

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

WAN: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}
TERMS = 8 * 27  # of one output of a convolution here
# Class, configuration, and a clip [B, C, T, H, W].
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "wan": ("AutoencoderKLWan", WAN, (1, 3, 5, 8, 16)),
    "qwen-image": ("AutoencoderKLQwenImage", WAN, (1, 3, 1, 8, 16)),
    "cogvideox": (
        "AutoencoderKLCogVideoX",
        {
            "block_out_channels": (8, 8),
            "down_block_types": ("CogVideoXDownBlock3D",) * 2,
            "up_block_types": ("CogVideoXUpBlock3D",) * 2,
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
        (1, 3, 9, 8, 16),
    ),
    "hunyuan": (
        "AutoencoderKLHunyuanVideo",
        {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2},
        (1, 3, 5, 16, 32),
    ),
    "cosmos": (
        "AutoencoderKLCosmos",
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (8, 8, 8, 8),
            "decode_block_out_channels": (8, 8, 8, 8),
            "num_layers": 1,
            "attention_resolutions": (),
            "resolution": 32,
        },
        (1, 3, 9, 32, 32),
    ),
    "ltx": (
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 8,
            "block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8, 8),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
            "decoder_causal": True,
        },
        (1, 3, 9, 32, 32),
    ),
}


def results(model: Any, clip: Tensor) -> list[Tensor]:
    """Latents, frames, and the gradients of the clip and of all parameters."""
    clip = clip.detach().requires_grad_()
    latents = model.encode(clip).latent_dist.mode()
    frames = model.decode(latents).sample
    loss = (frames * random(*frames.shape, grad=False).to(frames.dtype)).mean()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(loss, [clip, *parameters], materialize_grads=True)
    return [latents.detach(), frames.detach(), grads[0], torch.cat([grad.flatten() for grad in grads[1:]])]


@pytest.mark.parametrize("name", MODELS)
def test_encode_and_decode(name: str) -> None:
    cls, config, shape = MODELS[name]
    torch.manual_seed(0)
    original = getattr(diffusers, cls)(**config)
    clip = random(*shape, grad=False)
    truth = results(copy.deepcopy(original).double(), clip.double())
    before = results(original, clip)
    report = accelerate(original)
    assert len(report.replaced) >= 20
    assert not [row for row in report.left if "CausalConv3d" in row.kind]
    for i, (ours, exact, theirs) in enumerate(zip(results(original, clip), truth, before, strict=True)):
        compare(f"result {i}", ours, exact, theirs, k=K_FORWARD if i < 2 else K_BACKWARD, rows=TERMS)
    restore(original)
    assert all(torch.equal(a, b) for a, b in zip(results(original, clip), before, strict=True))
