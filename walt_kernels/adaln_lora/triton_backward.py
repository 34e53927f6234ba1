"""Triton kernels of the gradients of the gated residual and the modulated norm.

The gradients of modulation rows are sums over tokens in two stages of fixed order: programs sum runs of tokens that
share their rows, as many programs as keep the processor busy; then their partial rows are added up.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _triton
from .triton_rows import arguments_of, arguments_of_rows, load_rows, row_offset, unrounded
from .triton_tiles import MODULATION, PROGRAMS_PER_PROCESSOR, block_of


@triton.jit
def _norm_terms(
    x, branch, gate, scale, grad_h, x_rows, branch_rows, gate_rows, scale_rows, grad_rows, columns, inside,
    row_mean, row_rstd, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """xhat, the gradient of h, and g = grad_h * (1 + scale); zeros outside."""
    value = unrounded(x, branch, gate, x_rows, branch_rows, gate_rows, columns, inside, RESIDUAL)
    xhat = tl.where(inside, (value - row_mean[:, None]) * row_rstd[:, None], 0.0)
    grad = load_rows(grad_h, grad_rows, columns, inside)
    return xhat, grad, grad * (1.0 + load_rows(scale, scale_rows, columns, inside))


@triton.jit
def adaln_row_means_kernel(
    x, branch, gate, scale, grad_h, mean, rstd, g_mean, gx_mean,
    x_b, x_n, branch_b, branch_n, gate_b, gate_f, gate_tokens, scale_b, scale_f, scale_tokens, grad_h_b, grad_h_n,
    count, tokens, D,
    RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """mean(g) and mean(g * xhat) of rows wider than a block."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = token < count
    x_rows = row_offset(token, tokens, x_b, x_n, False, 1)
    branch_rows = x_rows
    gate_rows = x_rows
    if RESIDUAL:
        branch_rows = row_offset(token, tokens, branch_b, branch_n, False, 1)
        gate_rows = row_offset(token, tokens, gate_b, gate_f, True, gate_tokens)
    scale_rows = row_offset(token, tokens, scale_b, scale_f, True, scale_tokens)
    grad_rows = row_offset(token, tokens, grad_h_b, grad_h_n, False, 1)
    row_mean = tl.load(mean + token, mask=valid, other=0.0)
    row_rstd = tl.load(rstd + token, mask=valid, other=0.0)
    g_sum = tl.zeros((ROWS, BLOCK_D), tl.float32)
    gx_sum = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for begin in range(0, D, BLOCK_D):
        at = begin + tl.arange(0, BLOCK_D)
        inside = valid[:, None] & (at < D)[None, :]
        xhat, _, g = _norm_terms(
            x, branch, gate, scale, grad_h, x_rows, branch_rows, gate_rows, scale_rows, grad_rows, at, inside,
            row_mean, row_rstd, RESIDUAL,
        )  # fmt: skip
        g_sum += g
        gx_sum += g * xhat
    tl.store(g_mean + token, tl.sum(g_sum, 1) / D, mask=valid)
    tl.store(gx_mean + token, tl.sum(gx_sum, 1) / D, mask=valid)


