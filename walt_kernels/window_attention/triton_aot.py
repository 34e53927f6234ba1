"""Calls that reach every Triton kernel of window attention and every entry of the tile table, for ``_aot``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .._aot import Call

# Rows of 16 bits hold a tile of queries, keys, values and gradients at once. Float32 rows of 256 have no tensor cores.
# Programs of whole windows have 4 warps: they spill, where 8 have to share every tile of 64 rows.
SPILLS = {
    "norm_kernel": 8,
    "forward_kernel": 16,
    "forward_kernel, N 320, dim 72, bf16, image": 48,
    "query_backward_kernel": 32,
    "key_backward_kernel": 128,
    "bias_backward_kernel": 24,
    "bias_backward_kernel, N 448, dim 64, bf16": 48,
    "bias_backward_kernel, N 560, dim 64, bf16": 48,
    "window_backward_kernel": 512,
    "window_backward_kernel, N 320, dim 128, fp32": 0,
    "forward_kernel, N 320, dim 256, fp32": 232,
    "query_backward_kernel, N 320, dim 256, fp32": 328,
    "key_backward_kernel, N 320, dim 256, fp32": 512,
    "bias_backward_kernel, N 320, dim 256, fp32": 264,
}

# Window and frames by the tokens of a window.
_WINDOWS = {
    320: ((5, 8, 8), (5, 32, 32)),
    256: ((1, 16, 16), (17, 32, 32)),
    560: ((5, 8, 14), (5, 32, 56)),
    80: ((5, 4, 4), (5, 8, 8)),
    448: ((1, 16, 28), (5, 16, 28)),
}


def _inputs(
    N: int, dim: int, dtype: torch.dtype, plain: bool = False, image: bool = False, context: int = 0
) -> dict[str, Any]:
    """From one packed projection."""
    window, frames = _WINDOWS[N]
    B, heads = 2, 16

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = empty(B, *frames, 3, heads, dim, dtype=dtype).unbind(4)
    inputs: dict[str, Any] = {"q": q, "k": k, "v": v, "window": window}
    if not plain:
        inputs["bias_table"] = empty(heads, *(2 * s - 1 for s in window))
        inputs["q_norm"], inputs["k_norm"] = empty(dim), empty(dim)
    if image:
        inputs["image"] = empty(B, dtype=torch.bool)
    if context:
        inputs["context_k"], inputs["context_v"] = empty(B, context, 2, heads, dim, dtype=dtype).unbind(2)
        inputs["context_mask"] = empty(B, context, dtype=torch.bool)
    return inputs


def aot_calls() -> Iterator[Call]:
    def call(name: str, *sizes: Any, **options: Any) -> Call:
        return Call(name, "window_attention", _inputs(*sizes, **options))

    half, wide = torch.bfloat16, torch.float32
    for N, dim in ((256, 64), (320, 64), (256, 88), (256, 128), (320, 128), (256, 256), (448, 64)):
        yield call(f"N {N}, dim {dim}, bf16", N, dim, half)
    # The last tiles of 80 and 560 are not full. Float16 has the code and the tiles of bfloat16: one call is enough.
    yield call("N 560, dim 64, bf16", 560, 64, half)
    yield call("N 80, dim 64, fp16", 80, 64, torch.float16)
    yield call("N 256, dim 64, bf16, plain", 256, 64, half, plain=True)
    yield call("N 320, dim 72, bf16, image", 320, 72, half, image=True)
    for dim in (64, 128):
        yield call(f"N 320, dim {dim}, bf16, masked context", 320, dim, half, context=77)
    for dim in (64, 128, 256):
        yield call(f"N 320, dim {dim}, fp32", 320, dim, wide)
