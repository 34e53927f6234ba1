"""``python -m benchmarks.gpu_models transformer default``: one training step of a whole L model, in bfloat16 autocast.

The transformer takes 16 samples, a quarter of them images, and the tokenizer one clip of 17x128x128; forward, a mean of
squares, backward, no optimizer. On the backends that the ops choose ("default"), so with each block compiled
("compiled") and recorded as a CUDA graph ("graphs"), or with all ops on one. A line of JSON says what a step takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.presets import PRESETS
from walt.train.objective import compile_blocks
from walt_kernels import use_backend

MODELS = ("transformer", "tokenizer")
BACKENDS = ("default", "reference")
COMPILED = {"compiled": "default", "graphs": "reduce-overhead"}  # torch.compile's modes, on the default backends
STEPS = 8

Forward = Callable[[], Tensor]


def transformer(preset: str, batch: int, device: str) -> tuple[nn.Module, Forward]:
    config = PRESETS[preset][1]
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():  # at first the modulations are zero
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.to(device).train()
    latent = torch.randn(batch, config.latent_channels, *config.latent_size).to(device)
    inputs = {"label": torch.arange(batch) % config.classes, "image": torch.arange(batch) >= batch - batch // 4}
    inputs = {name: value.to(device) for name, value in inputs.items()}
    if config.self_condition:
        inputs["self_condition"] = torch.randn_like(latent)
    steps = torch.randint(0, 1000, (batch,)).to(device)
    return model, lambda: model(latent, steps, **inputs)


def tokenizer(preset: str, batch: int, device: str) -> tuple[nn.Module, Forward]:
    model = Tokenizer(PRESETS[preset][0]).to(device).train()
    frames, size = (17, 128) if preset == "L" else (5, 16)
    video = torch.randn(batch, 3, frames, size, size).to(device, memory_format=torch.channels_last_3d)
    return model, lambda: model.decode(model.encode(video))


def measure(which: str, backend: str, preset: str, device: str, ahead: bool = False) -> dict[str, Any]:
    """Milliseconds of a step, of its forward pass without gradients, and of the host alone; MiB at the peak."""
    torch.manual_seed(0)
    batch = 1 if which == "tokenizer" else 16
    model, forward = {"transformer": transformer, "tokenizer": tokenizer}[which](preset, batch, device)
    if backend in COMPILED:
        compile_blocks(model, COMPILED[backend])
    chosen = backend in ("default", *COMPILED)
    forced = contextlib.nullcontext if chosen else lambda: use_backend(backend)

    def run() -> Tensor:
        with forced(), torch.autocast(device, torch.bfloat16):
            return forward()

    def step() -> Tensor:
        if backend == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        loss = run().float().square().mean()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
        return loss.detach()

    def milliseconds(call: Callable[[], object], waits: bool = True) -> float:
        synchronize(device)
        start = time.perf_counter()
        call()
        if waits:
            synchronize(device)
        return (time.perf_counter() - start) * 1e3

    first = milliseconds(step)
    if ahead:
        return {"first_ms": first}
    for _ in range(2):
        loss = step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [milliseconds(step) for _ in range(STEPS)]
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    with torch.no_grad():
        run()
        inference = statistics.median(milliseconds(run) for _ in range(STEPS))
    return {
        "model": which,
        "preset": preset,
        "backend": backend,
        "loss": loss.item(),
        "first_ms": first,
        "step_ms": statistics.median(times),
        "least_ms": min(times),
        "host_ms": milliseconds(step, waits=False),
        "forward_ms": inference,
        "peak_memory": peak,
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def line(found: dict[str, Any]) -> str:
    memory = "" if found["peak_memory"] is None else f", {found['peak_memory'] / 1024:.1f} GiB at the peak"
    return (
        f"{found['preset']} {found['model']}, {found['backend']}: step {found['step_ms']:.1f} ms, of which the host "
        f"takes {found['host_ms']:.1f}; forward {found['forward_ms']:.1f} ms{memory}; "
        f"first step {found['first_ms'] / 1e3:.1f} s; loss {found['loss']:.5f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_models", description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("backend", help="default, compiled, graphs, or the name of a backend")
    parser.add_argument("--preset", default="L")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ahead", action="store_true", help="only the first step, which compiles")
    options = parser.parse_args()
    found = measure(options.model, options.backend, options.preset, options.device, options.ahead)
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
