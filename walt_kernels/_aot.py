"""``python -m walt_kernels aot``: compiles every Triton kernel for every target, without a GPU, and reads its costs.

Each op folder lists calls (``aot_calls`` in triton_aot.py) which together reach all its kernels and tiles. Launches are
recorded as for a target and compiled with the argument types and specialisations a real launch would have. A kernel
fails that spills more registers than its op states in SPILLS (by "kernel" or "kernel, call"; for Triton 3.7,
others may spill more), that needs more shared memory than the target has, whose 16-bit matrix products are not on
tensor cores, whose float32 ones lose digits that were asked for, or that does what is known to go wrong on a GPU
(``_hazards``).
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _dispatch, _triton
from ._define import folders
from ._hazards import hazard
from ._triton import TARGETS, Launch

# What the assembler writes for a product on tensor (or matrix) cores.
TENSOR_CORES = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async|mma\.sync",
    "sm_100": r"tcgen05\.mma|mma\.sync",
    "gfx942": r"v_mfma",
}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.bool: "*u1",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Call:
    """A call to an op with these arguments, forward and backward; no gradient arrives for the outputs ``absent``."""

    name: str
    op: str
    arguments: dict[str, Any]
    absent: tuple[str, ...] = ()

    def run(self) -> None:
        inputs = _dispatch.prepare(self.op, **self.arguments)
        _dispatch.op(self.op).both_passes("triton", inputs, self.absent)


def folders_with_calls() -> list[str]:
    return [folder for folder in folders() if importlib.util.find_spec(f"{__package__}.{folder}.triton_aot")]


Where = tuple[Any, ...]  # the name of an argument, and where in it, if it is a tuple


@dataclass(frozen=True)
class Kernel:
    """One specialisation of a kernel for one target, as plain data that another process can compile."""

    call: str  # the first call that launches it
    module: str
    name: str
    architecture: str
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[Where, Any], ...]
    divisible: tuple[Where, ...]  # arguments that are multiples of 16
    warps: int
    stages: int
    spill_budget: int = 0


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers and spilled bytes of a thread, shared bytes of a program."""

    registers: int
    spilled: int
    shared: int
    products: str  # the instruction that matrix products became, "" without any
    problem: str | None


def specialise(launch: Launch, call: str, architecture: str, spills: dict[str, int]) -> Kernel:
    """Argument types as Triton's launcher would derive them: integers of 1 are constants, multiples of 16 are known.

    So, too, for the items of a tuple, each by itself.
    """
    constants: list[tuple[Where, Any]] = []
    divisible: list[Where] = []

    def kind_of(value: Any, path: Where, constant: bool, aligns: bool) -> Any:
        if isinstance(value, tuple):
            items = [kind_of(item, (*path, i), constant, aligns) for i, item in enumerate(value)]
            return getattr(type(value), "_make", tuple)(items)
        fixed = type(value).__name__ == "constexpr"
        if constant or fixed or value is None or (type(value) is int and value == 1):
            constants.append((path, value.value if fixed else value))
            return "constexpr"
        if aligns and (isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)):
            divisible.append(path)
        if isinstance(value, Tensor):
            return POINTERS[value.dtype]
        if isinstance(value, bool):
            return "u1"
        if isinstance(value, int):
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, float):
            return "fp32"
        assert _triton.is_descriptor(value), value
        return f"tensordesc<{POINTERS[value.base.dtype][1:]}{list(value.block_shape)}>"

    signature = []
    for parameter in launch.kernel.params:
        value = launch.arguments.get(parameter.name, parameter.default)
        aligns = not parameter.do_not_specialize_on_alignment
        signature.append((parameter.name, kind_of(value, (parameter.name,), parameter.is_constexpr, aligns)))
    return Kernel(
        call,
        launch.kernel.fn.__module__,
        launch.kernel.fn.__name__,
        architecture,
        tuple(signature),
        tuple(constants),
        tuple(divisible),
        launch.tile.warps,
        launch.tile.stages,
        spills.get(f"{launch.kernel.fn.__name__}, {call}", spills.get(launch.kernel.fn.__name__, 0)),
    )


def kernels(folder: str, architectures: Iterable[str]) -> Iterator[Kernel]:
    """Every distinct kernel that the calls of an op's folder launch."""
    module = importlib.import_module(f"{__package__}.{folder}.triton_aot")
    seen = set()
    for architecture in architectures:
        for call in module.aot_calls():
            with _triton.record(TARGETS[architecture]) as launches:
                call.run()
            # The strips of one call that differ only in which offsets are multiples of 16 count as one kernel.
            parts: dict[Kernel, Kernel] = {}
            for launch in launches:
                kernel = specialise(launch, call.name, architecture, module.SPILLS)
                parts.setdefault(replace(kernel, divisible=()), kernel)
            for kernel in parts.values():
                identity = replace(kernel, call="", spill_budget=0)
                if identity not in seen:
                    seen.add(identity)
                    yield kernel


