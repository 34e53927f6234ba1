"""A network's call as a CUDA graph: a sampling step of many small launches then costs the host one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class _Recorded:
    """A call in memory of its own: what it reads, what it writes, and the launches in between."""

    arguments: dict[str, Tensor]
    graph: torch.cuda.CUDAGraph
    output: Tensor


class Replayed(nn.Module):
    """`module` without gradients, its calls recorded and replayed on a GPU; anywhere else `module` itself.

    The first call with arguments of some shapes and dtypes runs as it is (kernels are compiled and chosen then), the
    second is recorded, later ones are replays. Only for a module that looks at no values on the host, and for tensors.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._recorded: dict[Any, _Recorded | None] = {}

    def forward(self, x: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
        if not x.is_cuda or torch.is_grad_enabled():
            return self.module(x, time, **conditions)
        arguments = {"z_t": x, "time": time, **conditions}
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in arguments.items())
        if key not in self._recorded:
            self._recorded[key] = None
            return self.module(**arguments)
        recorded = self._recorded[key]
        if recorded is None:
            recorded = self._recorded[key] = self._record(arguments)
        for name, tensor in arguments.items():
            recorded.arguments[name].copy_(tensor)
        recorded.graph.replay()
        return recorded.output.clone()  # which the next replay overwrites

    def _record(self, arguments: dict[str, Tensor]) -> _Recorded:
        arguments = {name: tensor.clone() for name, tensor in arguments.items()}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.module(**arguments)
        return _Recorded(arguments, graph, output)
