"""Models of other libraries before and after ``walt_kernels.integrations.accelerate``: time and peak memory.

Weights are random, channels those of the published models; on a CPU frames are small and few. Outputs and gradients of
both are compared before any time is taken; then both take turns. Peak memory is what a call adds to model and inputs,
on a CPU in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from walt_kernels import testing
from walt_kernels.integrations import accelerate, stream_decode, stream_encode

from . import memory
from .case import MODES
from .contender import first_line, step
from .machine import RESULTS, level, machine, sentence
from .report import mean, table_head, table_row
from .say import say
from .timing import interleaved

Row = dict[str, Any]

DTYPES = ("float32", "bfloat16")
WIDE = {torch.float32: torch.float64, torch.bfloat16: torch.float32}  # what the truth of a dtype is computed in
LEAST = 0.97  # times as fast as before: what is slower should have been left alone
CHECKED = 2**20  # values of the largest parameter whose gradient is compared: the truth of all would not fit in memory


def accelerated(module: nn.Module) -> tuple[nn.Module, str]:
    report = accelerate(module)
    return module, f"{len(report.replaced)} replaced, {len(report.left)} left"


@dataclass(frozen=True)
class Model:
    """``make`` gives the module, ``run`` calls it on normal numbers of ``shape``. All can be sent to a process.

    ``change`` gives what runs after, and what it did. One that is ``streamed`` goes through a clip in chunks, and has
    no gradients. One that is ``compiled`` is measured under torch.compile, too, without the change.
    """

    name: str
    make: Callable[[], nn.Module]
    run: Callable[[nn.Module, Tensor], Tensor]
    shape: tuple[int, ...]
    quick: bool = False
    streamed: bool = False
    change: Callable[[nn.Module], tuple[nn.Module, str]] = accelerated
    channels_last: bool = False
    compiled: bool = False

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES[:1] if self.streamed else MODES

    @property
    def ways(self) -> tuple[str, ...]:
        return ("before", "compiled", "after") if self.compiled else ("before", "after")


def make(path: str, *arguments: Any, **options: Any) -> Any:
    """An instance of "package.module.Class"."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)(*arguments, **options)


def encode(vae: Any, video: Tensor) -> Tensor:
    latent: Tensor = vae.encode(video).latent_dist.mode()
    return latent


def decode(vae: Any, latent: Tensor) -> Tensor:
    video: Tensor = vae.decode(latent).sample
    return video


def encode_streamed(vae: nn.Module, video: Tensor) -> Tensor:
    return torch.cat(list(stream_encode(vae, video)), 2)


def decode_streamed(vae: nn.Module, latent: Tensor) -> Tensor:
    return torch.cat(list(stream_decode(vae, latent)), 2)


def autoencoder(
    name: str,
    frames: int,
    size: int,
    latent: tuple[int, ...],
    quick: bool = False,
    streams: bool = False,
    **config: Any,
) -> list[Model]:
    """diffusers' ``AutoencoderKL<name>``; ``latent`` is [C, T, H, W]. One that ``streams`` does so, too."""
    made = partial(make, f"diffusers.AutoencoderKL{name}", **config)
    found = [
        Model(f"{name} encode, {frames}x{size}x{size}", made, encode, (1, 3, frames, size, size)),
        Model(f"{name} decode, {frames}x{size}x{size}", made, decode, (1, *latent), quick),
    ]
    if streams:
        channels, steps, *sides = latent
        longer = f"{4 * frames - 3}x{size}x{size}, streamed"
        found += [
            Model(f"{name} encode, {longer}", made, encode_streamed, (1, 3, 4 * frames - 3, size, size), streamed=True),
            Model(
                f"{name} decode, {longer}", made, decode_streamed, (1, channels, 4 * steps - 3, *sides), streamed=True
            ),
        ]
    return found


def run_cosmos(block: nn.Module, x: Tensor) -> Tensor:
    B, _, D = x.shape
    text, time, modulation = (testing.random(B, *size, grad=False).to(x) for size in ((512, 1024), (D,), (3 * D,)))
    y: Tensor = block(x, text, time, modulation)
    return y


def run_dit(block: nn.Module, x: Tensor) -> Tensor:
    labels = torch.arange(len(x), device=x.device)
    y: Tensor = block(x, timestep=labels, class_labels=labels)
    return y


def make_swin() -> nn.Module:
    """Of its six blocks three shift their windows."""
    stage: nn.Module = make(
        "transformers.models.swin.modeling_swin.SwinStage",
        make("transformers.SwinConfig", attn_implementation="sdpa"),  # what its models are loaded with
        *(384, (14, 14), 6, 12, [0.0] * 6, None),
    )
    return stage


