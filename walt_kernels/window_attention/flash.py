"""Plain windows (no bias, norm, image or context) through flash-attn's variable-length call, where it is installed.

Windows are gathered into one row of tokens ``[tokens, heads, dim]``, the smaller ones at the far edge included, and
``cu_seqlens`` tells where each begins: nothing is padded. A window that is a whole frame needs no copy. flash-attn
differentiates itself, so forward and backward of a call both run on it and its own log-sum-exp is saved between them.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._library import transformed
from .reference import Part, axis_parts, merge, partition

OPT_IN = "no row in benchmarks/results/ shows it to be faster yet, so only where it is forced"
DTYPES = (torch.bfloat16, torch.float16)

Parts = tuple[list[Part], list[Part], list[Part]]

# In order of preference: flash-attn 3, 4 and 2, and the major compute capabilities that each is made for.
GENERATIONS = {
    "flash_attn_interface": (9,),
    "flash_attn.cute": (9, 10, 11),
    "flash_attn": (8, 9, 10, 11, 12),
}
UNTRACEABLE = ("flash_attn.cute",)  # its kernels are no torch ops, which torch.compile would need


functions: dict[str, Callable[..., Any]] = {}  # by module, once loaded: where torch.compile finds them


@functools.cache
def load(module: str) -> str | None:
    """Puts the call of ``module`` into ``functions``, or says why there is none.

    flash-attn is imported when it is first asked for: that takes a while, and a package which was built for another
    torch fails in many ways.
    """
    try:
        functions[module] = importlib.import_module(module).flash_attn_varlen_func
    except ModuleNotFoundError:
        return "not installed"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def find(device: torch.device, tracing: bool) -> tuple[str, str]:
    """The module whose call takes tensors on ``device``, or "" and the reason."""
    if device.type != "cuda":
        return "", f"flash-attn runs on GPUs; this tensor is on {device}"
    if not torch.cuda.is_available():
        return "", "torch sees no GPU here"
    major, minor = (8, 0) if torch.version.hip else torch.cuda.get_device_capability(device)
    reasons = []
    for module, majors in GENERATIONS.items():
        if major not in majors:
            reasons.append(f"{module}: not for compute capability {major}.{minor}")
        elif tracing and module in UNTRACEABLE:
            reasons.append(f"{module}: not under torch.compile")
        elif reason := load(module):
            reasons.append(f"{module}: {reason}")
        else:
            return module, ""
    return "", "; ".join(reasons)


# What torch.compiler.assume_constant_result does; calling it here would import torch._dynamo, and with it Triton.
find._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unsupported(q: Tensor, **inputs: Any) -> str | None:
    """Why flash-attn cannot take these (checked) inputs, or None."""
    for name in ("bias_table", "image", "q_norm", "k_norm", "context_k"):
        if inputs[name] is not None:
            return f"flash-attn knows no {name}"
    if q.dtype not in DTYPES:
        return f"flash-attn computes in bfloat16 and float16; q is {q.dtype}"
    if q.shape[-1] % 8:
        return f"flash-attn needs a multiple of 8 as dim, got {q.shape[-1]}"
    if transformed():
        return "flash-attn has a backward pass only: no forward mode, no torch.func"
    module, reason = find(q.device, torch.compiler.is_compiling())
    return None if module else reason


def parts_of(x: Tensor, window: tuple[int, int, int]) -> Parts:
    t, h, w = (axis_parts(size, extent) for size, extent in zip(x.shape[1:4], window, strict=True))
    return t, h, w


def sizes_of(kind: tuple[Part, ...]) -> tuple[int, int]:
    """How many windows a sample has of this kind, and the tokens of each."""
    (_, nt, t), (_, nh, h), (_, nw, w) = kind
    return nt * nh * nw, t * h * w


def to_tokens(x: Tensor, parts: Parts) -> Tensor:
    """[B, T, H, W, heads, dim] -> [tokens, heads, dim], window after window; a view where a window is a frame."""
    pieces = [partition(x, part).flatten(0, 2) for part in itertools.product(*parts)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def from_tokens(x: Tensor, parts: Parts, batch: int) -> Tensor:
    """The inverse of ``to_tokens``."""
    kinds = list(itertools.product(*parts))
    sizes = [sizes_of(kind) for kind in kinds]
    pieces = x.split([batch * windows * N for windows, N in sizes])
    merged = [
        merge(piece.reshape(batch, *size, *x.shape[1:]), kind)
        for piece, size, kind in zip(pieces, sizes, kinds, strict=True)
    ]
    for axis in (3, 2, 1):
        n = len(parts[axis - 1])
        merged = [torch.cat(merged[i : i + n], axis) if n > 1 else merged[i] for i in range(0, len(merged), n)]
    return merged[0]


def starts(parts: Parts, batch: int, device: torch.device) -> tuple[Tensor, int]:
    """The first token of every window, then the number of tokens, int32; and the most tokens of a window.

    Made on the device: nothing is copied or waited for, so that a CUDA graph may capture it.
    """
    first, longest, rows = 0, 0, []
    for kind in itertools.product(*parts):
        windows, N = sizes_of(kind)
        end = first + batch * windows * N
        rows.append(torch.arange(first, end, N, dtype=torch.int32, device=device))
        first, longest = end, max(longest, N)
    return torch.cat([*rows, torch.arange(first, first + 1, dtype=torch.int32, device=device)]), longest


def window_attention(q: Tensor, k: Tensor, v: Tensor, *, window: Any, scale: float, **_: Any) -> Tensor:
    """Takes inputs that ``unsupported`` has no reason against; differentiable."""
    if q.numel() == 0:  # no window to attend in, yet every input has its (empty) gradient
        return q + k + v
    module = find(q.device, torch.compiler.is_compiling())[0]
    parts, batch = parts_of(q, window), q.shape[0]
    begin, longest = starts(parts, batch, q.device)
    out = functions[module](
        *(to_tokens(x, parts) for x in (q, k, v)),
        cu_seqlens_q=begin,
        cu_seqlens_k=begin,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=False,
        deterministic=True,
    )
    # Generation 4, and early versions of 3, return the log-sum-exp beside the output.
    return from_tokens(out[0] if isinstance(out, tuple) else out, parts, batch)
