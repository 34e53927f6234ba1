"""Names: what `import *` brings, and that an op's function does not hide the modules of the package of its name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pickle
import pkgutil
import pydoc
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import walt
import walt_kernels
from walt_kernels import _define, testing

OPS = _define.folders()  # functions with the name of a package
HAS_TRITON = importlib.util.find_spec("triton") is not None


def run(code: str, **names: Any) -> dict[str, Any]:
    exec(code, names)
    return names


def submodules(op: str) -> list[str]:
    package = importlib.import_module(f"walt_kernels.{op}")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if HAS_TRITON or not name.startswith("triton_")]


@pytest.mark.parametrize("package", ["walt", "walt_kernels", "walt_kernels.nn"])
def test_import_all_replaces_no_module_and_nothing_private(package: str) -> None:
    mine = {"nn": torch.nn, "torch": torch, "F": torch.nn.functional, "__version__": "mine", "__doc__": "mine"}
    names = run(f"from {package} import *", **mine)
    assert {name: names[name] for name in mine} == mine
    brought = {name: value for name, value in names.items() if name not in {*mine, "__builtins__"}}
    assert brought
    assert not any(isinstance(value, ModuleType) or name.startswith("_") for name, value in brought.items())


@pytest.mark.parametrize("op", OPS)
def test_the_modules_of_an_op_are_found_in_every_form(op: str) -> None:
    for name in submodules(op):
        full = f"walt_kernels.{op}.{name}"
        module = importlib.import_module(full)
        assert run(f"import {full} as found")["found"] is module
        assert run(f"from walt_kernels.{op} import {name} as found")["found"] is module
        assert run(f"import {full}\nfound = {full}")["found"] is module
        assert pkgutil.resolve_name(full) is module
    with pytest.raises(ModuleNotFoundError, match="nothing"):
        run(f"import walt_kernels.{op}.nothing as found")


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_a_function(op: str) -> None:
    function = getattr(walt_kernels, op)
    assert inspect.isfunction(function)
    assert (function.__name__, function.__module__) == (op, f"walt_kernels.{op}.op")
    assert run(f"import walt_kernels.{op} as found")["found"] is function
    assert run(f"from walt_kernels.{op} import {op} as found")["found"] is function
    assert pickle.loads(pickle.dumps(function)) is function
    page = pydoc.render_doc(f"walt_kernels.{op}")  # what docs/ops.md has people read
    assert "Returns:" in page
    assert len(page.splitlines()) < 60
    signature = inspect.signature(function)
    assert next(iter(signature.parameters)) in testing.sample_call(op)
    assert typing.get_type_hints(function)["return"] is torch.Tensor
    assert signature.return_annotation in ("Tensor", torch.Tensor)


@pytest.mark.parametrize("name", walt_kernels.nn.__all__)
def test_a_module_that_is_sought_among_the_ops_is_pointed_to(name: str) -> None:
    told = f"{name} is in walt_kernels.nn, write: from walt_kernels.nn import {name}"
    with pytest.raises(ImportError, match=told):
        run(f"from walt_kernels import {name}")
    with pytest.raises(ImportError, match=told):
        getattr(walt_kernels, name)
    with pytest.raises(AttributeError, match="module 'walt_kernels' has no attribute 'nothing'"):
        walt_kernels.nothing  # noqa: B018


def test_walt_has_no_function_that_hides_a_module() -> None:
    for module in pkgutil.iter_modules(walt.__path__):
        assert isinstance(getattr(walt, module.name, walt), ModuleType), module.name


def test_the_names_of_walt_are_found_when_they_are_asked_for() -> None:
    """So that `import walt` is quick."""
    code = "import sys, walt; print('torch' in sys.modules, walt.Tokenizer.__module__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "walt.model.tokenizer", "True"]
    assert set(walt.__all__) <= set(dir(walt))
    for name in set(walt.__all__) - {"PRESETS"}:
        kind = getattr(walt, name)
        assert kind is getattr(importlib.import_module(kind.__module__), name)
        assert pickle.loads(pickle.dumps(kind)) is kind
    with pytest.raises(AttributeError, match="module 'walt' has no attribute 'nothing'"):
        walt.nothing  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        run("from walt import nothing")


def test_source_that_hides_what_is_installed(tmp_path) -> None:
    """Where somebody ran `pip install .` and then Python in the same folder."""
    package = Path(walt_kernels.__file__).parent
    ignored = shutil.ignore_patterns("_C.*", "__pycache__")
    for name in ("source", "installed"):
        shutil.copytree(package, tmp_path / name / "walt_kernels", ignore=ignored)
    code = (  # an editable installation would find its own
        "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'Editable' not in repr(finder)];"
        "import walt_kernels._native as native; print(native.reason)"
    )

    def imported() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=tmp_path / "source", env=environment, capture_output=True, text=True)

    assert "UserWarning" not in imported().stderr  # neither is built
    (tmp_path / "installed" / "walt_kernels" / "_C.so").touch()
    found = imported()
    said = f"is the source, not built, and hides {tmp_path / 'installed' / 'walt_kernels'}: run from another folder"
    assert said in found.stdout
    assert f"plain PyTorch runs: {tmp_path / 'source' / 'walt_kernels'} {said}" in found.stderr
