"""Modules and ops as graphs: torch.export with open sizes, torch.jit.trace, decompositions, ONNX.

A graph is captured with one set of sizes and must be right for others, smaller and larger.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from found_ops import OPS, outputs_of
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import walt_kernels as wk
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.presets import PRESETS
from walt_kernels import _dispatch, _native
from walt_kernels.nn import AdaLNLoRA, CausalConv3d, WindowAttention
from walt_kernels.testing import sample_call

pytestmark = pytest.mark.skipif(_native.C is None, reason=f"native kernels: {_native.reason}")

# Names of open sizes: their value in the example, and in the calls of the graph. n is t * f, the tokens of t frames.
EXAMPLE = {"b": 2, "t": 5, "h": 8, "w": 8, "l": 6, "f": 4, "n": 20}
OTHERS = (
    {"b": 3, "t": 9, "h": 4, "w": 7, "l": 9, "f": 3, "n": 27},
    {"b": 5, "t": 3, "h": 9, "w": 3, "l": 2, "f": 2, "n": 6},
)
Shape = Sequence[str | int] | None


class Call(nn.Module):
    """A public op as a module, which is what export and trace take."""

    def __init__(self, op: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.op, self.options = op, options

    def forward(self, *arguments: Tensor | None) -> Any:
        return self.op(*arguments, **self.options)


VIDEO, PAST, GRID = ("b", 4, "t", "h", "w"), ("b", 4, 2, "h", "w"), ("b", "t", "h", "w", 16)
TOKENS, ROW, ROWS = ("b", "n", 16), ("b", 16), ("b", "t", 16)

# A name that begins with "?" is a boolean tensor's.
CASES: dict[str, tuple[Callable[[], nn.Module], list[Shape]]] = {
    "conv": (lambda: CausalConv3d(4, 6, 3), [VIDEO]),
    "conv, reflect, stride": (
        lambda: CausalConv3d(4, 6, 3, stride=2, space_padding="reflect", time_padding="first_frame"),
        [VIDEO],
    ),
    "conv, even kernel": (lambda: CausalConv3d(4, 6, 4, stride=2, space_padding="replicate"), [VIDEO]),
    "conv, history": (lambda: CausalConv3d(4, 6, 3), [VIDEO, PAST]),
    "next_history": (lambda: Call(wk.next_history, history=None, kernel=5), [VIDEO]),
    "attention": (lambda: WindowAttention(16, 2, (2, 4, 4)), [GRID]),
    "attention, images": (lambda: WindowAttention(16, 2, (2, 4, 4)), [GRID, ("?", "b")]),
    "attention, context": (
        lambda: WindowAttention(16, 2, (2, 4, 4), context_width=8),
        [GRID, None, ("b", "l", 8), ("?", "b", "l")],
    ),
    "lora": (lambda: AdaLNLoRA(16, 3, 2), [("b", "t", 16)]),
    "modulate": (lambda: Call(wk.adaln_modulate), [TOKENS, ROW, ROW]),
    "residual": (lambda: Call(wk.adaln_residual), [TOKENS, TOKENS, ROWS]),
    "residual and modulate": (lambda: Call(wk.adaln_residual_modulate), [TOKENS, TOKENS, ROWS, ROWS, ROWS]),
}


def arguments_of(shapes: list[Shape], sizes: dict[str, int]) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = []
    for shape in shapes:
        if shape is None:
            found.append(None)
            continue
        is_bool = shape[0] == "?"
        numbers = torch.randn([sizes[s] if isinstance(s, str) else s for s in shape[is_bool:]])
        found.append(numbers > 0 if is_bool else numbers)
    return tuple(found)


def dynamic(module: nn.Module, shapes: list[Shape], dims: dict[str, Any]) -> Any:
    """What ``dynamic_shapes`` of export takes: the dim of every size that has a name."""
    found: list[dict[int, Any] | None] = []
    for shape in shapes:
        sizes = [] if shape is None else shape[shape[0] == "?" :]
        found.append(None if shape is None else {i: dims[s] for i, s in enumerate(sizes) if isinstance(s, str)})
    return (tuple(found),) if isinstance(module, Call) else tuple(found)


def assert_right(graph: Callable[..., Any], module: nn.Module, shapes: list[Shape], sizes: dict[str, int]) -> None:
    arguments = arguments_of(shapes, sizes)
    with torch.no_grad():
        torch.testing.assert_close(graph(*arguments), module(*arguments))


OPEN = dict.fromkeys(EXAMPLE, Dim.DYNAMIC)
# PyTorch has a graph of its own for a size of one, so a stride of 2 needs three rows.
NAMED = {name: Dim(name, min=2 if name in "bl" else 3, max=640) for name in EXAMPLE}


@pytest.mark.parametrize("dims", [OPEN, NAMED], ids=["Dim.DYNAMIC", "Dim"])
@pytest.mark.parametrize("name", CASES)
def test_export_with_open_sizes(name: str, dims: dict[str, Any]) -> None:
    """Smaller, larger, and in another order than in the example. Export refuses a guard that narrows a named Dim."""
    make, shapes = CASES[name]
    module = make()
    program = export(module, arguments_of(shapes, EXAMPLE), dynamic_shapes=dynamic(module, shapes, dims))
    for sizes in OTHERS:
        assert_right(program.module(), module, shapes, sizes)


@pytest.mark.parametrize(
    ("window", "frames", "others"), [((2, 8, 8), 4, (2, 3, 64)), ((4, 8, 8), 8, (3, 4, 9)), ((4, 8, 8), 3, (2, 5, 64))]
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_export_of_any_number_of_windows(
    backend: str, window: tuple[int, int, int], frames: int, others: tuple[int, ...]
) -> None:
    """One window or several, whatever the example had."""
    module = WindowAttention(16, 2, window)
    dims = ({1: Dim("t", min=2, max=64)},)
    with wk.use_backend(backend):
        program = export(module, (torch.randn(1, frames, 8, 8, 16),), dynamic_shapes=dims)
        for size in others:
            x = torch.randn(1, size, 8, 8, 16)
            torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: CausalConv3d(4, 4, 3), (1, 4, 3, 8, 4)), (lambda: WindowAttention(16, 2, (2, 4, 4)), (1, 4, 8, 8, 16))],
)
def test_old_onnx_exporter(make: Callable[[], nn.Module], shape: tuple[int, ...], tmp_path: Path) -> None:
    """It knows no decompositions: the ops choose the reference by themselves."""
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="runs what was exported")
    module = make().eval()
    x = torch.randn(shape)
    time = 2 if isinstance(module, CausalConv3d) else 1
    options = {"input_names": ["x"], "dynamic_axes": {"x": {0: "b", time: "t"}}}
    torch.onnx.export(module, (x,), tmp_path / "model.onnx", dynamo=False, **options)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for frames in (x.shape[time], 7, 2):
        x = torch.randn(2, *shape[1:time], frames, *shape[time + 1 :])
        (result,) = session.run(None, {"x": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(result), module(x), rtol=1e-4, atol=1e-5)


def ops_in(program: ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    "name", ["conv, reflect, stride", "attention, images", "attention, context", "lora", "residual and modulate"]
)
def test_decomposition(name: str) -> None:
    """What torch.onnx.export does: a program with our op becomes one of PyTorch's own, still with open sizes."""
    make, shapes = CASES[name]
    module = make()
    program = export(module, arguments_of(shapes, EXAMPLE), dynamic_shapes=dynamic(module, shapes, OPEN))
    ours = [name for name in ops_in(program) if "walt_kernels" in name]
    assert len(ours) == 1
    table = {op: f for op, f in torch._decomp.decomposition_table.items() if "walt_kernels" in str(op)}
    decomposed = program.run_decompositions(table)
    assert not any("walt_kernels" in name for name in ops_in(decomposed))
    for sizes in OTHERS:
        assert_right(decomposed.module(), module, shapes, sizes)


