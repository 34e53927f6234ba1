# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the gradients of the gated residual and the modulated norm.

The gradients of modulation rows are sums over tokens in two stages of fixed order: programs sum runs of tokens that
share their rows, as many programs as keep the processor busy; then their partial rows are added up.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32

from .. import _triton
from .triton_rows import (
    Runs,
    frames_of,
    load_modulation,
    load_residual,
    load_rows,
    matrices,
    matrix_of,
    modulation,
    run_of,
    segments_of,
)
from .triton_tiles import BACKWARD_ELEMENTS, MODULATION, block_of, fitting, parts_of


@triton.jit
def _add_pairs(a, b, other_a, other_b):
    return a + other_a, b + other_b


@triton.jit
def adaln_row_means_kernel(x, branch, gate, scale, grad_h, mean, rstd, g_mean, gx_mean, runs, D, BLOCK_D: tl.constexpr):
    """mean(g) and mean(g * xhat) of rows wider than a block, for g = grad_h * (1 + scale)."""
    b, begin, end = run_of(runs)
    columns = tl.arange(0, BLOCK_D).to(tl.int64)
    x = matrix_of(x, b)
    grad_h = matrix_of(grad_h, b)
    if branch.at is not None:
        branch = matrix_of(branch, b)
    for token in range(begin, end):
        n = token + tl.arange(0, 1)
        at = b * runs.tokens + token
        row_mean = tl.load(mean + at)
        row_rstd = tl.load(rstd + at)
        g_sum = tl.zeros((1, BLOCK_D), tl.float32)
        gx_sum = tl.zeros((1, BLOCK_D), tl.float32)
        for piece in range(0, D, BLOCK_D):
            d = piece + columns
            within = d < D
            inside = within[None, :]
            value = load_residual(x, branch, gate, b, begin, n, d, within, inside)
            gain = load_modulation(scale, b, begin, d, within)
            g = load_rows(grad_h, n, d, inside).to(tl.float32) * (1.0 + gain)
            g_sum += g
            gx_sum += g * (value - row_mean) * row_rstd
        tl.store(g_mean + at, tl.sum(g_sum) / D)
        tl.store(gx_mean + at, tl.sum(gx_sum) / D)


