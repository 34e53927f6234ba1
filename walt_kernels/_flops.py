"""FLOPs of the ops for torch.utils.flop_counter: two for a multiply-add, products only, as PyTorch counts its own.

The formulas stand in the ops' op.py; the benchmarks use the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"

_formulas: dict[Any, Callable[..., int]] = {}


def count_flops(name: str, forward: Callable[..., int], backward: Callable[..., int]) -> None:
    """Formulas of ``walt_kernels::name`` and of its backward pass. They take what the schema takes, shapes for tensors.

    ``out_shape`` is the keyword of the outputs' shapes.
    """
    ops = torch.ops.walt_kernels
    for op, formula in ((getattr(ops, name), forward), (getattr(ops, f"{name}_backward"), backward)):
        _formulas[op] = formula
        if COUNTER in sys.modules:
            sys.modules[COUNTER].register_flop_formula(op)(formula)


class _AfterImport(MetaPathFinder):
    """Registers the formulas when the counter is imported. Importing it ourselves would import Triton."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(spec for finder in others if (spec := finder.find_spec(fullname, path, target)))
        assert isinstance(spec.loader, Loader)
        load = spec.loader.exec_module

        def load_and_register(module: Any) -> None:
            load(module)
            for op, formula in _formulas.items():
                module.register_flop_formula(op)(formula)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _AfterImport())
