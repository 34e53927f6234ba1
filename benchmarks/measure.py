"""One case in one dtype: the check, the preflight, the times, the rows."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from . import memory, ops, training_step
from .cases import Case
from .contender import REFERENCE, Subject, first_line, preflight
from .timing import LEAST, Times, interleaved

Row = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How long to look: seconds of timing per contender and mode, and the longest call that a baseline may take."""

    quick: bool = False

    @property
    def seconds(self) -> float:
        return 0.25 if self.quick else 1.0

    @property
    def longest_call(self) -> float:
        return 2.0 if self.quick else 5.0


def workshop(case: Case) -> ModuleType:
    """Who builds and checks the case: it has ``subject`` and ``check``."""
    return training_step if case.op == "training_step" else ops


def rows_of(case: Case, dtype: torch.dtype, device: str, peak: dict[str, Any], effort: Effort) -> list[Row]:
    """The case's rows, one per mode. An AssertionError says that a result is wrong: such a case is never timed."""
    shop, small = workshop(case), case.small()
    scale = case.flops / small.flops
    cut_down = shop.subject(small, dtype, device, effort.quick)
    refused = {mode: preflight(cut_down, mode, scale, effort.longest_call, device) for mode in case.modes}
    reference_runs = REFERENCE not in refused[case.modes[-1]]
    error_ratio, check_notes = shop.check(case, dtype, device, reference_runs)

    subject = shop.subject(case, dtype, device, effort.quick)
    rows = []
    for mode in case.modes:
        notes = [*check_notes, *subject.notes, *(f"{name}: {reason}" for name, reason in refused[mode].items())]
        times = time_all(subject, mode, refused[mode], device, effort, notes)
        ours = times.pop("ours")
        best = min(times, key=lambda name: times[name].p50)
        if case.op == "training_step" and peak.get("product", str(dtype)) not in str(dtype):
            notes.append("its linear layers are PyTorch's own, whose product in this dtype is slower than float32 here")
        rows.append(
            {
                "op": case.op,
                "case": case.name,
                "mode": mode,
                "dtype": str(dtype).removeprefix("torch."),
                "backend": backend(case, subject),
                "ms": ours.p50,
                "ms_p20": ours.p20,
                "ms_p80": ours.p80,
                "baselines": {name: value.p50 for name, value in times.items()},
                "best_baseline": best,
                "speedup": times[best].p50 / ours.p50,
                **rates(case, mode, dtype, ours, peak),
                "peak_memory": memory.peak(subject.call("ours", mode), device),
                "baseline_memory": memory.peak(subject.call(best, mode), device),
                "error_ratio": error_ratio,
                "notes": notes,
            }
        )
    return rows


def time_all(
    subject: Subject, mode: str, refused: dict[str, str], device: str, effort: Effort, notes: list[str]
) -> dict[str, Times]:
    """Times everything that may run; what cannot, or was called a few times only, is written into ``notes``."""
    calls = {}
    for name, contender in subject.contenders.items():
        if name in refused:
            continue
        call = subject.call(name, mode)
        if contender.compiled:
            try:
                call()
            except Exception as error:
                notes.append(f"{name}: does not run: {first_line(error)}")
                continue
        calls[name] = call
    times = interleaved(calls, device=device, seconds=effort.seconds)
    notes += [f"{name}: median of {value.calls} calls" for name, value in times.items() if value.calls < LEAST]
    return times


def rates(case: Case, mode: str, dtype: torch.dtype, ours: Times, peak: dict[str, Any]) -> Row:
    """GFLOP/s, GB/s, and the larger share of what the machine was measured to reach."""
    if case.op == "training_step":
        gflops, gbps = training_step.flops(case) / ours.p50 / 1e6, None
    else:
        backward = mode != "forward"
        gflops = case.flops * (case.flops_factor if backward else 1) / ours.p50 / 1e6
        gbps = case.elements * (case.elements_factor if backward else 1) * dtype.itemsize / ours.p50 / 1e6
    share = max(gflops / peak["gflops"], (gbps or 0.0) / peak["gbps"])
    return {"gflops": gflops, "gbps": gbps, "share_of_peak": share}


def backend(case: Case, subject: Subject) -> str:
    """What ran; a whole step uses the default of every op."""
    return "default" if case.op == "training_step" else ops.backend(case, subject.inputs)