def compile_kernel(kernel: Kernel) -> Resources:
    """Compiles for the kernel's target and reads the result; ``problem`` says what is wrong with it, if anything is."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    function = getattr(importlib.import_module(kernel.module), kernel.name)

    def place(path: Where) -> tuple[int, ...]:
        return function.arg_names.index(path[0]), *path[1:]

    attributes = {place(path): [["tt.divisibility", 16]] for path in kernel.divisible}
    constants = {place(path): value for path, value in kernel.constants}
    source = ASTSource(function, dict(kernel.signature), constants, attributes)
    number = kernel.architecture.removeprefix("sm_")
    target = GPUTarget("cuda", int(number), 32) if number.isdigit() else GPUTarget("hip", kernel.architecture, 64)
    try:
        compiled = compile(source, target=target, options={"num_warps": kernel.warps, "num_stages": kernel.stages})
    except Exception as error:  # whatever stops a compiler is that kernel's line in the table
        return Resources(0, 0, 0, "", f"does not compile: {str(error).strip().splitlines()[-1]}")
    assembly = compiled.asm["ptx"] if number.isdigit() else compiled.asm["amdgcn"]
    registers, spilled = _cubin_usage(compiled.asm["cubin"]) if number.isdigit() else _amd_usage(assembly)
    found = re.search(TENSOR_CORES[kernel.architecture], assembly)
    shared = compiled.metadata.shared
    problem = None
    if spilled > kernel.spill_budget:
        problem = f"spills {spilled} bytes, budget {kernel.spill_budget}"
    elif shared > TARGETS[kernel.architecture].shared_bytes:
        problem = f"needs {shared} bytes of shared memory of {TARGETS[kernel.architecture].shared_bytes}"
    elif "tt.dot" in compiled.asm["ttir"] and not found and _narrow(compiled.asm["ttir"]):
        problem = "its products are not on tensor cores"
    elif "tf32" in assembly and _full_precision(compiled.asm["ttir"]):
        problem = "its float32 products were made tf32 ones"
    elif number.isdigit() and (found_hazard := hazard(compiled.asm["ttir"], kernel.stages)):
        problem = found_hazard
    return Resources(registers, spilled, shared, found[0] if found else "", problem)


def _narrow(ttir: str) -> bool:
    """Whether a product has 16-bit operands: float32 ones at full precision have no tensor cores on NVIDIA GPUs."""
    return re.search(r"tt\.dot .*: tensor<[0-9x]*(bf16|f16)", ttir) is not None


def _full_precision(ttir: str) -> bool:
    """Whether a product of float32 operands was asked for in full ("ieee", which the text leaves out)."""
    products = re.findall(r"tt\.dot .*: tensor<[0-9x]*f32", ttir)
    return any("inputPrecision = tf32" not in product for product in products)


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(found[1]), max(int(found[2]), int(found[3]))


def _amd_usage(assembly: str) -> tuple[int, int]:
    def field(name: str) -> int:
        return sum(int(value) for value in re.findall(rf"\.{name}:\s+(\d+)", assembly))

    return field("vgpr_count"), field("private_segment_fixed_size")


def check(ops: Iterable[str], architectures: Iterable[str], jobs: int) -> Iterator[tuple[str, Kernel, Resources]]:
    """Compiles everything; yields op, kernel and what it takes, in order."""
    work = [(op, kernel) for op in ops for kernel in kernels(op, architectures)]
    # Spawned: a forked copy of a process that runs threads may hang.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = pool.map(compile_kernel, [kernel for _, kernel in work])
        for (op, kernel), resources in zip(work, results, strict=True):
            yield op, kernel, resources


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m walt_kernels aot", description=__doc__.splitlines()[0].split(": ")[1])
    found = folders_with_calls()
    parser.add_argument("--op", choices=found, action="append", help="default: all")
    parser.add_argument("--arch", choices=list(TARGETS), action="append", help="default: all")
    parser.add_argument("--quiet", action="store_true", help="print only kernels that fail, and the sums")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    if _triton.reason is not None:
        print(_triton.reason)
        return 1
    if _triton.INTERPRET:
        print("TRITON_INTERPRET=1 runs kernels in Python; unset it to compile them")
        return 1
    width = "{:<17} {:<28} {:<7} {:>5} {:>6} {:>6} {:>7}  {:<16} {}"
    if not options.quiet:
        print(width.format("op", "kernel", "target", "warps", "regs", "spills", "shared", "products", "first call"))
    failed = total = 0
    for op, kernel, used in check(options.op or found, options.arch or list(TARGETS), options.jobs):
        total += 1
        failed += used.problem is not None
        row = (op, kernel.name, kernel.architecture, kernel.warps, used.registers, used.spilled, used.shared)
        if used.problem or not options.quiet:
            call = kernel.call + (f"  FAILS: {used.problem}" if used.problem else "")
            print(width.format(*row, used.products or "-", call))
    print(f"{total} kernels with Triton {metadata.version('triton')}, {failed} of them fail")
    return int(failed > 0)
