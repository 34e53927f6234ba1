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


def backward(grad_out: Tensor, out: Tensor, lse: Tensor, **arguments: Any) -> None:
    grads = {name.removeprefix("grad_"): value for name, value in arguments.items() if name.startswith("grad_")}
    if grad_out.numel() == 0:
        for gradient in grads.values():
            if gradient is not None and gradient.numel() > 0:  # of what is not by sample: a sum of nothing
                sum_rows(_triton.empty((0, gradient.numel()), torch.float32, gradient.device), (0, gradient))
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
        _tiles(geometry, rows, grads)
    if grads["bias_table"] is not None:
        table_gradient(geometry, rows, grads["bias_table"])


class _Scales:
    """Gradients of the norms' scales: one row for each program's part, of the queries' and behind them of the keys'."""

    def __init__(self, geometry: Geometry, grads: dict[str, Tensor | None], q_programs: int, k_programs: int) -> None:
        wanted = ((q_programs, grads["q_norm"]), (k_programs, grads["k_norm"]))
        self.sums = [(count, grad) for count, grad in wanted if grad is not None]
        rows = sum(count for count, _ in self.sums)
        self.partial = _triton.empty((rows, geometry.dim), torch.float32, geometry.device) if self.sums else None
        self.q = None if self.partial is None or grads["q_norm"] is None else self.partial[:q_programs]
        self.k = None if self.partial is None or grads["k_norm"] is None else self.partial[rows - k_programs :]

    def add(self) -> None:
        if self.partial is not None:
            sum_rows(self.partial, *self.sums)


def _windows(geometry: Geometry, rows: dict[str, Any], grads: dict[str, Tensor | None]) -> None:
    tile = geometry.tile("window_backward")
    programs = geometry.windows * geometry.heads
    scales = _Scales(geometry, grads, programs, programs)
    block = tile.blocks["BLOCK_M"]
    sums = _triton.empty((programs, -(-geometry.N // block) * block, geometry.width), torch.float32, geometry.device)
    more = {f"grad_{name}": grads[name] for name in "qkv"} | geometry.bias(tile)
    more |= {"q_partial": scales.q, "k_partial": scales.k, "sums": sums}
    more["MASKED"] = any(geometry.masked(block) for block in tile.blocks.values())
    geometry.launch(window_backward_kernel, programs, tile, **rows, **more)
    scales.add()


def _tiles(geometry: Geometry, rows: dict[str, Any], grads: dict[str, Tensor | None]) -> None:
    """Tiles of queries, then of the windows' own keys and values, then of the context's."""
    own = [grads[name] for name in ("k", "v", "k_norm")]
    context = [grads[name] for name in ("context_k", "context_v", "k_norm")]
    device, heads, B, L = geometry.device, geometry.heads, geometry.B, geometry.L
    tile = geometry.tile("query_backward")
    q_programs = geometry.windows * heads * -(-geometry.N // tile.blocks["BLOCK_M"])
    key_tile = geometry.tile("key_backward")
    block = key_tile.blocks["BLOCK_N"]
    programs = geometry.windows * heads * -(-geometry.N // block)
    finish = _triton.pick(SUMS, ("context_finish",), device)
    finish_programs = B * heads * -(-L // finish.blocks["BLOCK"])
    scales = _Scales(geometry, grads, q_programs, programs + finish_programs)

    more: dict[str, Any] = {
        "grad_q": grads["q"],
        "partial": scales.q,
        "MASKED": geometry.masked(tile.blocks["BLOCK_N"]),
    }
    geometry.launch(query_backward_kernel, q_programs, tile, **rows, **geometry.bias(tile), **more)
    more = {**rows, "B": B, "MASKED": geometry.masked(key_tile.blocks["BLOCK_M"])}
    if any(g is not None for g in own):
        more |= geometry.bias(key_tile, by_keys=True)
        more |= {"grad_k": grads["k"], "grad_v": grads["v"], "partial": scales.k, "sums": None, "parts": 1}
        geometry.launch(key_backward_kernel, programs, key_tile, **more, CONTEXT=False)
    if L > 0 and any(g is not None for g in context):
        # Parts of a sample's windows, as many as fill the machine; not by B, so that no sample depends on its batch.
        blocks = heads * -(-L // block)
        parts = max(1, min(geometry.per_sample, _triton.target(device).processors // blocks))
        sums = _triton.empty((parts, 2, B, heads, L, geometry.dim), torch.float32, device)
        more |= {"grad_k": None, "grad_v": None, "partial": None, "sums": sums, "parts": parts}
        more |= {"bias": None, "PADDED": 0}
        geometry.launch(key_backward_kernel, B * parts * blocks, key_tile, **more, CONTEXT=True)
        more |= {"grad_k": grads["context_k"], "grad_v": grads["context_v"]}
        more["partial"] = None if scales.k is None else scales.k[programs:]
        geometry.launch(context_finish_kernel, finish_programs, finish, **more)
    scales.add()
