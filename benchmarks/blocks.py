"""The blocks of docs/kernels.md, plain, plain under torch.compile, and with our ops: time and peak memory.

They are what the page prints. Outputs and gradients are compared before any time is taken; then all take turns. Peak
memory is what a call adds to block and input, on a CPU in a process of its own. Without --quick this compiles for
minutes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from walt_kernels import testing

from .case import MODES
from .models import Model, Row, measure, mebibytes, parser_of
from .overview import DTYPES
from .page import definitions
from .report import rewrite, split, table_head, table_row

PAGE = "docs/kernels.md"
BLOCKS = ("causal block", "windows", "transformer block")  # what the names of cases begin with


def make(name: str, *arguments: Any) -> nn.Module:
    block: nn.Module = getattr(definitions(PAGE), name)(*arguments)
    return block


def changed(name: str, arguments: tuple[Any, ...], plain: nn.Module) -> tuple[nn.Module, str]:
    """The block with our ops that has the weights of the plain one."""
    block = make(name, *arguments).to(next(plain.parameters())).eval()
    block.load_state_dict(plain.state_dict())
    return block, f"{type(plain).__name__} -> {name}"


def call(block: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = block(x)
    return y


def call_with_condition(block: nn.Module, x: Tensor) -> Tensor:
    cond = testing.random(len(x), x.shape[-1], grad=False).to(x)
    y: Tensor = block(x, cond)
    return y


def block(name: str, case: str, arguments: tuple[Any, ...], shape: tuple[int, ...], **more: Any) -> Model:
    """``Plain<name>`` of the page and ``<name>``."""
    plain, change = partial(make, f"Plain{name}", *arguments), partial(changed, name, arguments)
    return Model(case, plain, shape=shape, change=change, compiled=True, **{"run": call, **more})


def causal(channels: int, frames: int, size: int, quick: bool = False) -> list[Model]:
    name, shape = f"causal block, C {channels}, {frames}x{size}x{size}", (1, channels, frames, size, size)
    return [
        block("Block", name, (channels,), shape, quick=quick),
        block("Block", f"{name}, channels_last_3d", (channels,), shape, channels_last=True),
    ]


def windows(t: int, h: int, w: int, quick: bool = False) -> Model:
    """16 windows at width 256."""
    return block("Windows", f"windows, {t}x{h}x{w}", (256, 8, (t, h, w)), (1, t, 4 * h, 4 * w, 256), quick=quick)


def transformer(width: int, quick: bool = False) -> Model:
    case, shape = f"transformer block, width {width}", (2, 256, width)
    return block("Transformer", case, (width, width // 64), shape, run=call_with_condition, quick=quick)


def blocks() -> list[Model]:
    return [
        *causal(128, 5, 32, quick=True),
        *causal(64, 17, 64),
        windows(5, 8, 8, quick=True),
        windows(1, 16, 16),
        windows(1, 7, 7),
        *(transformer(width, quick=width == 384) for width in (256, 384, 1024)),
    ]


def marks(block: str) -> tuple[str, str]:
    return f"<!-- {block}: begin -->", f"<!-- {block}: end -->"


def section(rows: list[Row], block: str) -> str:
    """The page's table of one block: how many times as long the plain and the compiled one take; memory of all."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["model"].startswith(block):
            case = row["model"].removeprefix(f"{block}, ")
            cases.setdefault((case, DTYPES[row["dtype"]]), {})[row["mode"]] = row
    lines = table_head([block, "in", *MODES, *(f"MiB, {mode}" for mode in MODES), "MiB, kept"])
    for about, modes in cases.items():
        forward, both = (modes[mode] for mode in MODES)
        memory = [mebibytes(mib, ", ") for mib in (forward["mib"], both["mib"], both["kept"])]
        lines.append(table_row([*about, _faster(forward), _faster(both), *memory]))
    return "\n".join(lines)


def _faster(row: Row) -> str:
    return ", ".join(f"{ms / row['ms']['after']:.2f}x" for way, ms in row["ms"].items() if way != "after")


def main(arguments: list[str]) -> int:
    parser = parser_of("blocks", __doc__)
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the tables between the markers of this file")
    options = parser.parse_args(arguments)
    written = BLOCKS if options.page else ()
    try:
        for name in written:
            split(options.page, marks(name))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    rows, failed = measure(parser, options, blocks(), seconds=1.0)
    for name in written:
        rewrite(options.page, section(rows, name), marks(name))
    return failed