@pytest.mark.parametrize("op", OPS)
def test_decomposition_knows_what_an_exported_program_can_know(op: str) -> None:
    """The outputs that users get; what is saved for a backward pass, which no exported program has, is NaN."""
    call = sample_call(op)
    inputs = _dispatch.prepare(op, **call)
    overload = getattr(torch.ops.walt_kernels, op).default
    outputs = torch._decomp.decomposition_table[overload](*inputs.values(), "cpu")
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert len(outputs) == len(overload._schema.returns)
    with wk.use_backend("reference"):
        expected = outputs_of(op, **call)
    torch.testing.assert_close(outputs[: len(expected)], expected)
    assert all(output.isnan().all() for output in outputs[len(expected) :])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # pytest takes our own filter away
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_trace(name: str, backend: str) -> None:
    make, shapes = CASES[name]
    module = make()
    given = [i for i, shape in enumerate(shapes) if shape is not None]

    class Given(nn.Module):  # torch.jit.trace takes no None
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *tensors: Tensor) -> Any:
            return self.module(*(tensors[given.index(i)] if i in given else None for i in range(len(shapes))))

    def tensors(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(a for a in arguments if a is not None)

    with wk.use_backend(backend):
        traced = torch.jit.trace(Given(), tensors(*arguments_of(shapes, EXAMPLE)))
    for sizes in OTHERS:
        assert_right(lambda *arguments: traced(*tensors(*arguments)), module, shapes, sizes)


def test_trace_does_not_warn_of_our_checks() -> None:
    code = "import torch, walt_kernels; x = torch.ones(1, 4, 3, 5, 5); m = walt_kernels.nn.CausalConv3d(4, 4, 3)"
    command = [sys.executable, "-c", f"{code}; torch.jit.trace(m, x)"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert "TracerWarning" not in done.stderr


@pytest.mark.parametrize("open_sizes", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_onnx(name: str, open_sizes: bool, tmp_path: Path) -> None:
    """Without a word of a backend: the exporter translates the decomposition."""
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="runs what was exported")
    make, shapes = CASES[name]
    module = make().eval()
    shape = dynamic(module, shapes, OPEN) if open_sizes else None
    example = arguments_of(shapes, EXAMPLE)
    torch.onnx.export(module, example, dynamic_shapes=shape, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for sizes in OTHERS if open_sizes else [EXAMPLE]:
        arguments = arguments_of(shapes, sizes)
        feed = [a.numpy() for a in arguments if a is not None]
        results = session.run(None, {i.name: a for i, a in zip(session.get_inputs(), feed, strict=True)})
        with torch.no_grad():
            expected = module(*arguments)
        expected = expected if isinstance(expected, tuple) else (expected,)
        torch.testing.assert_close(tuple(map(torch.from_numpy, results)), expected, rtol=1e-4, atol=1e-5)


def test_export_of_the_models() -> None:
    """Batch and frames of the transformer; batch, frames, height and width of the tokenizer."""
    tokenizer_config, config = PRESETS["minimal"]
    transformer = Transformer(dataclasses.replace(config, latent_size=(5, 4, 4))).eval()
    batch, frames = Dim("batch", min=2, max=64), Dim("frames", min=2, max=5)
    example = torch.randn(2, config.latent_channels, 4, 4, 4), torch.tensor([3, 7])
    program = export(transformer, example, dynamic_shapes=({0: batch, 2: frames}, {0: batch}))
    for size in (2, 5):
        arguments = torch.randn(3, config.latent_channels, size, 4, 4), torch.tensor([3, 7, 1])
        torch.testing.assert_close(program.module()(*arguments), transformer(*arguments))
    encoder = Tokenizer(tokenizer_config).eval().encoder
    sizes = dict.fromkeys((0, 2, 3, 4), Dim.DYNAMIC)
    program = export(encoder, (torch.randn(2, 3, 5, 32, 32),), dynamic_shapes=(sizes,))
    for shape in ((3, 3, 9, 48, 16), (4, 3, 5, 16, 48)):
        video = torch.randn(shape)
        torch.testing.assert_close(program.module()(video), encoder(video))
