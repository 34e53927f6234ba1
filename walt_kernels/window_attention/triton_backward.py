"""Backward of window attention: gradients of queries, of keys and values, and of the norms' scales.

With P the probabilities and delta = rowsum(grad * out)::

    grad_v = P^T grad        dS = P * (grad v^T - delta)        grad_q = scale dS k        grad_k = scale dS^T q

Every program sums in a fixed order and writes its own rows. Sums over programs are rows of partial sums (of the norms'
scales) or whole blocks (of the table and the context), which later launches add in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _triton
from .triton_bias import table_gradient
from .triton_geometry import Geometry
from .triton_keys import context_finish_kernel, key_backward_kernel
from .triton_queries import query_backward_kernel
from .triton_sums import sum_rows
from .triton_tiles import SUMS
from .triton_window import window_backward_kernel

BY_KEYS = False


def backward(grad_out: Tensor, out: Tensor, lse: Tensor, **arguments: Any) -> None:
    grads = {name.removeprefix("grad_"): value for name, value in arguments.items() if name.startswith("grad_")}
    if grad_out.numel() == 0:
        for gradient in grads.values():
            if gradient is not None and gradient.numel() > 0:  # of what is not by sample: a sum of nothing
                sum_rows(_triton.empty((0, gradient.numel()), torch.float32, gradient.device), gradient)
        return
    geometry = Geometry(arguments, grad_out)
    geometry.norm("q", "q_norm", "queries")
    geometry.norm("k", "k_norm", "keys")
    geometry.norm("context_k", "k_norm", "context_keys")
    delta = _triton.empty(lse.shape[1:], torch.float32, geometry.device)
    rows = {"out": out, "best_of": lse[0], "log_of": lse[1], "delta": delta}
    if geometry.by_window():
        _windows(geometry, rows, grads)
    else:
        _queries(geometry, rows, grads["q"], grads["q_norm"])
        _keys(geometry, rows, grads)
    if grads["bias_table"] is not None:
        table_gradient(geometry, rows, grads["bias_table"])


def _partial(geometry: Geometry, programs: int) -> Tensor:
    """One row for each program's part of the gradient of a norm's scale."""
    return _triton.empty((programs, geometry.dim), torch.float32, geometry.device)


def _windows(geometry: Geometry, rows: dict[str, Any], grads: dict[str, Tensor | None]) -> None:
    tile = geometry.tile("window_backward")
    programs = geometry.windows * geometry.heads
    partial = {name: None if grads[name] is None else _partial(geometry, programs) for name in ("q_norm", "k_norm")}
    block = tile.blocks["BLOCK_M"]
    sums = _triton.empty((programs, -(-geometry.N // block) * block, geometry.width), torch.float32, geometry.device)
    more = {f"grad_{name}": grads[name] for name in "qkv"} | geometry.bias(tile, by_keys=BY_KEYS)
    more |= {"q_partial": partial["q_norm"], "k_partial": partial["k_norm"], "sums": sums, "BY_KEYS": BY_KEYS}
    more["MASKED"] = any(geometry.masked(block) for block in tile.blocks.values())
    geometry.launch(window_backward_kernel, programs, tile, **rows, **more)
    for name, part in partial.items():
        if part is not None:
            sum_rows(part, grads[name])


def _queries(geometry: Geometry, rows: dict[str, Any], grad_q: Tensor | None, grad_norm: Tensor | None) -> None:
    tile = geometry.tile("query_backward")
    programs = geometry.windows * geometry.heads * -(-geometry.N // tile.blocks["BLOCK_M"])
    partial = None if grad_norm is None else _partial(geometry, programs)
    more = {"grad_q": grad_q, "partial": partial, "MASKED": geometry.masked(tile.blocks["BLOCK_N"])}
    geometry.launch(query_backward_kernel, programs, tile, **rows, **geometry.bias(tile), **more)
    if partial is not None:
        sum_rows(partial, grad_norm)


def _keys(geometry: Geometry, rows: dict[str, Any], grads: dict[str, Tensor | None]) -> None:
    """Gradients of the windows' own keys and values and of the context's, then of the scale of their norm."""
    own = [grads[name] for name in ("k", "v", "k_norm")]
    context = [grads[name] for name in ("context_k", "context_v", "k_norm")]
    device, heads, B, L = geometry.device, geometry.heads, geometry.B, geometry.L
    tile = geometry.tile("key_backward")
    block = tile.blocks["BLOCK_N"]
    programs = geometry.windows * heads * -(-geometry.N // block)
    finish = _triton.pick(SUMS, ("context_finish",), device)
    finish_programs = B * heads * -(-L // finish.blocks["BLOCK"])
    grad_norm = grads["k_norm"]
    partial = own_partial = context_partial = None
    if grad_norm is not None:
        partial = _partial(geometry, programs + finish_programs)
        own_partial, context_partial = partial[:programs], partial[programs:]
    more: dict[str, Any] = {**rows, "B": B, "MASKED": geometry.masked(tile.blocks["BLOCK_M"])}
    if any(g is not None for g in own):
        more |= geometry.bias(tile, by_keys=True)
        more |= {"grad_k": grads["k"], "grad_v": grads["v"], "partial": own_partial, "sums": None, "parts": 1}
        geometry.launch(key_backward_kernel, programs, tile, **more, CONTEXT=False)
    if L > 0 and any(g is not None for g in context):
        # Parts of a sample's windows, as many as fill the machine; not by B, so that no sample depends on its batch.
        blocks = heads * -(-L // block)
        parts = max(1, min(geometry.per_sample, _triton.target(device).processors // blocks))
        sums = _triton.empty((parts, 2, B, heads, L, geometry.dim), torch.float32, device)
        more |= {
            "grad_k": None,
            "grad_v": None,
            "partial": None,
            "sums": sums,
            "parts": parts,
            "bias": None,
            "PADDED": 0,
        }
        geometry.launch(key_backward_kernel, B * parts * blocks, tile, **more, CONTEXT=True)
        more |= {"grad_k": grads["context_k"], "grad_v": grads["context_v"], "partial": context_partial}
        geometry.launch(context_finish_kernel, finish_programs, finish, **more)
    if partial is not None:
        sum_rows(partial, grad_norm)
