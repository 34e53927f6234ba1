"""What users run today for biased window attention: partition copies around SDPA with a materialised bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from walt_kernels.window_attention.reference import bias_of


def _partition(x: Tensor, window: tuple[int, int, int]) -> Tensor:
    """[B, T, H, W, heads, dim] -> [B * windows, heads, tokens, dim]"""
    B, T, H, W, heads, dim = x.shape
    t, h, w = window
    x = x.reshape(B, T // t, t, H // h, h, W // w, w, heads, dim)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6, 8).reshape(-1, heads, t * h * w, dim)


def _merge(x: Tensor, shape: tuple[int, ...], window: tuple[int, int, int]) -> Tensor:
    B, T, H, W, heads, dim = shape
    t, h, w = window
    x = x.reshape(B, T // t, H // h, W // w, heads, t, h, w, dim)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4, 8).reshape(shape)


def baselines(inputs: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """Functions of the same keyword arguments as the op."""

    def sdpa(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: tuple[int, int, int],
        bias_table: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
    ) -> Tensor:
        q, k = (F.layer_norm(x, x.shape[-1:], eps=1e-6) * norm.to(x.dtype) for x, norm in ((q, q_norm), (k, k_norm)))
        bias = bias_of(bias_table, window, window).to(q.dtype)
        parts = (_partition(x, window) for x in (q, k, v))
        return _merge(F.scaled_dot_product_attention(*parts, attn_mask=bias), tuple(v.shape), window)

    return {"partition + SDPA": sdpa}