def run_swin(stage: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = stage(x, (14, 14))[0]
    return y


def models(device: str) -> list[Model]:
    gpu = device == "cuda"
    T, t, size = (17, 5, 256) if gpu else (5, 2, 64)
    large = 2 * size  # for those that make patches of 4x4 pixels first
    cosmos = partial(make, "diffusers.models.transformers.transformer_cosmos.CosmosTransformerBlock", 16, 128, 1024)
    dit = partial(
        make,
        "diffusers.models.attention.BasicTransformerBlock",
        *(1152, 16, 72),
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
        attention_bias=True,
        activation_fn="gelu-approximate",
    )
    return [
        *autoencoder("Wan", T, size, (16, t, size // 8, size // 8), quick=True, streams=True),
        *autoencoder("CogVideoX", T, size, (16, t, size // 8, size // 8)),
        *autoencoder("HunyuanVideo", T, size, (16, t, size // 8, size // 8)),
        *autoencoder("Cosmos", T, large, (16, t, large // 8, large // 8), quick=True, temporal_compression_ratio=4),
        *autoencoder("LTXVideo", T, large, (128, t, large // 32, large // 32)),
        Model("Cosmos 2 B block", cosmos, run_cosmos, (1, 8192 if gpu else 512, 2048)),
        Model("DiT-XL/2 block", dit, run_dit, (64 if gpu else 2, 256, 1152), quick=True),
        Model("Swin-T stage 3", make_swin, run_swin, (128 if gpu else 4, 196, 384), quick=True),
    ]


def build(model: Model, dtype: torch.dtype, device: str, way: str) -> tuple[nn.Module, Tensor, str]:
    """The module and its input, always the same numbers, and what the change did."""
    torch.manual_seed(0)
    module = model.make().eval()
    with torch.no_grad():
        for parameter in module.parameters():  # none is zero
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    module.to(device, dtype)
    x = testing.random(*model.shape, grad=False).to(device, dtype)
    if model.channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    changed = ""
    if way == "compiled":
        torch._dynamo.reset()
        module.compile(dynamic=False)
    elif way == "after":
        module, changed = model.change(module)
    return module, x.requires_grad_(), changed


def calls(model: Model, module: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """A call of each mode, after a first one; backward gives the gradients of x and of the parameters that have one."""
    if model.streamed:
        return {mode: step(lambda x: model.run(module, x), {"x": x}, mode) for mode in model.modes}
    inputs = {"x": x, **dict(module.named_parameters())}
    y = model.run(module, x)  # asked as below: the first gradients of given cotangents import what fills 34 MiB
    found = torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y), allow_unused=True)
    used = {name: value for (name, value), grad in zip(inputs.items(), found, strict=True) if grad is not None}
    made = {mode: step(lambda x, **_: model.run(module, x), used, mode) for mode in MODES}
    if model.compiled:
        for call in made.values():  # what compiles does so now
            call()
    return made


def check(model: Model, dtype: torch.dtype, device: str) -> float:
    """The largest error ratio of the output and the gradients, at most 1; AssertionError where it is more."""

    def results(kind: torch.dtype, way: str) -> tuple[dict[str, Tensor], int]:
        module, x, _ = build(model, dtype, device, way)
        module.to(kind)
        x = testing.leaf(x.detach().to(kind).requires_grad_())
        y = model.run(module, x)
        terms = max(p[0].numel() for p in module.parameters() if p.dim() > 1)
        if model.streamed:
            return {"output": y.detach()}, terms
        cotangent = testing.random(*y.shape, grad=False).to(device, dtype).to(y)
        wanted = [x, *(p for p in module.parameters() if p.numel() <= CHECKED)]
        grad_x, *gradients = torch.autograd.grad(y, wanted, cotangent, allow_unused=True)
        flat = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
        return {"output": y.detach(), "gradient of the input": grad_x, "gradients of the parameters": flat}, terms

    (truth, terms), (yardstick, _), (own, _) = (
        results(*side) for side in ((WIDE[dtype], "before"), (dtype, "before"), (dtype, "after"))
    )
    rows = terms if dtype is torch.float32 else 1  # as of an op alone: rounding grows with the longest sum
    ratios = []
    for name in own:
        k = testing.K_FORWARD if name == "output" else testing.K_BACKWARD
        ratios.append(testing.compare(name, own[name], truth[name], yardstick[name], k=k, rows=rows))
    return max(ratios)


def peaks(model: Model, dtype: torch.dtype, device: str, way: str) -> dict[str, float | None]:
    """MiB of a call by mode."""
    module, x, _ = build(model, dtype, device, way)
    return {mode: memory.peak(call, device) for mode, call in calls(model, module, x).items()}


def peaks_apart(model: Model, dtype: torch.dtype, device: str, way: str) -> dict[str, float | None]:
    """The same in a new process, for what a CPU's allocator and libraries keep is not to count for the next one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peaks, model, dtype, device, way).result()


def rows_of(model: Model, dtype: torch.dtype, device: str, seconds: float) -> Iterator[Row]:
    """One row a mode. What gives another result is an AssertionError and has no time."""
    error_ratio = check(model, dtype, device)
    measured = peaks if device == "cuda" else peaks_apart
    mib = {way: measured(model, dtype, device, way) for way in model.ways}
    ways, kept = {}, {}
    for way in model.ways:
        module, x, changed = build(model, dtype, device, way)
        ways[way] = calls(model, module, x)
        if not model.streamed:
            kept[way] = memory.kept(lambda module=module, x=x: model.run(module, x))
    for mode in model.modes:
        times = interleaved({name: made[mode] for name, made in ways.items()}, device=device, seconds=seconds)
        ms = {name: value.p50 for name, value in times.items()}
        yield {
            "model": model.name,
            "mode": mode,
            "dtype": str(dtype).removeprefix("torch."),
            "ms": ms,
            "speedup": ms["before"] / ms["after"],
            "mib": {name: peak[mode] for name, peak in mib.items()},
            "kept": kept if mode == "forward+backward" else {},
            "replaced": changed,
            "error_ratio": error_ratio,
        }


def line(row: Row) -> str:
    ms = " -> ".join(f"{value:9.1f}" for value in row["ms"].values())
    return (
        f"{row['model']:<46} {row['mode']:<17} {row['dtype']:<9} {ms} ms, {row['speedup']:.2f}x; "
        f"{mebibytes(row['mib'])} MiB; {row['replaced']}"
    )


def mebibytes(ways: dict[str, float | None], between: str = " -> ") -> str:
    """Memory of all ways in one cell."""
    return between.join("unknown" if mib is None else f"{mib:.0f}" for mib in ways.values())


def table(rows: list[Row]) -> str:
    """All rows as Markdown."""
    ways = rows[0]["ms"]
    lines = table_head(["model", "mode", "dtype", *(f"ms {way}" for way in ways), "speedup", "peak MiB", "modules"])
    for row in rows:
        values = [row["model"], row["mode"], row["dtype"], *(f"{row['ms'][way]:.1f}" for way in ways)]
        lines.append(table_row([*values, f"{row['speedup']:.2f}x", mebibytes(row["mib"]), row["replaced"]]))
    return "\n".join(lines)


def summary(rows: list[Row]) -> list[str]:
    """For every dtype and mode: geometric mean and lowest speed-up, the decoders' peaks; then what became slower."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["dtype"], row["mode"]), []).append(row)
    lines = []
    for (dtype, mode), group in groups.items():
        speedups = [row["speedup"] for row in group]
        text = f"{dtype}, {mode}: geometric mean {mean(speedups):.2f}x, lowest {min(speedups):.2f}x"
        decoders = [row["mib"] for row in group if "decode" in row["model"] and all(row["mib"].values())]
        shares = [mib["after"] / mib["before"] for mib in decoders]
        lines.append(text + (f"; decoders' peak memory {mean(shares):.0%} of before" if shares else ""))
    return lines + [f"slower: {line(row)}" for row in rows if row["speedup"] < LEAST]


def parser_of(command: str, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {command}", description=description)
    parser.add_argument("--case", metavar="NAME", help=f"only {command} whose name contains this text")
    parser.add_argument("--dtype", choices=DTYPES, help="only this dtype")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help=f"fewer {command}, shorter runs, no torch.compile")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=RESULTS,
        metavar="FILE",
        help="write the rows and the machine here; without FILE to benchmarks/results/, named by the machine",
    )
    parser.set_defaults(command=command)
    return parser


def main(arguments: list[str]) -> int:
    parser = parser_of("models", __doc__)
    options = parser.parse_args(arguments)
    _, failed = measure(parser, options, models(options.device))
    return failed


def measure(
    parser: argparse.ArgumentParser, options: argparse.Namespace, listed: list[Model], seconds: float = 2.0
) -> tuple[list[Row], int]:
    """The rows of what the options ask for, which are written and printed, and the exit status."""
    seconds = seconds / 4 if options.quick else seconds
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    existing = [replace(m, compiled=False) if options.quick else m for m in listed if m.quick or not options.quick]
    chosen = [model for model in existing if (options.case or "") in model.name]
    if not chosen:
        parser.error(
            f"--case {options.case!r} matches nothing; {options.command}: {', '.join(m.name for m in existing)}"
        )
    for library in ("DIFFUSERS", "TRANSFORMERS"):  # what they warn of at every cast
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    where = machine(options.device)
    say(sentence(where))
    rows: list[Row] = []
    wrong, left_out = [], []
    for name in [options.dtype] if options.dtype else DTYPES:
        for model in chosen:
            try:
                for row in rows_of(model, getattr(torch, name), options.device, seconds):
                    rows.append(row)
                    say(line(row))
            except AssertionError as error:
                wrong.append(f"{model.name}, {name}: another result, not timed: {error}")
            except (ImportError, RuntimeError) as error:  # a library or an operation of PyTorch's in this dtype
                left_out.append(f"{model.name}, {name}: does not run: {first_line(error)}")
    if path := options.json:
        if path == RESULTS:
            path /= f"{options.command}-{level(options.device)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")
    if rows:
        print("\n".join([table(rows), *summary(rows)]))
    for text in wrong + left_out:
        print(text)
    return rows, 1 if wrong or not rows else 0
