"""A page of docs as a program: what it fences as python, and the same after the diffs that follow."""

from __future__ import annotations

import ast
import functools
import re
import sys
import types

from .machine import ROOT


def fences(text: str) -> list[tuple[str, str]]:
    """The fences of a page and what is in them."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)


def patched(program: str, diff: str) -> str:
    """The program after a diff, each of whose hunks has to be there once."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M):
        old, new = ("".join(f"{line[1:]}\n" for line in hunk.splitlines() if line[:1] != sign) for sign in "+-")
        assert program.count(old) == 1, f"the program before this diff has no single\n{old}"
        program = program.replace(old, new)
    return program


@functools.cache
def definitions(page: str) -> types.ModuleType:
    """The classes and functions of a page's programs; what else these do is not run."""
    module = types.ModuleType(re.sub(r"\W", "_", page))
    sys.modules[module.__name__] = module  # where torch.compile looks for what a function refers to
    program = ""
    for fence, text in fences((ROOT / page).read_text()):
        if fence in ("python", "diff"):
            program = text if fence == "python" else patched(program, text)
            tree = ast.parse(program)
            kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
            tree.body = [node for node in tree.body if isinstance(node, kinds)]
            exec(compile(tree, page, "exec"), vars(module))
    return module
