"""Does the cost grow in step with the work? Each op with one size doubled, against itself, interleaved."""

from __future__ import annotations

import math
from typing import Any

import torch

from .case import Case
from .cases import SCALING
from .measure import Effort, workshop
from .timing import interleaved

LIMIT = 2.1  # times longer for twice the FLOPs

Growth = dict[str, Any]


def growths(
    op: str | None, dtype: torch.dtype, device: str, effort: Effort, groups: list[dict[str, Case]] | None = None
) -> list[Growth]:
    """One entry per op, doubled size and mode: how much longer it took per doubling of FLOPs. Checked before timed."""
    found = []
    for group in SCALING if groups is None else groups:
        base = group["base"]
        if op not in (None, base.op):
            continue
        subjects = {
            size: workshop(case).subject(case, dtype, device, True, effort.backends) for size, case in group.items()
        }
        if not all(subject.ours for subject in subjects.values()):
            continue  # none of the backends that were named takes this op
        for size, case in group.items():
            workshop(case).check(case, dtype, device, dtype is torch.float32, subjects[size].ours[0])
        for mode in base.modes:
            calls = {size: subject.call(subject.ours[0], mode) for size, subject in subjects.items()}
            times = interleaved(calls, device=device, seconds=effort.seconds)
            for size, case in group.items():
                if size != "base":
                    factor = times[size].p50 / times["base"].p50
                    found.append(
                        {
                            "op": base.op,
                            "doubled": size,
                            "mode": mode,
                            "dtype": str(dtype).removeprefix("torch."),
                            "flops": case.flops / base.flops,
                            "time": factor,
                            "per_doubling": factor ** (1 / math.log2(case.flops / base.flops)),
                        }
                    )
    return found


def line(growth: Growth) -> str:
    verdict = "in step" if growth["per_doubling"] <= LIMIT else f"MORE than {LIMIT}x"
    what = f"{growth['op']}, {growth['dtype']}, {growth['mode']}, twice the {growth['doubled']}"
    cost = f"{growth['flops']:.1f}x the FLOPs in {growth['time']:.2f}x the time"
    return f"{what}: {cost}, {growth['per_doubling']:.2f}x per doubling ({verdict})"
