"""Which backend runs an op: ``explain`` tells, ``select`` decides, ``use_backend`` forces.

Every op has a list of backends in order of preference. A backend says why it cannot take a call, or None. The choice
is made once, in the op's public function, for forward and backward of the call. On a GPU the op's table of what was
measured there has the first word (see ``_defaults``).
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import _checkpoint
from ._defaults import Defaults, Fastest, architecture

BACKENDS = ("cuda", "flash", "triton", "cudnn", "onednn", "cpu", "reference")


@dataclass(frozen=True)
class Backend:
    """One way to run an op. Its functions are called by name.

    ``unsupported(**inputs)`` returns the reason why it cannot take these (checked) inputs, or None. Without a
    ``backward``, PyTorch differentiates what ``forward(**inputs)`` returns. With one, both write into the memory that
    they are given (see ``define_op``). An ``opt_in`` backend is only used when it is forced or the op's table names it,
    and so is one for the inputs of which ``behind(**inputs)`` says why another one is faster.
    """

    name: str
    unsupported: Callable[..., str | None]
    forward: Callable[..., Any]
    backward: Callable[..., None] | None = None
    opt_in: str | None = None  # why it is not a default
    behind: Callable[..., str | None] | None = None

    def reason(self, **inputs: Any) -> str | None:
        """Why it would not be chosen for these inputs, or None."""
        return self.unsupported(**inputs) or self.opt_in or (self.behind(**inputs) if self.behind else None)

    @property
    def differentiable(self) -> bool:
        """Whether PyTorch differentiates it."""
        return self.backward is None


class Op(NamedTuple):
    """A public op: what users call, and ``check``, which returns the inputs of a call as the backends take them.

    ``sample(tensor, batch)`` returns the arguments of a small, typical call, by name: ``tensor(*shape)`` makes one.
    ``both_passes(backend, inputs)`` runs a backend's kernels past torch's dispatcher, so on tensors without memory too.
    """

    function: Callable[..., Any]
    check: Callable[..., dict[str, Any]]
    backends: tuple[Backend, ...]
    sample: Callable[[Callable[..., torch.Tensor], int], dict[str, Any]]
    both_passes: Callable[..., None]
    defaults: Defaults | None = None


_ops: dict[str, Op] = {}
_warned: set[str] = set()


class _Thread(threading.local):
    """The backends that are forced by the blocks that are open in this thread, the latest last.

    No contextvar, which torch.compile does not read; and no attribute of the class, of which it sees no change.
    """

    def __init__(self) -> None:
        self.blocks: list[str | None] = [os.environ.get("WALT_KERNELS_BACKEND") or None]


_thread = _Thread()


def forced() -> str | None:
    """The backend that is forced in this thread."""
    return _thread.blocks[-1]


if forced() is not None and forced() not in BACKENDS:
    raise ValueError(f"WALT_KERNELS_BACKEND is {forced()!r}, expected one of {', '.join(BACKENDS)}")


def register(name: str, op: Op) -> None:
    _ops[name] = op


def ops() -> tuple[str, ...]:
    """Names of all ops, in order of registration."""
    return tuple(_ops)


def op(name: str) -> Op:
    if name not in _ops:
        raise ValueError(f"op is {name!r}, expected one of {', '.join(_ops)}")
    return _ops[name]


def backend(op: str, name: str) -> Backend:
    for candidate in _ops[op].backends:
        if candidate.name == name:
            return candidate
    raise ValueError(f"{op} has no backend {name!r}; it has {', '.join(b.name for b in _ops[op].backends)}")


def prepare(name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Checks the arguments of a call to an op and returns its inputs as the backends take them."""
    return op(name).check(*args, **kwargs)


