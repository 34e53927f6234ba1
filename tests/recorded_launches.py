"""What test_launches.py runs in a process whose libcuda.so.1 is recording_driver.c: launches, told as JSON.

The first call of a plan is launched by Triton's JIT. Its repetition is then launched by our module, and by Triton's
launcher, on the same tensors and temporaries.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

from walt_kernels import _dispatch, _launches, _plans, _triton, use_backend
from walt_kernels.testing import sample_call

STREAM = 77
PARAMETERS = 512
BYTES = {"u8": 1, "b8": 1, "u16": 2, "u32": 4, "f32": 4, "u64": 8}


class Record(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("function", ctypes.c_void_p),
        ("count", ctypes.c_int),
        ("bytes", ctypes.c_size_t * PARAMETERS),
        ("memory", (ctypes.c_ubyte * 128) * PARAMETERS),
    ]

    def told(self) -> list[Any]:
        memory = [bytes(self.memory[i])[: self.bytes[i]].hex() for i in range(self.count)]
        return [list(self.grid), list(self.block), self.shared, self.stream, self.function, memory]


recorder = ctypes.CDLL("libcuda.so.1")
recorder.record.restype = ctypes.POINTER(Record)
recorder.declare.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p]


def recorded(run: Any) -> list[Any]:
    recorder.start(0)
    run()
    return [recorder.record(i).contents.told() for i in range(recorder.launches())]


def declare(compiled: Any, drop: int = 0) -> None:
    """Tells the driver what the kernel's parameters are, by its PTX."""
    ptx = compiled.asm["ptx"]
    header = ptx[ptx.index(".entry") :].partition("{")[0]
    found = re.findall(r"\.param(?: \.align \d+)? \.(\w+)[^\n]*?(?:\[(\d+)\])?,?\n", header)
    sizes = [BYTES[kind] * int(count or 1) for kind, count in found]
    sizes = sizes[: len(sizes) - drop]
    recorder.declare(compiled.function, len(sizes), (ctypes.c_size_t * len(sizes))(*sizes))


class Gpu(_plans.Runtime):
    """CPU tensors on the recording driver."""

    def __init__(self) -> None:
        self.current_device = lambda: 0
        self.stream = lambda index: STREAM

    def start(self, launch: _triton.Launch, arguments: dict[str, Any]) -> Any:
        compiled = super().start(launch, arguments)
        declare(compiled)
        return compiled


def call_of(op: str) -> Any:
    arguments: dict[str, Any]
    if op not in _dispatch.ops():  # boxes that overlap, over less memory than they have elements
        op, x = "causal_conv3d", torch.randn(1, 64, 3, 16, 16).bfloat16()
        arguments = {"x": x, "weight": torch.randn(64, 64, 3, 4, 4).bfloat16(), "stride": (1, 2, 2)}
    elif op == "causal_conv3d":  # boxes in temporaries, of tensors which are not left to Triton
        x = torch.randn(1, 64, 5, 32, 32).bfloat16()
        arguments = {"x": x, "weight": torch.randn(64, 64, 3, 3, 3).bfloat16(), "bias": torch.randn(64).bfloat16()}
    else:
        arguments = sample_call(op, "cpu", torch.bfloat16)
    leaves = [value.requires_grad_() for value in arguments.values() if isinstance(value, torch.Tensor)]
    out = _dispatch.op(op).function(**arguments)
    outputs = out if isinstance(out, tuple) else (out,)
    torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])


def plans(op: str) -> dict[str, Any]:
    chosen = _dispatch.backend(op if op in _dispatch.ops() else "causal_conv3d", "triton")
    return {name: next(iter(getattr(chosen, name).plans.values())) for name in ("forward", "backward")}


def compare(op: str, name: str, plan: Any, calls: list[Any]) -> dict[str, Any]:
    """The launches of a plan's repetition, by whom they are made."""
    tensors, addresses = calls
    memory = torch.empty(max(plan.size // 4, 1))
    plan.memory = lambda: memory
    native = plan.native
    by_us = recorded(lambda: plan.run(tensors, list(addresses)))
    plan.native = None
    by_triton = recorded(lambda: plan.run(tensors, list(addresses)))
    plan.native = native
    return {"op": op, "pass": name, "native": native is not None, "ours": by_us, "triton's": by_triton}


def failures(plan: Any, calls: list[Any]) -> dict[str, Any]:
    """What happens without a context, with a driver that refuses, and to a kernel of other parameters."""
    tensors, addresses = calls
    recorder.set_context(0)
    without = plan.native.run([*addresses, 0], STREAM)
    recorder.set_context(1)
    recorder.start(2)
    try:
        plan.run(tensors, list(addresses))
        refused = ""
    except RuntimeError as error:
        refused = str(error)
    finally:
        recorder.start(0)
    declare(plan.steps[0].compiled, drop=1)
    launches = zip(plan.launches, [step.compiled for step in plan.steps], strict=True)
    return {"without context": without, "refused": refused, "fewer parameters": _launches.native(launches) is not None}


def main() -> None:
    active = CudaDriver()
    active.get_current_device = lambda: 0
    active.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    active.get_current_stream = lambda index: STREAM
    driver.set_active(active)
    _plans.Nothing = Gpu
    seen: list[list[Any]] = []
    run = _plans.Plan.run

    def note(plan: Any, tensors: Any, addresses: list[int]) -> None:
        seen.append([tensors, list(addresses)])
        run(plan, tensors, addresses)

    told = []
    for op in sys.argv[1:]:
        with _plans.imagine(_triton.TARGETS["sm_90"]), use_backend("triton"):
            _plans.Plan.run = note
            seen.clear()
            call_of(op)
            _plans.Plan.run = run
            for (name, plan), calls in zip(plans(op).items(), seen, strict=True):
                told.append(compare(op, name, plan, calls))
            if plan.native is not None:
                told[-1] |= failures(plan, calls)
    print(json.dumps(told))


main()
