"""One case in one dtype: the check, the preflight, the times, the rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from . import floors, memory, ops, training_step
from .case import Case
from .contender import REFERENCE, Subject, first_line, preflight, tensors_of
from .timing import LEAST, Times, interleaved

Row = dict[str, Any]

GPU_BACKENDS = ("triton", "cuda", "cudnn", "flash")  # ours; the default choice would not take what is opt-in


@dataclass(frozen=True)
class Effort:
    """How long to look, at what: seconds per contender and mode, the longest call a baseline may take, our backends."""

    quick: bool = False
    backends: tuple[str, ...] = ()  # of ours, to be forced one by one; what the op chooses where there are none

    @property
    def seconds(self) -> float:
        return 0.25 if self.quick or self.backends else 1.0  # a GPU's calls are short

    @property
    def longest_call(self) -> float:
        return 2.0 if self.quick else 5.0


def workshop(case: Case) -> ModuleType:
    """Who builds and checks the case: it has ``subject`` and ``check``."""
    return training_step if case.op == "training_step" else ops


def rows_of(case: Case, dtype: torch.dtype, device: str, peak: dict[str, Any], effort: Effort) -> Iterator[Row]:
    """The case's rows, one per mode and backend of ours, as they are measured.

    What gives a wrong result, or none, is never timed; an AssertionError says so after the rows of the others.
    """
    torch.backends.cudnn.benchmark = device == "cuda"  # cuDNN tries its algorithms: it, too, shall be at its best
    shop, small = workshop(case), case.small()
    scale = case.flops / small.flops
    cut_down = shop.subject(small, dtype, device, effort.quick, effort.backends)
    refused = {mode: preflight(cut_down, mode, scale, effort.longest_call, device) for mode in case.modes}
    reference_runs = REFERENCE not in refused[case.modes[-1]]
    subject = shop.subject(case, dtype, device, effort.quick, effort.backends)
    checks: dict[str, tuple[float, list[str]]] = {}
    wrong = []
    for name in subject.ours:
        try:
            checks[name] = shop.check(case, dtype, device, reference_runs, name)
        except Exception as error:
            wrong.append(f"{name}: {error}" if isinstance(error, AssertionError) else f"{name}: {first_line(error)}")
            del subject.contenders[name]
    for mode in case.modes if checks else ():
        notes = [*subject.notes, *(f"{name}: {reason}" for name, reason in refused[mode].items())]
        times = time_all(subject, mode, refused[mode], device, effort, notes)
        baselines = {name: value for name, value in times.items() if name not in subject.ours}
        best = min(baselines, key=lambda name: baselines[name].p50)
        baseline = subject.call(best, mode)
        if mode == "backward":
            baseline()  # its forward pass is not what is measured
        baseline_memory = memory.peak(baseline, device)
        if case.op == "training_step" and peak.get("product", str(dtype)) not in str(dtype):
            notes.append("its linear layers are PyTorch's own, whose product in this dtype is slower than float32 here")
        for name, (error_ratio, check_notes) in checks.items():
            yield {
                "op": case.op,
                "case": case.name,
                "mode": mode,
                "dtype": str(dtype).removeprefix("torch."),
                "backend": backend(case, subject) if name == "ours" else name,
                "ms": times[name].p50,
                "ms_p20": times[name].p20,
                "ms_p80": times[name].p80,
                "baselines": {name: value.p50 for name, value in baselines.items()},
                "best_baseline": best,
                "speedup": baselines[best].p50 / times[name].p50,
                **rates(case, mode, dtype, times[name], peak),
                **memory_of(subject, name, mode, device),
                "baseline_memory": baseline_memory,
                "error_ratio": error_ratio,
                "notes": [*check_notes, *notes],
            }
    if wrong:
        raise AssertionError("; ".join(wrong))


def memory_of(subject: Subject, name: str, mode: str, device: str) -> Row:
    """MiB at the peak of a call beyond its inputs, and of what it returns; whether two calls return the same bits."""
    call = subject.call(name, mode)
    if mode == "step":
        return {"peak_memory": memory.peak(call, device), "output_memory": None, "deterministic": None}
    first, second = (tensors_of(call()) for _ in range(2))
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    returned = sum(tensor.nbytes for tensor in first) / 2**20
    del first, second
    return {"peak_memory": memory.peak(call, device), "output_memory": returned, "deterministic": same}


def time_all(
    subject: Subject, mode: str, refused: dict[str, str], device: str, effort: Effort, notes: list[str]
) -> dict[str, Times]:
    """Times everything that may run; what cannot, or was called a few times only, is written into ``notes``."""
    calls = {}
    for name, contender in subject.contenders.items():
        if name in refused:
            continue
        call = subject.call(name, mode)
        if contender.compiled or (device == "cuda" and name not in subject.ours):  # compiled now, or out of memory
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
    """GFLOP/s, GB/s, the larger share of what the machine was measured to reach, and the floor on an H200."""
    if case.op == "training_step":
        gflops, gbps, floor = training_step.flops(case) / ours.p50 / 1e6, None, None
    else:
        flops, moved = case.work(mode, dtype)
        gflops, gbps, floor = flops / ours.p50 / 1e6, moved / ours.p50 / 1e6, floors.milliseconds(case, mode, dtype)
    share = max(gflops / peak["gflops"], (gbps or 0.0) / peak["gbps"])
    return {"gflops": gflops, "gbps": gbps, "share_of_peak": share, "h200_floor_ms": floor}


def backend(case: Case, subject: Subject) -> str:
    """What ran; a whole step uses the default of every op."""
    return "default" if case.op == "training_step" else ops.backend(case, subject.inputs)
