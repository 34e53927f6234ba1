"""A way to do a case's work, one call of it, and the preflight that spares us calls of minutes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import walt_kernels

from .timing import seconds_of

REFERENCE, COMPILED = "eager reference", "compiled reference"
CLOSE = 4.0  # times the fastest baseline's estimate: as near as this, an estimate does not tell which is faster


@dataclass(frozen=True)
class Contender:
    """``function`` takes the case's inputs as keyword arguments. A ``compiled`` one compiles on its first call.

    ``forward_only`` says why there is no backward pass. ``like`` names the contender whose preflight is this one's.
    ``prepared`` changes the inputs before any time is taken: into another memory format, say.
    """

    function: Callable[..., Any]
    compiled: bool = False
    forward_only: str = ""
    like: str = ""
    prepared: Callable[[dict[str, Any]], dict[str, Any]] = dict


@dataclass(frozen=True)
class Subject:
    """A case made concrete in a dtype, on a device: its inputs and all contenders, ours first."""

    inputs: dict[str, Any]
    contenders: dict[str, Contender]
    notes: tuple[str, ...] = ()
    ours: tuple[str, ...] = ("ours",)  # which contenders are ours: the default choice, or backends by name

    def call(self, name: str, mode: str) -> Callable[[], object]:
        contender = self.contenders[name]
        return step(contender.function, contender.prepared(self.inputs), mode)


def step(function: Callable[..., Any], inputs: dict[str, Any], mode: str) -> Callable[[], object]:
    """One call of ``function``; with the gradients of everything when the mode says so."""
    if mode == "step":
        return lambda: function(**inputs)
    if mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function(**inputs)

        return forward
    wanted = [value for value in inputs.values() if isinstance(value, Tensor) and value.requires_grad]
    cotangents: list[Tensor] = []

    def run() -> tuple[Tensor, ...]:
        outputs = function(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not cotangents:
            cotangents.extend(torch.randn_like(output) for output in outputs)
        return outputs

    def both() -> object:
        outputs = run()
        return outputs, torch.autograd.grad(outputs, wanted, cotangents)

    kept: list[Tensor] = []

    def backward() -> object:
        """The first call runs forward as well; its graph is kept for all that follow."""
        if not kept:
            kept.extend(run())
        return torch.autograd.grad(kept, wanted, cotangents, retain_graph=True)

    return backward if mode == "backward" else both


def tensors_of(result: Any) -> list[Tensor]:
    """All tensors that a call returned."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors_of(part)] if isinstance(result, tuple | list) else []


def on_backend(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """The same function with every op of it on ``backend``."""

    def forced(**inputs: Any) -> Any:
        with walt_kernels.use_backend(backend):
            return function(**inputs)

    return forced


def on_reference(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with every op of it on plain PyTorch."""
    return on_backend(function, "reference")


def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function by a round trip: 16-bit inputs widened to float32, outputs and gradients rounded back once."""

    def narrow(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)

    def wide(**inputs: Any) -> Any:
        dtypes = [value.dtype for value in inputs.values() if narrow(value)]
        outputs = function(**{name: value.float() if narrow(value) else value for name, value in inputs.items()})
        if not dtypes:
            return outputs
        return tuple(o.to(dtypes[0]) for o in outputs) if isinstance(outputs, tuple) else outputs.to(dtypes[0])

    return wide


def preflight(small: Subject, mode: str, scale: float, limit: float, device: str) -> dict[str, str]:
    """Why contenders do not run in ``mode``, by name; those without a reason may be called.

    A library may take minutes for one call where it lacks a kernel for a dtype. ``small`` is a cut-down version whose
    time, times ``scale``, estimates the full size in seconds. Ours is not asked. A baseline that may be the fastest one
    is never skipped, however slow a busy machine makes all of them look.
    """
    reasons: dict[str, str] = {}
    estimates: dict[str, float] = {}
    for name, contender in small.contenders.items():
        if mode.endswith("backward") and contender.forward_only:
            reasons[name] = f"forward only: {contender.forward_only}"
        elif name not in small.ours and not contender.compiled:
            try:
                estimates[name] = estimate(small.call(name, mode), scale, limit, device)
            except Exception as error:
                reasons[name] = f"does not run: {first_line(error)}"
    allowed = max(limit, CLOSE * min(estimates.values(), default=0.0))
    for name, seconds in estimates.items():
        if seconds > allowed:
            reasons[name] = f"skipped: about {seconds:.0f} s a call"
    for name, contender in small.contenders.items():
        if contender.like in reasons:
            reasons[name] = f"skipped with {contender.like}, whose calls it makes"
    return reasons


def estimate(call: Callable[[], object], scale: float, limit: float, device: str) -> float:
    """Seconds at full size, from at most three small calls: the first ones may have had something to set up."""
    best = float("inf")
    for _ in range(3):
        best = min(best, seconds_of(call, device) * scale)
        if best <= limit:
            break
    return best


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
