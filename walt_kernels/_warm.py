"""``warm``: compiles the Triton kernels of a step in parallel processes, before the first step needs them one by one.

``main`` is what such a process runs: it reads a kernel a line, compiles it into Triton's cache on disk and answers with
a line, empty or what went wrong.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from . import _triton

Progress = Callable[[int, int], None]


def warm(step: Callable[[], object], *, processes: int | None = None, progress: Progress | None = None) -> int:
    """Compiles, in parallel processes, the Triton kernels that ``step()`` would compile one after the other.

    ``step`` is called once, on a GPU, with the model, the shapes and the settings (autocast, ``use_backend``) of the
    run to come: usually a forward and a backward pass. This package's Triton kernels are noted and not run in it, so
    what they would have written is arbitrary: throw away the results and gradients.

    Kernels that are in Triton's cache on disk are not compiled again. Without a GPU, nothing is called.

    >>> warm(lambda: loss(model(x)).backward())
    >>> model.zero_grad()

    Args:
        step: takes nothing.
        processes: how many at most; by default one for every CPU that this process may use. With 0 nothing is compiled:
            for ranks beside one that compiles.
        progress: ``progress(done, total)`` is called at the start and after each kernel; by default a line on stderr
            where that is a terminal.

    Returns:
        The number of kernels that were compiled.
    """
    if not callable(step):
        raise TypeError(f"step is {step!r}, expected a function of no arguments")
    if _triton.reason is not None or _triton.INTERPRET or not torch.cuda.is_available():
        return 0
    collected = Collected()
    with _triton.record(_triton.target(torch.device("cuda")), collected):
        step()
    return compile_all([kernel for kernel in collected.kernels if not kernel.on_disk()], processes, progress)


class Kernel(NamedTuple):
    """One specialisation of a kernel, as Triton's launcher derives it, in plain data."""

    module: str
    name: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    target: tuple[str, int | str, int]

    def source(self) -> tuple[Any, Any]:
        """What Triton compiles, and the target."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        function: Any = importlib.import_module(self.module)
        for name in self.name.split("."):
            function = getattr(function, name)
        return ASTSource(function, self.signature, self.constants, self.attributes), GPUTarget(*self.target)

    def on_disk(self) -> bool:
        """Whether Triton's cache holds it."""
        import hashlib

        from triton._C.libtriton import get_cache_invalidating_env_vars
        from triton.compiler import make_backend
        from triton.runtime.cache import get_cache_key, get_cache_manager

        source, target = self.source()
        backend = make_backend(target)
        options = backend.parse_options(dict(self.options))
        key = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
        file = f"{source.name[:150]}.json"
        return file in (get_cache_manager(hashlib.sha256(key.encode()).hexdigest()).get_group(file) or {})

    def compile(self) -> None:
        """Into Triton's cache, and the launcher where there is a GPU to launch on."""
        from triton.compiler import compile
        from triton.runtime import driver

        source, target = self.source()
        compiled = compile(source, target=target, options=dict(self.options))
        if torch.cuda.is_available():
            driver.active.launcher_cls(compiled.src, compiled.metadata)


class Collected(list[_triton.Launch]):
    """In the place of the launches that ``record`` collects: keeps kernels, and no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.lock = threading.Lock()  # backward passes run in threads of their own

    def append(self, launch: _triton.Launch) -> None:
        from triton import knobs

        with self.lock:
            before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, self.note
            try:
                tile = launch.tile
                launch.kernel.warmup(**launch.arguments, grid=launch.grid, num_warps=tile.warps, num_stages=tile.stages)
            finally:
                knobs.runtime.jit_cache_hook = before

    def note(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Triton's hook before it compiles; True stops it."""
        from triton.runtime import driver

        target = driver.active.get_current_target()
        kernel = Kernel(
            fn.module,
            fn.name,
            compile["signature"],
            compile["constants"],
            compile["configs"][0],
            {name: compile[name] for name in ("num_warps", "num_stages", "num_ctas")},
            (target.backend, target.arch, target.warp_size),
        )
        if kernel not in self.kernels:
            self.kernels.append(kernel)
        return True


def compile_all(kernels: Iterable[Kernel], processes: int | None = None, progress: Progress | None = None) -> int:
    """Compiles all, each in one of some processes; what fails there is left to the first launch, which tells why."""
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    for kernel in kernels:
        with contextlib.suppress(pickle.PicklingError, TypeError, AttributeError):  # has no name elsewhere
            waiting.put(base64.b64encode(pickle.dumps(kernel)) + b"\n")
    total, answers, lock = waiting.qsize(), [], threading.Lock()
    tell = progress or _tell
    if processes is None:
        processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def feed() -> None:
        with contextlib.suppress(OSError, queue.Empty), _compiler() as process:  # OSError: it has died
            assert process.stdin is not None
            assert process.stdout is not None
            while True:
                process.stdin.write(waiting.get_nowait())
                process.stdin.flush()
                answer = process.stdout.readline()
                with lock:
                    answers.append(answer)
                    tell(len(answers), total)

    threads = [threading.Thread(target=feed) for _ in range(min(processes, total))]
    if threads:
        tell(0, total)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers.count(b"\n")


def _compiler() -> subprocess.Popen[bytes]:
    """Not of multiprocessing: what that spawns runs the user's script again."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", f"from {__name__} import main; main()"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _tell(done: int, total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\rcompiling Triton kernels: {done} of {total}" + ("\n" if done == total else ""))
        sys.stderr.flush()


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints is no answer
    for line in sys.stdin.buffer:
        try:
            pickle.loads(base64.b64decode(line)).compile()
            problem = ""
        except Exception as error:  # told again, with its traceback, by the first launch
            problem = f"{type(error).__name__}: {error}".replace("\n", " ")
        out.write(problem + "\n")
        out.flush()
