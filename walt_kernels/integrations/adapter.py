"""What an adapter is: the forward pass that takes the place of one class's, and when it may."""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import sys
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


def _nothing(module: nn.Module) -> str | None:
    return None


@dataclass(frozen=True)
class Adapter:
    """One class of another library whose forward pass an op of ours computes exactly.

    Attributes:
        path: "package.module.Class". The class itself is meant; a subclass may compute something else.
        op: the name of the op, for the report.
        forward: takes the place of the class's forward and has its signature. A call that the op cannot take goes to
            ``self.original_forward``, the forward that it took the place of.
        known: `fingerprint` of the class's ``methods`` in every release that ``forward`` was checked against. A class
            that reads otherwise is left as it is: a new release of a library is never changed unseen.
        refuses: says why an instance is left as it is, None where it is not.
        methods: what ``forward`` takes the place of: the class's own forward, and the methods of the class and the
            functions of its module that this one calls.
    """

    path: str
    op: str
    forward: Callable[..., Any]
    known: frozenset[str]
    refuses: Callable[[nn.Module], str | None] = _nothing
    methods: tuple[str, ...] = ("forward",)

    def unknown(self, cls: type) -> str | None:
        """Why it is not known what instances of ``cls``, a class of this path, compute; None where it is."""
        file = sys.modules.get(cls.__module__)
        found = fingerprint(*(getattr(cls, name, None) or getattr(file, name, None) for name in self.methods))
        if found is None:
            return "its source cannot be read, so what it computes is not known"
        if found not in self.known:
            return f"its {' and '.join(self.methods)} are of a release that was not checked (fingerprint {found})"
        return None

    def reason(self, module: nn.Module) -> str | None:
        """Why ``module``, an instance of the class, is left as it is; None where it is not."""
        if "forward" in vars(module):
            return "its forward was replaced by another library (a hook that offloads or casts, say)"
        return self.unknown(type(module)) or self.refuses(module)


def own_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """The forward of the library's class, also where ours has taken its place."""
    return getattr(cls, "original_forward", cls.forward)


def class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def is_bare(module: nn.Module) -> bool:
    """Whether a call of a module is its class's forward and nothing else, so that another may take its place."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)


@functools.cache
def fingerprint(*functions: Callable[..., Any]) -> str | None:
    """16 hexadecimal digits for the source of functions, whatever its comments and blanks; None if it is not there.

    Of a function that another one wraps, both count: inspect would look through the wrapper.
    """
    sources = []
    for function in functions:
        layer: Any = function
        while layer is not None:
            try:
                sources.append(inspect.getsource(layer.__code__))
            except (OSError, AttributeError):
                return None
            layer = getattr(layer, "__wrapped__", None)
    code = "".join("".join(_without_comments(source).split()) for source in sources)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def _without_comments(source: str) -> str:
    lines = source.splitlines()
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
    except (tokenize.TokenError, IndentationError):  # the indentation of a method, at its end
        pass
    return "\n".join(lines)
