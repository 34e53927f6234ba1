"""Formulas as they are printed, against the op: README's "The four ops", docstrings, a function of docs/ops.md."""

from __future__ import annotations

import doctest
import inspect
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import walt_kernels
from walt_kernels import (
    adaln_lora,
    adaln_modulate,
    adaln_residual,
    adaln_residual_modulate,
    causal_conv3d,
    next_history,
    video_norm,
    window_attention,
)
from walt_kernels.window_attention.reference import bias_of

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README.partition("## The four ops")[2].partition("\n## ")[0], re.S)
DTYPES = [torch.float64, torch.float32]


def draw(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def run(code: str, **names: Any) -> dict[str, Any]:
    """The names after the code, which finds those that its text takes for granted."""
    names |= {"torch": torch, "F": F, "sqrt": math.sqrt}
    exec(code, names)
    return names


def readme(op: str, **names: Any) -> dict[str, Any]:
    """What README's block about an op, the first paragraph before it that begins in bold, comes to."""
    (block,) = [block for block in BLOCKS if README.partition(block)[0].rpartition("\n**")[2].startswith(f"`{op}(")]
    return run(block, **names)


def docstring(op: Callable[..., Any]) -> str:
    return inspect.getdoc(op) or ""


def formulas(op: Callable[..., Any]) -> list[str]:
    """The assignments among what an op's docstring has in double backquotes, before its arguments."""
    return re.findall(r"``(\w[^`]* = [^`]*)``", docstring(op).partition("Args:")[0])


def close(actual: Any, expected: Any) -> None:
    exact = {"rtol": 1e-10, "atol": 1e-10}  # far below what another eps would change
    wide = all(tensor.dtype == torch.float64 for tensor in ([expected] if isinstance(expected, Tensor) else expected))
    torch.testing.assert_close(actual, expected, **(exact if wide else {}))


def test_every_block_of_readme_is_of_an_op_that_is_tested_here() -> None:
    assert len(BLOCKS) == 4
    for block in BLOCKS:
        op = re.match(r"`(\w+)\(", README.partition(block)[0].rpartition("\n**")[2])
        assert op is not None
        assert f"readme({op[1]!r}".replace("'", '"') in Path(__file__).read_text()


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_conv3d(dtype: torch.dtype) -> None:
    B, C, H, W, kt, kh, kw = 2, 3, 5, 6, 3, 3, 5
    x, weight, bias = draw(dtype, B, C, 4, H, W), draw(dtype, 2, C, kt, kh, kw), draw(dtype, 2)
    names = readme("causal_conv3d", B=B, C=C, H=H, W=W, kt=kt, kh=kh, kw=kw, x=x, weight=weight, bias=bias)
    close(causal_conv3d(x, weight, bias), names["y"])


class Padded:
    """A video that is zero outside."""

    def __init__(self, video: Tensor) -> None:
        self.video = video

    def __getitem__(self, place: tuple[int, ...]) -> Tensor | float:
        inside = all(0 <= index < size for index, size in zip(place, self.video.shape, strict=True))
        return self.video[place] if inside else 0.0


def test_the_sum_of_causal_conv3d() -> None:
    st, sh, sw, dt, dh, dw, top, left = 2, 1, 2, 1, 2, 1, 1, 2
    kt, kh, kw = 2, 2, 3
    x, weight, bias = (draw(torch.float64, *shape) for shape in [(1, 2, 4, 4, 5), (2, 2, kt, kh, kw), (2,)])
    y = causal_conv3d(x, weight, bias, stride=(st, sh, sw), dilation=(dt, dh, dw), padding=((top, 1), (left, 0)))
    found = re.search(r"y\[([\w, ]+)\] = (.*) \+ sum over ([\w, ]+) of\n +(.*)\n", docstring(causal_conv3d))
    assert found is not None
    outside, start, inside, term = found.groups()
    assert (outside, inside) == ("b, o, i, h, w", "c, j, u, v")
    formula = compile(f"{start} + sum({term} for {inside} in taps)", "docstring", "eval")
    taps = list(itertools.product(*map(range, weight.shape[1:])))
    names = {"x": Padded(x), "weight": weight, "bias": bias, "taps": taps, "kt": kt, "top": top, "left": left}
    names |= {"st": st, "sh": sh, "sw": sw, "dt": dt, "dh": dh, "dw": dw}
    for place in itertools.product(*map(range, y.shape)):
        close(y[place], eval(formula, names | dict(zip(outside.split(", "), place, strict=True))))


def test_the_examples_of_next_history() -> None:
    """Both are of chunks: the first of a plain stream, the second of a later chunk where the first had one frame."""
    text, _, strided = docstring(next_history).partition("With a stride")
    whole, strided = ("".join(e.source for e in doctest.DocTestParser().get_examples(t)) for t in (text, strided))
    x, weight = draw(torch.float64, 1, 2, 9, 4, 4), draw(torch.float64, 2, 2, 3, 3, 3)
    given = {"weight": weight, "causal_conv3d": causal_conv3d, "next_history": next_history}
    close(run(whole, x=x, **given)["y"], causal_conv3d(x, weight)[:, :, 8:])
    st, first = 2, x[:, :, :1]
    names = run(strided, chunk=x[:, :, 1:5], history=next_history(first, None, 3), st=st, **given)
    close(names["y"], causal_conv3d(x[:, :, :5], weight, stride=(st, 2, 2))[:, :, 1:])
    close(names["history"], x[:, :, 3:5])


@pytest.mark.parametrize("dtype", DTYPES)
def test_video_norm(dtype: torch.dtype) -> None:
    B, C, T, groups = 2, 6, 3, 2
    x, weight, bias = draw(dtype, B, C, T, 4, 5), draw(dtype, C), draw(dtype, C)
    scale, shift = draw(dtype, B, C, T), draw(dtype, B, C, T) + 1
    options = {"over": "frame", "groups": groups, "scale": scale, "shift": shift, "activation": "silu"}
    expected = video_norm(x, weight, bias, **options)
    names = readme("video_norm", B=B, T=T, x=x, weight=weight, bias=bias, groups=groups, scale=scale, shift=shift)
    close(expected, names["y"])

    parts = x.unflatten(1, (groups, -1))  # over a group of one frame
    rows = (2, 4, 5)
    mean, variance = parts.mean(rows, keepdim=True), parts.var(rows, correction=0, keepdim=True)
    mean, variance = (row.repeat_interleave(C // groups, 2).flatten(1, 2) for row in (mean, variance))
    names = {"act": F.silu, "eps": 1e-6, "mean": mean, "variance": variance, "sqrt": torch.sqrt}
    names |= {"weight": weight[:, None, None, None], "bias": bias[:, None, None, None]}
    names |= {"torch": torch, "x": x, "scale": scale[..., None, None], "shift": shift[..., None, None]}
    exec("\n".join(formulas(video_norm)), names)
    close(expected, names["y"])


def test_the_norm_of_wan() -> None:
    """The formula in video_norm's docstring, and the arguments that it names."""
    formula, arguments = re.findall(
        r"``(F\.normalize[^`]*)``, the norm\s+of Wan's autoencoder, is ``([^`]*)``", docstring(video_norm)
    )[0]
    C = 6
    x, weight = draw(torch.float64, 2, C, 3, 4, 5), draw(torch.float64, C)
    names = run(f"y = {formula}", C=C, x=x, weight=weight[:, None, None, None])
    ours = run(f"y = video_norm(x, weight, {arguments})", C=C, x=x, weight=weight, video_norm=video_norm)
    close(ours["y"], names["y"])


def windows(x: Tensor, window: tuple[int, int, int]) -> Tensor:
    """[B, T, H, W, heads, dim] -> [B, T / t, H / h, W / w, heads, N, dim]"""
    for axis, extent in zip((1, 3, 5), window, strict=True):
        x = x.unflatten(axis, (-1, extent))
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6, 8).flatten(5, 7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_window_attention(dtype: torch.dtype) -> None:
    window, (B, T, H, W, heads, dim) = (2, 3, 2), (2, 4, 6, 4, 2, 8)
    q, k, v = draw(dtype, 3, B, T, H, W, heads, dim)
    table, q_norm, k_norm = draw(dtype, heads, 3, 5, 3), draw(dtype, dim), draw(dtype, dim) + 1
    expected = window_attention(q, k, v, window=window, bias_table=table, q_norm=q_norm, k_norm=k_norm)

    t, h, w = window
    place = torch.cartesian_prod(*map(torch.arange, window))
    dt, dh, dw = (place[:, None] - place).unbind(-1)
    given = {"q": q, "k": k, "v": v, "table": table, "q_norm": q_norm, "k_norm": k_norm, "dim": dim}
    given |= {"t": t, "h": h, "w": w, "dt": dt, "dh": dh, "dw": dw}
    given |= {"split": lambda x: windows(x, window).flatten(0, 3), "merge": lambda x: x}
    out = readme("window_attention", **given)["out"]  # of windows; ours is split likewise
    close(windows(expected, window).flatten(0, 3), out)

    lines = re.search(r"::\n\n((?: {4}.*\n)+)", docstring(window_attention))
    assert lines is not None
    fills, *rest = inspect.cleandoc(lines[1]).splitlines()  # the first line is of one element
    names = {"q_norm": q_norm, "k_norm": k_norm, "norm_eps": 1e-6, "dim": dim, "scale": dim**-0.5, "place": place}
    names |= {"bias_table": table, "bias": q.new_empty(t * h * w, t * h * w), "window": torch.tensor(window)}
    q, k, v = (windows(x, window)[1, 1, 0, 1] for x in (q, k, v))
    for head in range(heads):
        for i, j in itertools.product(range(len(place)), repeat=2):
            run(fills, head=head, i=i, j=j, **names)
        found = run("\n".join(rest), q=q[head], k=k[head], v=v[head], **names)
        close(windows(expected, window)[1, 1, 0, 1, head], found["out"])


def swin(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: tuple[int, ...], shift: tuple[int, ...]) -> Tensor:
    """As Video Swin has it, in windows of the rolled video: a token sees those of its own region."""
    regions = torch.zeros(1, *q.shape[1:4], 1, 1)
    sizes = zip(window, shift, strict=True)
    cuts = [[slice(-n), slice(-n, -s), slice(-s, None)] if s else [slice(None)] for n, s in sizes]
    for number, parts in enumerate(itertools.product(*cuts)):
        regions[(0, *parts)] = number
    regions = windows(regions, window)[..., 0]
    bias = bias.masked_fill(regions[..., :, None] != regions[..., None, :], float("-inf"))
    q, k, v = (windows(x, window) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


@pytest.mark.parametrize("shift", [(0, 3, 3), (1, 2, 1), (0, 0, 0)])
def test_shifted_windows(shift: tuple[int, int, int]) -> None:
    (code,) = re.findall(r"^def shifted.*?return out\n", (ROOT / "docs/ops.md").read_text(), re.S | re.M)
    names = run(code, itertools=itertools, Tensor=Tensor, window_attention=window_attention)
    window, table = (2, 4, 4), draw(torch.float64, 2, 3, 7, 7)
    q, k, v = draw(torch.float64, 3, 2, 4, 8, 12, 2, 8)
    out = names["shifted"](q, k, v, shift, window=window, bias_table=table)
    q, k, v, out = (x.roll([-s for s in shift], (1, 2, 3)) for x in (q, k, v, out))
    close(windows(out, window), swin(q, k, v, bias_of(table, window, window), window, shift))


@pytest.mark.parametrize("dtype", DTYPES)
def test_adaln(dtype: torch.dtype) -> None:
    B, N, D, layers = 2, 6, 8, 3
    cond, base, down, up = (draw(dtype, *s) for s in [(B, D), (B, 5 * D), (layers, 2, D), (layers, 5 * D, 2)])
    modulation = adaln_lora(cond, base, down, up)
    x, branch = draw(dtype, B, N, D), draw(dtype, B, N, D) + 1
    gate, shift, scale = modulation[0].chunk(5, -1)[:3]
    x_new, h = adaln_residual_modulate(x, branch, gate, shift, scale)
    rows = {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale, "D": D}

    names = readme("adaln_lora", cond=cond, base=base, down=down, up=up, **rows)
    close(modulation, names["modulation"])
    close((x_new, h), (names["x"], names["h"]))

    (formula,) = formulas(adaln_lora)
    out = torch.empty_like(modulation)
    for i in range(layers):
        run(formula, i=i, out=out, cond=cond, base=base, down=down, up=up)
    close(modulation, out)
    for op, results in [
        (adaln_modulate, {"h": adaln_modulate(x, shift, scale)}),
        (adaln_residual, {"x_new": adaln_residual(x, branch, gate)}),
        (adaln_residual_modulate, {"x_new": x_new, "h": h}),
    ]:
        names = run("\n".join(formulas(op)), eps=1e-6, **rows)
        for name, tensor in results.items():
            close(tensor, names[name])


def test_no_op_is_without_a_formula() -> None:
    written_otherwise = {"causal_conv3d", "window_attention"}  # as a sum, and as a block of lines: see above
    for op in set(walt_kernels._dispatch.ops()) - written_otherwise:
        assert formulas(getattr(walt_kernels, op)), op
