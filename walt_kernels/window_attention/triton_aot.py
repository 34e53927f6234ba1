"""Calls that reach every Triton kernel of window attention and every entry of the tile table, for ``_aot``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from . import triton_kernels as kernels
from .op import DIFFERENTIABLE

SPILLS: dict[str, int] = {}

# Window and frames: 320 tokens in space and time, 256 in space, 80, 448, 560 and 1280.
_WINDOWS = {
    320: ((5, 8, 8), (5, 16, 16)),
    256: ((1, 16, 16), (17, 32, 32)),
    80: ((5, 4, 4), (5, 16, 16)),
    448: ((7, 8, 8), (7, 16, 16)),
    560: ((5, 8, 14), (5, 16, 28)),
    1280: ((5, 16, 16), (5, 32, 32)),
}


def _call(N: int, dim: int, dtype: torch.dtype, plain: bool = False, context: int = 0, **more: Any) -> None:
    """Forward and backward from one packed projection."""
    window, frames = _WINDOWS[N]
    B, heads = 2, 16
    q, k, v = torch.empty(B, *frames, 3, heads, dim, dtype=dtype).unbind(4)
    inputs: dict[str, Any] = dict.fromkeys(("bias_table", "image", "q_norm", "k_norm"))
    inputs |= dict.fromkeys(("context_k", "context_v", "context_mask")) | {"q": q, "k": k, "v": v, "window": window}
    if not plain:
        inputs["bias_table"] = torch.empty(heads, *(2 * s - 1 for s in window))
        inputs["q_norm"], inputs["k_norm"] = torch.empty(dim), torch.empty(dim)
    if context:
        inputs["context_k"], inputs["context_v"] = torch.empty(B, context, 2, heads, dim, dtype=dtype).unbind(2)
    if "image" in more:
        inputs["image"] = torch.empty(B, 1, dtype=torch.bool).expand(B, frames[0])
    if "context_mask" in more:
        inputs["context_mask"] = torch.empty(B, context, dtype=torch.bool)
    inputs |= {"norm_eps": 1e-6, "scale": dim**-0.5}
    out, lse = kernels.window_attention(**inputs)
    wanted = [inputs[name] is not None for name in DIFFERENTIABLE]
    kernels.window_attention_backward(out, out, lse, inputs, DIFFERENTIABLE, wanted)


def aot_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    half, wide = torch.bfloat16, torch.float32
    for N in _WINDOWS:
        yield f"N {N}, dim 64, bf16", partial(_call, N, 64, half)
    for N in (256, 320):
        for dim in (72, 88, 128, 256):
            yield f"N {N}, dim {dim}, bf16", partial(_call, N, dim, half)
    yield "N 256, dim 64, bf16, plain", partial(_call, 256, 64, half, plain=True)
    yield "N 320, dim 72, bf16, plain", partial(_call, 320, 72, half, plain=True)
    yield "N 320, dim 64, bf16, image", partial(_call, 320, 64, half, image=True)
    yield "N 256, dim 64, bf16, image", partial(_call, 256, 64, half, image=True)
    yield "N 320, dim 64, bf16, context", partial(_call, 320, 64, half, context=64)
    yield (
        "N 256, dim 72, bf16, masked context",
        partial(_call, 256, 72, half, plain=True, context=77, context_mask=True),
    )
    yield "N 320, dim 64, fp16", partial(_call, 320, 64, torch.float16)
    for N in (256, 320):
        for dim in (64, 128, 256):
            yield f"N {N}, dim {dim}, fp32", partial(_call, N, dim, wide)
