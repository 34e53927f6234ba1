"""The arrows between the rooms of `walt`: who may import whom, read from the source; nothing is imported."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("walt.cli", "walt.commands", "walt.demo", "walt.__main__")


def modules() -> dict[str, Path]:
    """Name: file, of every module; a package goes by its own name."""
    files = [path for package in ("walt", "walt_kernels") for path in (ROOT / package).rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imports(name: str, path: Path, known: dict[str, Path], *, everywhere: bool) -> set[str]:
    """The modules of ours that a module imports: in all of its code, or when it is loaded."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    later = {id(node) for function in functions for node in ast.walk(function)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in later and not everywhere:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            module = resolve_name("." * node.level + (node.module or ""), package)
            names = {f"{module}.{alias.name}" for alias in node.names if alias.name != "_C"}  # compiled
            found |= {name if name in known else module for name in names}
    return (found & known.keys()) - {name}


KNOWN = modules()
ARROWS = {name: imports(name, path, KNOWN, everywhere=True) for name, path in KNOWN.items()}


def inside(name: str, *rooms: str) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


@pytest.mark.parametrize(
    ("room", "forbidden", "allowed"),
    [
        ("walt.model", ("walt",), ("walt.model", "walt.errors")),
        ("walt.data", ("walt.train", "walt.sample", "walt.evaluate", "walt.settings"), ()),
        ("walt.data", ("walt.model",), ("walt.model.config", "walt.model.randoms")),
        ("walt.train", ("walt.sample", "walt.evaluate"), ()),
        ("walt.sample", ("walt.evaluate",), ()),
        ("walt_kernels", ("walt",), ()),
    ],
)
def test_a_room_knows_no_more_than_it_must(room: str, forbidden: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    wrong = {
        f"{name} -> {other}"
        for name, others in ARROWS.items()
        for other in others
        if inside(name, room) and inside(other, *forbidden) and not inside(other, *allowed)
    }
    assert not wrong
    assert any(inside(name, room) for name in KNOWN)


def test_only_commands_know_commands() -> None:
    wrong = {
        f"{name} -> {other}"
        for name, others in ARROWS.items()
        for other in others
        if inside(other, *COMMANDS) and not inside(name, *COMMANDS)
    }
    assert not wrong


def test_no_cycles() -> None:
    """Among what is imported when modules are loaded; a package counts as the module of its name."""
    loaded = {name: imports(name, path, KNOWN, everywhere=False) for name, path in KNOWN.items()}
    assert len(list(TopologicalSorter(loaded).static_order())) == len(KNOWN)