@triton.jit
def adaln_backward_kernel(
    x, branch, gate, scale, grad_h, grad_x_new, mean, rstd, g_mean, gx_mean, grad_x, grad_branch, partial,
    x_b, x_n, branch_b, branch_n, gate_b, gate_f, gate_tokens, scale_b, scale_f, scale_tokens, grad_h_b, grad_h_n,
    grad_x_new_b, grad_x_new_n,
    tokens, segments, parts, D,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, SINGLE: tl.constexpr, GRAD_X_NEW: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: one part of the tokens of a segment, a run of tokens that share every modulation row.

    grad_x = grad_x_new + rstd * (g - mean(g) - xhat * mean(g * xhat));  grad_branch = grad_x * gate
    """
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b = program // (segments * parts)
    part = program % parts
    per_segment = tokens // segments
    first_token = program // parts % segments * per_segment
    begin = first_token + (per_segment * part.to(tl.int64) // parts).to(tl.int32)
    end = first_token + (per_segment * (part + 1).to(tl.int64) // parts).to(tl.int32)
    sum_gate = tl.zeros((ROWS, BLOCK_D), tl.float32)
    sum_shift = tl.zeros((ROWS, BLOCK_D), tl.float32)
    sum_scale = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in range(begin, end, ROWS):
        n = first + tl.arange(0, ROWS)
        valid = n < end
        token = b * tokens + n
        inside = valid[:, None] & (columns < D)[None, :]
        branch_rows = token
        gate_rows = token
        if RESIDUAL:
            branch_rows = row_offset(token, tokens, branch_b, branch_n, False, 1)
            gate_rows = row_offset(token, tokens, gate_b, gate_f, True, gate_tokens)
        grad = tl.zeros((ROWS, BLOCK_D), tl.float32)
        if NORM:
            x_rows = row_offset(token, tokens, x_b, x_n, False, 1)
            scale_rows = row_offset(token, tokens, scale_b, scale_f, True, scale_tokens)
            grad_rows = row_offset(token, tokens, grad_h_b, grad_h_n, False, 1)
            row_mean = tl.load(mean + token, mask=valid, other=0.0)
            row_rstd = tl.load(rstd + token, mask=valid, other=0.0)
            xhat, dh, g = _norm_terms(
                x, branch, gate, scale, grad_h, x_rows, branch_rows, gate_rows, scale_rows, grad_rows, columns, inside,
                row_mean, row_rstd, RESIDUAL,
            )  # fmt: skip
            sum_shift += dh
            sum_scale += dh * xhat
            if SINGLE:
                row_g = tl.sum(g, 1) / D
                row_gx = tl.sum(g * xhat, 1) / D
            else:
                row_g = tl.load(g_mean + token, mask=valid, other=0.0)
                row_gx = tl.load(gx_mean + token, mask=valid, other=0.0)
            grad = (g - row_g[:, None] - xhat * row_gx[:, None]) * row_rstd[:, None]
        if GRAD_X_NEW:
            grad += load_rows(
                grad_x_new, row_offset(token, tokens, grad_x_new_b, grad_x_new_n, False, 1), columns, inside
            )
        out = token.to(tl.int64)[:, None] * D + columns[None, :]
        if NORM:
            tl.store(grad_x + out, grad.to(grad_x.dtype.element_ty), mask=inside)
        if RESIDUAL:
            dbranch = grad * load_rows(gate, gate_rows, columns, inside)
            tl.store(grad_branch + out, dbranch.to(grad_branch.dtype.element_ty), mask=inside)
            sum_gate += tl.where(inside, grad, 0.0) * load_rows(branch, branch_rows, columns, inside)
    to = partial + program.to(tl.int64) * 3 * D + columns
    if RESIDUAL:
        tl.store(to, tl.sum(sum_gate, 0), mask=columns < D)
    if NORM:
        tl.store(to + D, tl.sum(sum_shift, 0), mask=columns < D)
        tl.store(to + 2 * D, tl.sum(sum_scale, 0), mask=columns < D)


@triton.jit
def adaln_finish_kernel(partial, grad, run, D, BLOCK_D: tl.constexpr):
    """grad[row] = the sum of its run of partial rows, in order."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(run):
        total += tl.load(partial + (row * run + i) * 3 * D + columns, mask=columns < D, other=0.0)
    tl.store(grad + row * D + columns, total.to(grad.dtype.element_ty), mask=columns < D)


def backward(
    *,
    grad_x_new: Tensor | None = None,
    grad_h: Tensor | None = None,
    x: Tensor | None = None,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    grad_x: Tensor | None = None,
    grad_branch: Tensor | None = None,
    grad_gate: Tensor | None = None,
    grad_shift: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    sums = {i: grad for i, grad in enumerate((grad_gate, grad_shift, grad_scale)) if grad is not None}
    given = grad_h if grad_h is not None else grad_x_new
    assert given is not None
    B, N, D = given.shape
    if B * N == 0:
        for grad in sums.values():
            grad.zero_()
        return
    block, single = block_of(D)
    frames = {i: grad.shape[1] if grad.dim() == 3 else 1 for i, grad in sums.items()}
    segments = math.lcm(*frames.values())
    programs = PROGRAMS_PER_PROCESSOR * _triton.target(given.device).processors
    parts = max(1, min(N // segments, programs // (B * segments)))
    partial = torch.empty((B * segments * parts, 3, D), dtype=torch.float32, device=given.device)
    inputs = {
        **(arguments_of("x", x) | arguments_of("branch", branch) | arguments_of("grad_h", grad_h)),
        **(arguments_of_rows("gate", gate, N) | arguments_of_rows("scale", scale, N)),
        **{"mean": mean, "rstd": rstd, "tokens": N, "D": D, "BLOCK_D": block, "RESIDUAL": branch is not None},
    }
    row_means: dict[str, Tensor | None] = {"g_mean": None, "gx_mean": None}
    if not single and grad_h is not None:
        row_means = {name: torch.empty((B, N), dtype=torch.float32, device=given.device) for name in row_means}
        tile = _triton.pick(MODULATION, ("row_means", block), given.device)
        programs = triton.cdiv(B * N, tile.blocks["ROWS"])
        _triton.launch(adaln_row_means_kernel, (programs,), tile, **inputs, **row_means, count=B * N)

    def run(tile: _triton.Tile) -> None:
        _triton.launch(
            adaln_backward_kernel,
            (B * segments * parts, triton.cdiv(D, block)),
            tile,
            **(inputs | row_means | arguments_of("grad_x_new", grad_x_new)),
            **{"grad_x": grad_x, "grad_branch": grad_branch, "partial": partial, "segments": segments, "parts": parts},
            **{"NORM": grad_h is not None, "SINGLE": single, "GRAD_X_NEW": grad_x_new is not None},
        )

    run(_triton.pick(MODULATION, ("backward", block), given.device, run))
    tile = _triton.pick(MODULATION, ("finish",), given.device)
    for i, grad in sums.items():
        run_length = segments * parts // frames[i]
        grid = (B * frames[i], triton.cdiv(D, tile.blocks["BLOCK_D"]))
        _triton.launch(adaln_finish_kernel, grid, tile, partial=partial[:, i], grad=grad, run=run_length, D=D)
