"""Peak memory of a forward and a backward pass of the L tokenizer, ours beside eager PyTorch's."""

from __future__ import annotations

import argparse

import torch

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
    say(sentence(machine("cpu")))
    objective, batch = build("tokenizer L", 1, options.frames, options.size, getattr(torch, options.dtype), "cpu")

    def step() -> None:
        objective.backward([batch])
        objective.network.zero_grad(set_to_none=True)

    step_of = {"ours": step, REFERENCE: on_reference(step)}
    mib = {name: memory.peak(call) for name, call in step_of.items()}
    for name, peak in mib.items():
        print(f"{name:<16} {'unknown' if peak is None else f'{peak:.0f} MiB'}")
    return 0
