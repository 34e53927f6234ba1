"""accelerate and restore: our forward passes under the modules of a model, in place, and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from ..nn import CausalConv3d, WindowAttention
from . import attention, causal_convolutions, modulation, norms
from .adapter import Adapter, class_path

_MODULES = (causal_convolutions, norms, modulation, attention)
_ADAPTERS: dict[str, Adapter] = {adapter.path: adapter for each in _MODULES for adapter in each.ADAPTERS}
# Classes that no instance of can be replaced, and why.
_LEFT: dict[str, str] = {path: reason for each in (modulation, attention) for path, reason in each.LEFT.items()}
# Parts of the names of classes that do what our ops do: a report does not pass over such a module in silence.
_FAMILIES = tuple(name for each in _MODULES for name in each.FAMILY)
# The classes that `accelerate` has made, by what they are made of; and those that they take the place of.
_REPLACEMENTS: dict[tuple[type, Adapter], type[nn.Module]] = {}
_ORIGINALS: dict[type, type[nn.Module]] = {}


class Row(NamedTuple):
    """One module of a report."""

    name: str  # as in model.named_modules(); "" is the model itself
    kind: str  # its class
    what: str  # the op that computes it, or the reason why none does


@dataclass
class Report:
    """What `accelerate` found: the modules that our ops compute, and those of their kind that stay as they are."""

    replaced: list[Row] = field(default_factory=list)
    left: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [(row.name or "(model)", row.kind, row.what) for row in self.replaced]
        rows += [(row.name or "(model)", row.kind, f"left: {row.what}") for row in self.left]
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        lines = [f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {what}" for name, kind, what in rows]
        return "\n".join([*lines, f"{len(self.replaced)} replaced, {len(self.left)} left"])


def accelerate(model: nn.Module) -> Report:
    """Lets the ops of this package compute the modules of ``model`` that they compute exactly, in place.

    A module whose class is known (``walt_kernels/integrations/``) becomes an instance of a subclass of it that has
    another forward, and nothing else: parameters, buffers, keys of the state dict, hooks, ``requires_grad``, dtypes and
    devices stay, before or after ``.to``, under ``torch.compile``, with gradients and checkpointing.
    What looks alike and computes something else is left as it is, and the report says why.
    A second call changes nothing. `restore` undoes it. `copy.deepcopy` and pickle keep it; to load a model that was
    pickled whole where this package is missing, restore it first. Gradients of gradients do not go through our ops,
    which say so.

    Returns:
        `Report`: ``replaced`` and ``left``, lists of (name, kind, what); printed, a table.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    _check_model(model)
    report = Report()
    for name, module in model.named_modules():
        cls, ours = type(module), _class_of_ours(module)
        adapter = _ADAPTERS.get(class_path(ours or cls))
        if ours is not None and adapter is not None:
            report.replaced.append(Row(name, cls.__name__, adapter.op))
            continue
        reason = _stranger(cls) if adapter is None else adapter.reason(module)
        if reason is not None:
            report.left.append(Row(name, cls.__name__, reason))
        elif adapter is not None:
            module.__class__ = _replacement(cls, adapter)
            report.replaced.append(Row(name, cls.__name__, adapter.op))
    return report


def restore(model: nn.Module) -> None:
    """Undoes `accelerate`: every module is of its own class again, and computes what it computed before, bit for bit.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: another library has wrapped a module, or its forward, since `accelerate`.
    """
    _check_model(model)
    replaced = [(name, module) for name, module in model.named_modules() if _class_of_ours(module)]
    for name, module in replaced:
        if "forward" in vars(module) or type(module) not in _ORIGINALS:
            raise ValueError(
                f"model's module {name or '(model)'!r} was wrapped by another library after accelerate, expected it "
                f"as it was: take that library's hooks or parametrizations off the {type(module).__name__} first"
            )
    for _, module in replaced:
        module.__class__ = _ORIGINALS[type(module)]


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected an nn.Module")


def _stranger(cls: type) -> str | None:
    """Why a module without an adapter is left; None where it is nothing to us, or runs on our ops already."""
    if issubclass(cls, (CausalConv3d, WindowAttention)):
        return None
    if class_path(cls) in _LEFT:
        return _LEFT[class_path(cls)]
    for base in cls.__mro__[1:]:
        if class_path(base) in _ADAPTERS:
            return f"a subclass of {base.__name__}, which may compute something else"
    return "no adapter for this class" if any(name in cls.__name__ for name in _FAMILIES) else None


def _class_of_ours(module: nn.Module) -> type | None:
    """The class of ours that a module is of, or that another library has made a subclass of; else None."""
    return next((base for base in type(module).__mro__ if base in _ORIGINALS), None)


def _replacement(cls: type[nn.Module], adapter: Adapter) -> type[nn.Module]:
    """The subclass of ``cls`` with the adapter's forward, under the same name; made once."""
    if (cls, adapter) in _REPLACEMENTS:
        return _REPLACEMENTS[cls, adapter]

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        plain = object.__reduce_ex__(self, 2)
        # Found by its name, the class would be the original.
        return (_remake, (cls,), *plain[2:]) if type(self) is replacement else plain

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    methods = {"forward": adapter.forward, "original_forward": cls.forward, "__reduce_ex__": __reduce_ex__}
    replacement = type(cls.__name__, (cls,), names | methods)
    _REPLACEMENTS[cls, adapter], _ORIGINALS[replacement] = replacement, cls
    return replacement


def _remake(cls: type[nn.Module]) -> nn.Module:
    """An empty instance for copy and pickle: of ours, where the class still is what we know."""
    adapter = _ADAPTERS.get(class_path(cls))
    if adapter is not None and adapter.unknown(cls) is None:
        cls = _replacement(cls, adapter)
    return cls.__new__(cls)
