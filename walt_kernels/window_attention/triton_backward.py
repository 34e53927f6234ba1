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
    tiles = [geometry.tile(name) for name in ("query_backward", "bias_backward", "key_backward")]
    delta = _triton.empty(lse.shape[1:], torch.float32, geometry.device)
    rows = {"out": out, "best_of": lse[0], "log_of": lse[1], "delta": delta, **geometry.bias(*tiles)}
    _queries(geometry, tiles[0], rows, grads["q"], grads["q_norm"])
    if grads["bias_table"] is not None:
        table_gradient(geometry, tiles[1], rows, grads["bias_table"])
    _keys(geometry, tiles[2], rows, grads)


def _partial(geometry: Geometry, programs: int) -> Tensor:
    """One row for each program's part of the gradient of a norm's scale."""
    return _triton.empty((programs, geometry.dim), torch.float32, geometry.device)


def _queries(
    geometry: Geometry, tile: _triton.Tile, rows: dict[str, Any], grad_q: Tensor | None, grad_norm: Tensor | None
) -> None:
    programs = geometry.windows * geometry.heads * -(-geometry.N // tile.blocks["BLOCK_M"])
    partial = None if grad_norm is None else _partial(geometry, programs)
    more = {"grad_q": grad_q, "partial": partial, "MASKED": geometry.masked(tile.blocks["BLOCK_N"])}
    geometry.launch(query_backward_kernel, programs, tile, **rows, **more)
    if grad_norm is not None and partial is not None:
        sum_rows(partial, grad_norm)


def _keys(geometry: Geometry, tile: _triton.Tile, rows: dict[str, Any], grads: dict[str, Tensor | None]) -> None:
    """Gradients of the windows' own keys and values and of the context's, then of the scale of their norm."""
    own = [grads[name] for name in ("k", "v", "k_norm")]
    context = [grads[name] for name in ("context_k", "context_v", "k_norm")]
    device, heads, B, L = geometry.device, geometry.heads, geometry.B, geometry.L
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
        more |= {"grad_k": None, "grad_v": None, "partial": None, "sums": sums, "parts": parts, "bias": None}
        geometry.launch(key_backward_kernel, B * parts * blocks, tile, **more, CONTEXT=True)
        more |= {"grad_k": grads["context_k"], "grad_v": grads["context_v"], "partial": context_partial}
        geometry.launch(context_finish_kernel, finish_programs, finish, **more)
    if grad_norm is not None and partial is not None:
        sum_rows(partial, grad_norm)
