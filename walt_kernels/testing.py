"""What a right kernel is, measured: shared by the tests and the benchmarks.

Truth is the reference in float64. The yardstick is the same reference in the tested dtype. A kernel passes when its
error is at most ``k`` times the yardstick's error plus a floor of a few units of rounding. Nothing is tuned per test.

A yardstick without any error is right by luck: its large terms cancel to the last bit (a norm over one number,
attention to one token), where terms that were rounded in another order leave their rounding. Of such a result the
yardstick's error is that of the reference whose every step is off by a rounding (``Unlucky``).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import _dispatch

K_FORWARD = 2.0
K_BACKWARD = 3.0


def compare(
    name: str,
    actual: Tensor,
    truth: Tensor,
    yardstick: Tensor,
    *,
    k: float,
    rows: int = 1,
    averaged: int = 1,
    dtype: torch.dtype | None = None,
    unlucky: Callable[[], float] | None = None,
) -> float:
    """Asserts that ``actual`` is as near to ``truth`` as the yardstick allows; returns the larger of two error ratios.

    Both the largest absolute error and the relative L2 error must pass. ``rows`` is the length of a reduction in the
    tested dtype: rounding grows with its square root. ``averaged`` is the number of terms, each rounded in the tested
    dtype, that ``actual`` is a mean of: rounding shrinks with its square root, and a single mean (a loss) has one draw
    of it, which in the yardstick may be near zero by luck. ``dtype`` is the tested dtype where it is not ``actual``'s:
    a float32 parameter beside bfloat16 tokens has a gradient in float32 that was made of bfloat16 products.
    ``unlucky()`` stands for the yardstick's largest error where it has none and ``actual`` has more than the floor.
    """
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert actual.dtype == yardstick.dtype, f"{name}: dtype {actual.dtype}, expected {yardstick.dtype}"
    if actual.numel() == 0:
        return 0.0
    truth = truth.double()
    error = (actual.double() - truth).abs()
    allowed = (yardstick.double() - truth).abs()
    eps = torch.finfo(dtype or actual.dtype).eps
    unit = 4 * eps * math.sqrt(rows / averaged)
    floor = unit * truth.abs().max().item()
    assert torch.isfinite(actual).all() or not torch.isfinite(truth).all(), f"{name}: values that are not finite"
    worst = error.max().item()
    if unlucky is not None and worst > floor and allowed.max().item() == 0:
        allowed = torch.full_like(allowed, unlucky())
    limit = k * allowed.max().item() + floor
    index = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    assert worst <= limit, (
        f"{name}: largest error {worst:.3e} at {index} ({actual[index].item():.6g}, truth {truth[index].item():.6g}), "
        f"limit {limit:.3e} = {k} x {allowed.max().item():.3e} + {floor:.3e}"
    )
    norm = truth.norm().item()
    l2, l2_limit = error.norm().item(), k * allowed.norm().item() + unit * norm
    assert l2 <= l2_limit, f"{name}: L2 error {l2:.3e} of norm {norm:.3e}, limit {l2_limit:.3e}"
    return max(worst / limit, l2 / l2_limit) if limit > 0 and l2_limit > 0 else 0.0


def check_op(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Mapping[str, Any],
    *,
    backward: bool = True,
    rows: int = 1,
    seed: int = 0,
) -> dict[str, float]:
    """Runs ``op`` and ``reference`` on keyword ``inputs``, forward and (optionally) backward, and compares all results.

    Floating tensors of ``inputs`` that require a gradient get one compared. The truth sees the inputs as they are,
    widened to float64. Returns the error ratio of every output and gradient by name.
    """
    truth_inputs = {name: widen(value) for name, value in inputs.items()}
    own = {name: leaf(value) for name, value in inputs.items()}
    yard = {name: leaf(value) for name, value in inputs.items()}
    results = [op(**own), reference(**truth_inputs), reference(**yard)]
    outputs = [value if isinstance(value, tuple) else (value,) for value in results]
    ratios = {}
    floating = [v.dtype for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point()]
    dtype = max(floating, key=lambda d: torch.finfo(d).eps)
    wanted = [n for n, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad] if backward else []
    unlucky = Unlucky(reference, inputs, wanted, seed) if dtype is not torch.float64 else None
    for i, (a, t, y) in enumerate(zip(*outputs, strict=True)):
        off = partial(unlucky.error, i) if unlucky else None
        ratios[f"out{i}"] = compare(
            f"output {i}", a.detach(), t.detach(), y.detach(), k=K_FORWARD, rows=rows, dtype=dtype, unlucky=off
        )
    if not wanted:
        return ratios
    grads_out = cotangents_of(outputs[0], seed)
    grads = []
    for outs, ins, wide in zip(outputs, (own, truth_inputs, yard), (False, True, False), strict=True):
        cotangents = [g.double() if wide else g for g in grads_out]
        grads.append(torch.autograd.grad(outs, [ins[n] for n in wanted], cotangents))
    for i, (name, a, t, y) in enumerate(zip(wanted, *grads, strict=True), len(outputs[0])):
        off = partial(unlucky.error, i) if unlucky else None
        ratios[f"grad_{name}"] = compare(f"grad_{name}", a, t, y, k=K_BACKWARD, rows=rows, dtype=dtype, unlucky=off)
    return ratios


def cotangents_of(outputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Normal numbers in the outputs' dtypes, on their devices."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype).to(o.device) for o in outputs]


class Unlucky:
    """How far the results of a reference are off where every step of it is off by a rounding: in float64 on the CPU,
    with each tensor that it makes multiplied by 1 + u or 1 - u at random, u half a unit of what the op accumulates in.

    So terms that cancel leave what their size allows, whatever the order in which they are added. The largest error of
    four runs counts. A norm or a softmax is one step to PyTorch, both ways: its own sums and products are taken.
    """

    RUNS = 4

    def __init__(self, reference: Callable[..., Any], inputs: Mapping[str, Any], wanted: list[str], seed: int) -> None:
        self.reference, self.wanted, self.seed = reference, wanted, seed
        self.inputs = {name: move(value, "cpu") for name, value in inputs.items()}

    @functools.cached_property
    def errors(self) -> list[float]:
        """Of the outputs, then of the gradients of ``wanted``."""
        truth = self.results(contextlib.nullcontext())
        runs = [self.results(_Roundings(seed)) for seed in range(self.RUNS)]
        return [
            max(float((other - result).abs().max()) if result.numel() else 0.0 for other in others)
            for result, *others in zip(truth, *runs, strict=True)
        ]

    def error(self, index: int) -> float:
        return self.errors[index]

    def results(self, mode: contextlib.AbstractContextManager[Any]) -> list[Tensor]:
        inputs = {name: widen(value) for name, value in self.inputs.items()}
        with mode:
            outputs = self.reference(**inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            ours = [o.detach() for o in outputs]
            if not self.wanted:
                return ours
            cotangents = [c.double() for c in cotangents_of(outputs, self.seed)]
            return [*ours, *torch.autograd.grad(outputs, [inputs[n] for n in self.wanted], cotangents)]


class _Roundings(TorchDispatchMode):
    """Every tensor that is made is off by a rounding; PyTorch's own decompositions tell the steps of larger ops."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.unit = torch.finfo(torch.float32).eps / 2

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch._decomp import decomposition_table

        if op in decomposition_table:
            with self:
                parts = decomposition_table[op](*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        result = op(*args, **(kwargs or {}))
        if any(returned.alias_info is not None for returned in op._schema.returns):  # a view, or made in place
            return result
        return torch.utils._pytree.tree_map(self.off, result)

    def off(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        signs = torch.rand(value.shape, generator=self.generator).lt(0.5)
        return torch.where(signs, value * (1 + self.unit), value * (1 - self.unit))


def leaf(value: Any) -> Any:
    """The same tensor (same memory, same strides) as a fresh leaf of the graph."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)


def widen(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def random(
    *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, grad: bool = True, seed: int = 0
) -> Tensor:
    """Normal numbers drawn in float64 and rounded to ``dtype``, the same for a seed whatever the dtype."""
    generator = torch.Generator().manual_seed(seed + 7919 * sum((i + 1) * s for i, s in enumerate(shape)))
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return values.to(dtype).requires_grad_(grad)


LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced")


def embed(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout, inside a larger buffer of NaN where the layout leaves room around them.

    ``contiguous``; ``channels_last`` (dimension 1 innermost); ``permuted`` (dense, dimensions reversed in memory);
    ``sliced`` (every dimension cut out of a larger one, the innermost at unit stride).
    """
    requires_grad, source = tensor.requires_grad, tensor.detach()
    if layout == "contiguous":
        result = source.contiguous()
    elif layout == "channels_last":
        result = source.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "permuted":
        order = tuple(reversed(range(source.dim())))
        result = source.permute(order).contiguous().permute(order)
    elif layout == "sliced":
        buffer = torch.full([s + 3 for s in source.shape], math.nan, dtype=source.dtype, device=source.device)
        result = buffer[tuple(slice(1, s + 1) for s in source.shape)]
        result.copy_(source)
    else:
        raise ValueError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")
    return result.requires_grad_(requires_grad)


def move(value: Any, device: str | torch.device) -> Any:
    """The same values in the same layout, surroundings included, on another device; what is no tensor as it is."""
    if not isinstance(value, Tensor):
        return value
    memory = torch.empty(0, dtype=value.dtype, device=value.device).set_(value.detach().untyped_storage())
    moved = memory.to(device).as_strided(value.shape, value.stride(), value.storage_offset())
    return moved.requires_grad_(value.requires_grad)


def sample_call(
    op: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, batch: int = 2
) -> dict[str, Any]:
    """Arguments of one small, typical call to a public op, by name."""
    return _dispatch.op(op).sample(lambda *shape: torch.randn(shape, device=device).to(dtype), batch)