@triton.jit
def adaln_backward_kernel(
    x, branch, gate, scale, grad_h, grad_x_new, mean, rstd, g_mean, gx_mean, grad_x, grad_branch, partial,
    runs, D, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of a run, and its sums in ``partial`` [programs, 3, D], of gate, shift and scale.

    grad_x = grad_x_new + rstd * (g - mean(g) - xhat * mean(g * xhat));  grad_branch = grad_x * gate
    """
    b, begin, end = run_of(runs)
    columns = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    within = columns < D
    if grad_x_new.at is not None:
        grad_x_new = matrix_of(grad_x_new, b)
    if branch.at is not None:
        branch = matrix_of(branch, b)
        factor = load_modulation(gate, b, begin, columns, within)
        sum_gate = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if grad_h.at is not None:
        x = matrix_of(x, b)
        grad_h = matrix_of(grad_h, b)
        gain = 1.0 + load_modulation(scale, b, begin, columns, within)
        sum_shift = tl.zeros((ROWS, BLOCK_D), tl.float32)
        sum_scale = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in tl.range(begin, end, ROWS, num_stages=STAGES):  # said here: there is no product, which tells by itself
        n = first + tl.arange(0, ROWS)
        token = b * runs.tokens + n
        valid = n < end
        inside = valid[:, None] & within[None, :]
        out = token[:, None] * D + columns[None, :]
        if branch.at is not None:
            term = load_rows(branch, n, columns, inside).to(tl.float32)
        if grad_h.at is not None:
            value = load_rows(x, n, columns, inside).to(tl.float32)
            dh = load_rows(grad_h, n, columns, inside).to(tl.float32)
            row_mean = tl.load(mean + token, mask=valid, other=0.0)[:, None]
            row_rstd = tl.load(rstd + token, mask=valid, other=0.0)[:, None]
        if grad_x_new.at is not None:
            grad = load_rows(grad_x_new, n, columns, inside).to(tl.float32)
        else:
            grad = tl.zeros((ROWS, BLOCK_D), tl.float32)
        if grad_h.at is not None:
            if branch.at is not None:
                value += factor * term
            xhat = tl.where(inside, (value - row_mean) * row_rstd, 0.0)
            g = tl.where(inside, dh * gain, 0.0)  # rounded here: where all are the same, less their mean it is 0
            sum_shift += dh
            sum_scale += dh * xhat
            if g_mean is None:
                sum_g, sum_gx = tl.reduce((g, g * xhat), 1, _add_pairs)
                row_g = sum_g / D
                row_gx = sum_gx / D
            else:
                row_g = tl.load(g_mean + token, mask=valid, other=0.0)
                row_gx = tl.load(gx_mean + token, mask=valid, other=0.0)
            grad += (g - row_g[:, None] - xhat * row_gx[:, None]) * row_rstd
            tl.store(grad_x + out, grad.to(grad_x.dtype.element_ty), mask=inside)
        if branch.at is not None:
            tl.store(grad_branch + out, (grad * factor).to(grad_branch.dtype.element_ty), mask=inside)
            sum_gate += grad * term
    to = partial + tl.program_id(0).to(tl.int64) * 3 * D + columns
    if branch.at is not None:
        tl.store(to, tl.sum(sum_gate, 0), mask=within)
    if grad_h.at is not None:
        tl.store(to + D, tl.sum(sum_shift, 0), mask=within)
        tl.store(to + 2 * D, tl.sum(sum_scale, 0), mask=within)


@triton.jit
def _finish(partial, grad, rows, programs, D, TURN: tl.constexpr, BLOCK_D: tl.constexpr):
    if grad is not None:
        row = tl.program_id(0)
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        if (tl.program_id(2) == TURN) & (row < rows):
            number = programs // rows
            at = partial + (row.to(tl.int64) * number * 3 + TURN) * D + columns
            total = tl.zeros((BLOCK_D,), tl.float32)
            for _ in range(number):
                total += tl.load(at, mask=columns < D, other=0.0)
                at += 3 * D
            tl.store(grad + row.to(tl.int64) * D + columns, total.to(grad.dtype.element_ty), mask=columns < D)


@triton.jit
def adaln_finish_kernel(
    partial, grad_gate, grad_shift, grad_scale, gate_rows, shift_rows, scale_rows, programs, D, BLOCK_D: tl.constexpr
):
    """A row of one of the gradients [rows, D] is the sum of its share of the rows of ``partial``, in order."""
    _finish(partial, grad_gate, gate_rows, programs, D, 0, BLOCK_D)
    _finish(partial, grad_shift, shift_rows, programs, D, 1, BLOCK_D)
    _finish(partial, grad_scale, scale_rows, programs, D, 2, BLOCK_D)


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
    given = grad_h if grad_h is not None else grad_x_new
    assert given is not None
    B, N, D = given.shape
    block, single = block_of(D)
    segments = segments_of(gate, shift, scale)
    processors = _triton.target(given.device).processors
    parts = parts_of(N // segments, B * segments, block, BACKWARD_ELEMENTS, processors)
    programs = B * segments * parts
    partial = _triton.empty((programs, 3, D), float32, given.device)
    inputs = {
        **{"x": matrices(x), "branch": matrices(branch), "grad_h": matrices(grad_h), "mean": mean, "rstd": rstd},
        **{"gate": modulation(gate, N), "scale": modulation(scale, N)},
        **{"runs": Runs(N, segments, parts), "D": D, "BLOCK_D": block},
    }
    means: dict[str, Tensor | None] = {"g_mean": None, "gx_mean": None}
    if not single and grad_h is not None:
        means = {name: _triton.empty((B, N), float32, given.device) for name in means}
        tile = _triton.pick(MODULATION, ("row_means", block), given.device)
        _triton.launch(adaln_row_means_kernel, (programs,), tile, **inputs, **means)

    def run(tile: _triton.Tile) -> None:
        _triton.launch(
            adaln_backward_kernel,
            (programs, triton.cdiv(D, block)),
            fitting(tile, N // segments),
            **(inputs | means),
            **{"grad_x_new": matrices(grad_x_new), "grad_x": grad_x, "grad_branch": grad_branch},
            **{"partial": partial, "STAGES": tile.stages},
        )

    run(_triton.pick(MODULATION, ("backward", block), given.device, run))
    tile = _triton.pick(MODULATION, ("finish",), given.device)
    gradients = {"gate": grad_gate, "shift": grad_shift, "scale": grad_scale}
    rows = {name: B * frames_of(gradient) for name, gradient in gradients.items()}
    _triton.launch(
        adaln_finish_kernel,
        (max(rows.values()), triton.cdiv(D, tile.blocks["BLOCK_D"]), len(rows)),
        tile,
        **{f"grad_{name}": gradient for name, gradient in gradients.items()},
        **{f"{name}_rows": number for name, number in rows.items()},
        **{"partial": partial, "programs": programs, "D": D},
    )