def _fastest(op: str, inputs: Mapping[str, Any]) -> tuple[str, Fastest] | None:
    """The class of inputs, the first of which is a tensor, and what the op's table says of it; None where its backend
    cannot run.
    """
    defaults = _ops[op].defaults
    if defaults is None:
        return None
    table = defaults.fastest.get(architecture(next(iter(inputs.values())).device))
    kind = None if table is None else defaults.classify(**inputs)
    if table is None or kind is None or kind not in table:
        return None
    found = table[kind]
    return (kind, found) if backend(op, found.backend).unsupported(**inputs) is None else None


def reasons(op: str, inputs: Mapping[str, Any]) -> dict[str, str | None]:
    """For every backend of ``op``, in order of preference: why it would not be chosen for ``inputs``, or None."""
    backends, fastest = _ops[op].backends, _fastest(op, inputs)
    if fastest is None:
        return {b.name: b.reason(**inputs) for b in backends}
    kind, (name, row) = fastest
    slower = f"{name} is the fastest for calls of the class {kind!r} ({row})"
    return {b.name: None if b.name == name else b.unsupported(**inputs) or slower for b in backends}


def select(op: str, inputs: Mapping[str, Any]) -> str:
    """What ``backend`` takes for a call of ``op`` on checked ``inputs``: the forced backend, or that of the op's table,
    or the first with no reason not to."""
    name = forced()
    if name is not None:
        reason = backend(op, name).unsupported(**inputs)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {name!r} was forced and cannot run: {reason}")
        return name
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():  # whose file knows PyTorch's ops only
        return "reference"
    fastest = _fastest(op, inputs)
    if fastest is not None:
        return fastest[1].backend
    name = _first(op, inputs)
    if name == "reference" and not torch.compiler.is_compiling():
        _warn_about_reference(op, inputs)
    return name


def _first(op: str, inputs: Mapping[str, Any]) -> str:
    for candidate in _ops[op].backends:
        if candidate.opt_in is None and candidate.reason(**inputs) is None:  # in this order: reasons cost time
            return candidate.name
    raise AssertionError(f"{op}: the reference backend refused its inputs")


def _warn_about_reference(op: str, inputs: Mapping[str, Any]) -> None:
    on_gpu = any(isinstance(value, torch.Tensor) and value.is_cuda for value in inputs.values())
    if on_gpu and op not in _warned:
        _warned.add(op)
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons(op, inputs).items() if reason)
        why = why or "it has no kernels"
        warnings.warn(f"{op} runs on the PyTorch reference for a CUDA tensor ({why})", stacklevel=4)


def explain(op: str, *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """Says which backend a call would run on, and why not the others.

    Takes the name of a public op and the arguments of a call to it. Returns, in order of preference, each backend's
    reason for not running; the first backend whose reason is None is the one that runs (unless ``use_backend`` or
    WALT_KERNELS_BACKEND forces another). Raises what the call itself would raise on bad arguments.

    >>> explain("adaln_modulate", x, shift, scale)
    {'cpu': None, 'reference': None}
    """
    return reasons(op, prepare(op, *args, **kwargs))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces every op called inside the block onto one backend; one that cannot run raises its reason.

    The setting is the thread's: threads that are started inside have their own, and a block that is suspended (in a
    generator, a coroutine) holds for what runs meanwhile. Backward passes run on the backend of their forward pass, and
    so does what ``torch.utils.checkpoint`` runs again in a backward pass.
    """
    if name not in BACKENDS:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(BACKENDS)}")
    with _forcing(name):
        yield


@contextlib.contextmanager
def _forcing(name: str | None) -> Iterator[None]:
    blocks = _thread.blocks  # also when the block is left in another thread
    blocks.append(name)
    try:
        yield
    finally:
        del blocks[len(blocks) - 1 - blocks[::-1].index(name)]  # not always the last: coroutines leave in any order


def _bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under the setting of this moment, in whatever thread it is called."""
    name = forced()

    def bound(*args: Any, **kwargs: Any) -> Any:
        with _forcing(name):
            return function(*args, **kwargs)

    return bound


_checkpoint.keep_setting(_bound)
