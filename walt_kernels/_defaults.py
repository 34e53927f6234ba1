"""What runs on a GPU where no backend is forced: the fastest of those that were measured there.

An op's table says, for an architecture and a class of calls, how many milliseconds each backend took for each pass, and
which row of benchmarks/results/ tells so. What stands in no table has not run right there, and is never a default.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Times = Mapping[str, float]  # milliseconds by backend


class Measured(NamedTuple):
    """A class of calls. A backend that a pass has no time of was not measured in it, or was not right."""

    row: str
    forward: Times
    backward: Mapping[str, Times]  # by pass


class Defaults(NamedTuple):
    """An op's table, ``measured[architecture][classify(**inputs)]``.

    ``passes`` names what backward can be split into, with the inputs whose gradients each part computes. Forward and
    these parts may run on different backends, which then save the same tensors.
    """

    classify: Callable[..., str | None]
    passes: Mapping[str, Sequence[str]]
    measured: Mapping[str, Mapping[str, Measured]]


class Choice(NamedTuple):
    """The backends of a call: of forward, and of each pass of backward where a gradient is wanted."""

    kind: str
    measured: Measured
    forward: str
    passes: Mapping[str, str]

    @property
    def name(self) -> str:
        """What the op is called with: a backend, or those of forward and all passes, as in "triton/cudnn/triton"."""
        names = (self.forward, *self.passes.values())
        return "/".join(names) if len(set(names)) > 1 else self.forward

    def reason(self, backend: str) -> str | None:
        """Why forward does not run on a backend that can run, or None."""
        if backend == self.forward:
            return None
        told = []
        for what, times, chosen in self._compared():
            if backend == chosen:
                told.append(f"{what} runs on it: {times[backend]:g} ms")
            elif backend in times and chosen in times:
                told.append(f"{what} {times[backend]:g} ms, {chosen} {times[chosen]:g}")
        return f"{'; '.join(told) or 'not measured'} ({self.kind}: {self.measured.row})"

    def _compared(self) -> list[tuple[str, Times, str]]:
        backward = [(name, self.measured.backward.get(name, {}), chosen) for name, chosen in self.passes.items()]
        return [("forward", self.measured.forward, self.forward), *backward]


@functools.cache
def architecture(device: torch.device) -> str | None:
    """A GPU's in the tables' words. Nothing has run on one of AMD's."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def choose(defaults: Defaults, backends: Sequence[Any], inputs: Mapping[str, Any]) -> Choice | None:
    """The fastest of the op's backends that can run, or None where the table has nothing to say.

    Without a gradient to compute, forward alone decides. A backend that PyTorch differentiates runs all or nothing.
    """
    table = defaults.measured.get(_architecture(inputs))
    kind = None if table is None else defaults.classify(**inputs)
    if table is None or kind is None or kind not in table:
        return None
    measured = table[kind]
    timed = (measured.forward, *measured.backward.values())
    can_run = [b for b in backends if any(b.name in times for times in timed) and b.unsupported(**inputs) is None]
    wanted = [name for name, read in defaults.passes.items() if _wants_gradient(inputs, read)]
    kernels = [b.name for b in can_run if not b.differentiable]
    forward = _fastest(measured.forward, kernels)
    passes = {name: _fastest(measured.backward.get(name, {}), kernels, forward) for name in defaults.passes}
    choices = [Choice(kind, measured, forward, passes if wanted else {})]
    choices += [Choice(kind, measured, b.name, dict.fromkeys(wanted, b.name)) for b in can_run if b.differentiable]
    best = None
    for choice in choices:
        time = _time(choice, wanted)
        if time is not None and (best is None or time < best[0]):
            best = time, choice
    return None if best is None else best[1]


def _architecture(inputs: Mapping[str, Any]) -> str:
    device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
    return architecture(device) or "none"


def _wants_gradient(inputs: Mapping[str, Any], names: Sequence[str]) -> bool:
    return torch.is_grad_enabled() and any(inputs[n] is not None and inputs[n].requires_grad for n in names)


def _fastest(times: Times, names: Sequence[str], otherwise: str = "") -> str:
    for name in names:
        if name in times and times[name] < times.get(otherwise, float("inf")):
            otherwise = name
    return otherwise


def _time(choice: Choice, wanted: Sequence[str]) -> float | None:
    """Milliseconds of forward and the wanted passes, None where one was not measured."""
    total = choice.measured.forward.get(choice.forward)
    for name in wanted:
        time = choice.measured.backward.get(name, {}).get(choice.passes[name])
        total = None if total is None or time is None else total + time
    return total
