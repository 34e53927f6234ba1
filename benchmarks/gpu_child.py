"""What ``gpu_watch`` starts: measures a plan and prints a message in JSON for everything that it has to tell.

``gpu_ahead`` starts it as well, to compile only.

A kernel that reads outside of its memory leaves a process that can use the GPU no more, so the measurements have their
own, which ends there and is started again behind that case.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from .case import Case
from .cases import GPU_CASES
from .contender import first_line
from .machine import ceilings
from .measure import Effort, rows_of, workshop

Message = dict[str, Any]  # one of: begin (position in the plan), ceilings (by dtype), row, model, failed (text)
Plan = list[tuple[str, int]]  # dtype, and index into the cases

UNUSABLE = 3  # exit status


def messages(plan: Plan, cases: list[Case], effort: Effort, device: str) -> Iterator[Message]:
    """All rows in the plan's order; a case that fails is told, and the next one begins."""
    peaks: dict[str, dict[str, Any]] = {}
    for position, (name, index) in enumerate(plan):
        yield {"begin": position}
        dtype, case = getattr(torch, name), cases[index]
        try:
            if name not in peaks:
                peaks[name] = ceilings(device, dtype)
                yield {"ceilings": {name: peaks[name]}}
            for row in rows_of(case, dtype, device, peaks[name], effort):
                yield {"row": row}
        except Exception as error:
            reason = str(error) if isinstance(error, AssertionError) else first_line(error)
            yield {"failed": f"{case.op}, {case.name}, {name}: {reason}"}


def compile_all(plan: Plan, cases: list[Case], effort: Effort, device: str) -> None:
    """Calls once in every mode what compiles: ours, and what torch.compile makes."""
    for name, index in plan:
        case = cases[index]
        subject = workshop(case).subject(case, getattr(torch, name), device, effort.quick, effort.backends)
        for mode in case.modes:
            for label, contender in subject.contenders.items():
                if label in subject.ours or (contender.compiled and not (contender.forward_only and mode != "forward")):
                    with suppress(Exception):  # told when it is measured
                        subject.call(label, mode)()


def usable(device: str) -> bool:
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False


def main() -> int:
    wanted = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no message
    effort = Effort(wanted["quick"], tuple(wanted["backends"]))
    if wanted.get("ahead"):
        compile_all(wanted["plan"], GPU_CASES, effort, wanted["device"])
        return 0
    for message in messages(wanted["plan"], GPU_CASES, effort, wanted["device"]):
        print(json.dumps(message), file=out, flush=True)
        if "failed" in message and not usable(wanted["device"]):
            return UNUSABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
