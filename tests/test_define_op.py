"""A new op: one file that declares it and one with its reference, in a folder that is found. Then one with kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import walt_kernels as wk
from walt_kernels import _define, _dispatch
from walt_kernels.testing import check_op, random, sample_call

ROOT = Path(__file__).parents[1]
GENERIC = ("registration", "dispatch", "meta", "derivatives", "export", "flops", "empty")

REFERENCE = """
import torch
from torch import Tensor


def toy(x: Tensor, weight: Tensor | None, steps: int, scale: float) -> Tensor:
    y = scale * x.roll(steps, 1) ** 2
    return y if weight is None else y * weight
"""
OP = '''
from typing import Any

from torch import Tensor

from walt_kernels._checks import check_same_dtype, check_tensor, number, positive
from walt_kernels._define import define_op

from . import reference


@define_op(reference.toy, sample=lambda tensor, batch: {"x": tensor(batch, 4, 8), "weight": tensor(8), "steps": 2})
def toy(x: Tensor, weight: Tensor | None = None, *, steps: int = 1, scale: float = 1.0) -> dict[str, Any]:
    """Returns scale * x.roll(steps, 1) ** 2 * weight."""
    check_tensor("x", x, "[B, N, D]")
    if weight is not None:
        check_tensor("weight", weight, "[D]")
        check_same_dtype("weight", weight, "x", x)
    return {"x": x, "weight": weight, "steps": positive("steps", steps), "scale": number("scale", scale)}
'''
PLUGIN = """
import walt_kernels
walt_kernels.__path__.append({folder!r})
import walt_kernels.toy.op
"""


def write(folder: Path) -> None:
    (folder / "toy").mkdir()
    (folder / "toy" / "reference.py").write_text("from __future__ import annotations\n" + REFERENCE)
    (folder / "toy" / "op.py").write_text("from __future__ import annotations\n" + OP)


def test_two_files_are_an_op_for_every_test_of_all_ops(tmp_path: Path) -> None:
    """Registration, fake, autograd, opcheck, derivatives, export: the tests find it and pass."""
    write(tmp_path)
    (tmp_path / "plugin.py").write_text(PLUGIN.format(folder=str(tmp_path)))
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in GENERIC]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "plugin", "-p", "no:cacheprovider", "-k", "toy", *files]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 25, done.stdout


def test_its_folder_is_found_and_its_calls_are_explained(tmp_path: Path) -> None:
    write(tmp_path)
    code = PLUGIN.format(folder=str(tmp_path)) + textwrap.dedent("""
    import importlib, torch
    from walt_kernels import _define, _dispatch, explain
    from walt_kernels.__main__ import report
    from walt_kernels.testing import sample_call
    assert "toy" in _define.folders()
    assert explain("toy", **sample_call("toy")) == {"reference": None}
    assert "  toy                      reference" in report()
    x = torch.ones(1, 2, 3, requires_grad=True)
    y = _dispatch.op("toy").function(x, steps=3)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.autograd.grad(grad.sum(), x)
    try:
        _dispatch.op("toy").function(x[0])
    except ValueError as error:
        assert str(error) == "x has shape (2, 3), expected 3 dimensions [B, N, D]", error
    schema = torch.ops.walt_kernels.toy.default._schema
    assert str(schema) == (
        "walt_kernels::toy(Tensor x, Tensor? weight, SymInt steps, float scale, str backend) -> Tensor"
    ), schema
    """)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


# ---- with kernels ---------------------------------------------------------------------------------------------------


def reference(x: Tensor, weight: Tensor, power: int) -> Tensor:
    return x**power * weight


@pytest.fixture(scope="module")
def calls() -> Iterator[list[tuple[str, tuple[str, ...]]]]:
    """What reaches the kernels of the op ``toy_with_kernels``: their names and those of their arguments."""
    ran: list[tuple[str, tuple[str, ...]]] = []

    def forward(x: Tensor, weight: Tensor, power: int, y: Tensor, root: Tensor) -> None:
        ran.append(("forward", ()))
        root.copy_(x ** (power - 1))
        y.copy_(root * x * weight)

    def backward(
        grad_y: Tensor,
        x: Tensor,
        weight: Tensor,
        power: int,
        grad_x: Tensor | None,
        grad_weight: Tensor | None,
        **saved: Any,
    ) -> None:
        ran.append(("backward", tuple(name for name, g in (("x", grad_x), ("weight", grad_weight)) if g is not None)))
        assert list(saved) == ["root"]
        if grad_x is not None:
            grad_x.copy_(grad_y * weight * power * saved["root"])
        if grad_weight is not None:
            grad_weight.copy_((grad_y * saved["root"] * x).flatten(0, -2).sum(0))

    @_define.define_op(
        reference,
        returns=("y", "root"),
        outputs=lambda x: (torch.empty_like(x), torch.empty_like(x)),
        differentiable=("x", "weight"),
        unread=("y",),
        backends=(_dispatch.Backend("cpu", lambda **inputs: None, forward, backward),),
        flops=(lambda x, root: x.numel() + root.numel(), lambda grad_y: 3 * grad_y.numel()),
        sample=lambda tensor, batch: {"x": tensor(batch, 8), "weight": tensor(8), "power": 3},
    )
    def toy_with_kernels(x: Tensor, weight: Tensor, power: int = 2) -> dict[str, Any]:
        return {"x": x, "weight": weight, "power": power}

    yield ran
    del _dispatch._ops["toy_with_kernels"]


def test_kernels_write_by_name_into_what_is_wanted(calls: list[tuple[str, tuple[str, ...]]]) -> None:
    op = _dispatch.op("toy_with_kernels").function
    inputs = {"x": random(3, 5, 8), "weight": random(8), "power": 3}
    calls.clear()
    check_op(op, reference, inputs)
    assert calls == [("forward", ()), ("backward", ("x", "weight"))]
    calls.clear()
    op(inputs["x"].detach(), inputs["weight"], 3).sum().backward()
    assert calls == [("forward", ()), ("backward", ("weight",))]
    calls.clear()
    with wk.use_backend("reference"):
        check_op(op, reference, inputs)
    assert calls == []


def test_a_declaration_with_kernels(calls: list[tuple[str, tuple[str, ...]]]) -> None:
    forward, backward = torch.ops.walt_kernels.toy_with_kernels, torch.ops.walt_kernels.toy_with_kernels_backward
    assert str(backward.default._schema).endswith(
        "_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor root, SymInt power, bool[] wanted, str backend) "
        "-> (Tensor, Tensor)"
    )
    leaves = [random(2, 8, dtype=torch.float64), random(8, dtype=torch.float64), 3, "cpu"]
    torch.library.opcheck(forward.default, leaves)
    y, root = forward(*[x.detach() if isinstance(x, Tensor) else x for x in leaves])
    reads = (torch.ones_like(y), leaves[0].detach(), leaves[1].detach(), root, 3)
    torch.library.opcheck(
        backward.default, (*reads, [True, False], "cpu"), test_utils=("test_schema", "test_faketensor")
    )
    assert [g.shape for g in backward(*reads, [True, False], "cpu")] == [(2, 8), (0,)]
    op = _dispatch.op("toy_with_kernels").function
    assert torch.autograd.gradcheck(op, (leaves[0], leaves[1], 3))
    assert list(wk.explain("toy_with_kernels", **sample_call("toy_with_kernels"))) == ["cpu", "reference"]
