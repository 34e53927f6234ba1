"""Half precision: what must not be computed or kept in it, and whether it is faster here."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from walt_kernels.nn import CausalConv3d


def wide(tensor: Tensor) -> Tensor:
    """In float32 if it is of a narrower floating-point dtype, else as it is."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# What most of the time goes to: of a transformer, and of a tokenizer. A layer and the shape of its input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "products": (lambda: nn.Linear(512, 512), (1024, 512)),
    "convolutions": (lambda: CausalConv3d(64, 64, 3), (1, 64, 5, 32, 32)),
}


def bfloat16_speedup(kind: str) -> tuple[float, float]:
    """How many times as fast as in float32 this CPU trains one of LAYERS in bfloat16; takes a fraction of a second.

    Forward and backward under autocast, in turn with float32; the lowest and the highest of the tries, which are far
    apart where other work disturbs them.
    """
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape, requires_grad=True)
    ratios = []
    for _ in range(6):  # the first one warms up
        seconds = []
        for narrow in (False, True):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                layer(x).sum().backward()
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return min(ratios[1:]), max(ratios[1:])
