"""The exponential moving average of the weights (EMA), with which a trained model is used."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from walt.distributed import full, local
from walt.train.precision import wide


class WeightAverage:
    """ema += (1 - d)(weights - ema) with d = min(decay, (1 + n) / (10 + n)) after n updates, so that the random start
    is forgotten early; in float32, or the parameters' dtype if that is wider. Buffers are copied.

    Made before the module is sharded or compiled; afterwards, `shard` makes each rank keep its shard only. With
    decay = 0 nothing is averaged: this then only gathers the full weights of a sharded module.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.live, self.decay, self.updates = module, decay, 0
        self._copy = copy.deepcopy(module).eval().requires_grad_(False)
        for parameter in self._copy.parameters():
            parameter.data = wide(parameter.data)
        self._weights: dict[str, Tensor] = dict(self._copy.named_parameters())
        self._sharded = False

    def shard(self) -> None:
        """Follow the shards of the module from now on, and free the full copy."""
        self._sharded = True
        self._weights = dict(self.live.named_parameters())
        if self.decay:
            self._weights = {name: wide(tensor.detach()).clone() for name, tensor in self._weights.items()}
        for module in self._copy.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the module's weights after a step."""
        if self.decay:
            averages = [local(tensor) for tensor in self._weights.values()]
            current = [local(tensor).to(a.dtype) for tensor, a in zip(self.live.parameters(), averages, strict=True)]
            share = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 1.0
            torch._foreach_lerp_(averages, current, share)
        for buffer, value in zip(self._copy.buffers(), self.live.buffers(), strict=True):
            buffer.copy_(value)
        self.updates += 1

    def tensors(self) -> dict[str, Tensor]:
        """What to save and to load in place, by the names of the module's state dict; sharded if the module is."""
        return {name: self._weights.get(name, tensor) for name, tensor in self._copy.state_dict().items()}

    def module(self) -> nn.Module:
        """The module with the averaged weights, in evaluation mode. Of a sharded one, a new full copy (a collective:
        all ranks call this) that shares the buffers that are saved.
        """
        if not self._sharded:
            return self._copy
        kept: dict[int, object] = {id(buffer): buffer for buffer in self._copy.buffers()}
        for name, parameter in self._copy.named_parameters():
            kept[id(parameter)] = nn.Parameter(full(self._weights[name]).detach(), requires_grad=False)
        return copy.deepcopy(self._copy, kept)
