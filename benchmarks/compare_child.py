"""What ``benchmarks.compare`` starts on either side: times our kernels alone and prints JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import walt_kernels

from .cases import CASES
from .measure import workshop
from .timing import interleaved

SECONDS = 0.2


def main() -> None:
    tree, package = Path(sys.argv[1]).resolve(), Path(walt_kernels.__file__).resolve()
    assert tree in package.parents, f"walt_kernels comes from {package}, expected from {tree}"
    times: dict[str, float | None] = {}
    for index in json.load(sys.stdin):
        case = CASES[index]
        for dtype in (torch.float32, torch.bfloat16):
            for mode in case.modes:
                key = f"{case.op}, {case.name}, {str(dtype).removeprefix('torch.')}, {mode}"
                try:
                    call = workshop(case).subject(case, dtype, "cpu", True).call("ours", mode)
                    times[key] = interleaved({"ours": call}, seconds=SECONDS)["ours"].p50
                except Exception as error:  # the other side may not know an argument yet
                    print(f"{key}: {type(error).__name__}: {error}", file=sys.stderr)
                    times[key] = None
    json.dump(times, sys.stdout)


if __name__ == "__main__":
    main()
