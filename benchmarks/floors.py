"""What a perfect kernel would need: FLOPs, bytes and the time that either takes on an H200. Nothing is run."""

from __future__ import annotations

import torch

from .case import Case

# An H200's copy and bfloat16 product as they were measured, and float32 outside of the tensor cores by its data sheet.
H200_GBPS = 4300.0
H200_GFLOPS = {torch.bfloat16: 790e3, torch.float16: 790e3, torch.float32: 67e3}


def milliseconds(case: Case, mode: str, dtype: torch.dtype) -> float:
    """The longer of moving the bytes and computing the products; backward only starts when forward has ended."""
    if mode == "forward+backward":
        return milliseconds(case, "forward", dtype) + milliseconds(case, "backward", dtype)
    flops, moved = case.work(mode, dtype)
    return max(flops / H200_GFLOPS[dtype], moved / H200_GBPS) / 1e6


def table(cases: list[Case], dtype: torch.dtype) -> str:
    """All cases as Markdown."""
    lines = ["| op | case | mode | GFLOP | MB | FLOP/byte | H200 floor ms | bound by |", "|---" * 8 + "|"]
    for case in cases:
        for mode in case.modes:
            flops, moved = case.work(mode, dtype)
            bound = "product" if flops / H200_GFLOPS[dtype] > moved / H200_GBPS else "copy"
            lines.append(
                f"| {case.op} | {case.name} | {mode} | {flops / 1e9:.3g} | {moved / 1e6:.4g} | {flops / moved:.3g} "
                f"| {milliseconds(case, mode, dtype):.4f} | {bound} |"
            )
    return "\n".join(lines)
