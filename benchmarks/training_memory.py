"""Peak memory of a forward and a backward pass of the L tokenizer, ours beside eager PyTorch's."""

from __future__ import annotations

import argparse

import torch

from walt.data.loading import Batch

from . import memory
from .contender import REFERENCE, on_reference
from .machine import machine, sentence
from .say import say
from .training_step import build

DTYPES = ("float32", "bfloat16")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    options = parser.parse_args(arguments)
    if options.frames < 1 or options.frames % 4 != 1:
        parser.error(f"--frames {options.frames}, expected 1, 5, 9 and so on")
    if options.size < 8 or options.size % 8:
        parser.error(f"--size {options.size}, expected a multiple of 8")
    say(sentence(machine("cpu")))
    dtype = getattr(torch, options.dtype)
    objective, batch = build("tokenizer L", 1, options.frames, options.size, dtype, "cpu")
    _, small = build("tokenizer L", 1, 1, 8, dtype, "cpu")

    def step(batch: Batch) -> None:
        objective.backward([batch])
        objective.network.zero_grad(set_to_none=True)

    mib = {}
    for name, run in {"ours": step, REFERENCE: on_reference(step)}.items():
        run(batch=small)  # what the first call sets up is no part of it
        mib[name] = memory.peak(lambda run=run: run(batch=batch))  # type: ignore[misc]
    for name, peak in mib.items():
        print(f"{name:<16} {'unknown' if peak is None else f'{peak:.0f} MiB'}")
    return 0
