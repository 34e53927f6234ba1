"""What compiles without a warning and is wrong on a GPU: two patterns in Triton's intermediate code (TTIR).

Both were seen on an H200 with Triton 3.6, and neither by the interpreter. Where the compiler prefetches (num_stages),

- a matrix product of two operands that are both boxes of more than two dimensions, loaded through descriptors and
  reshaped, raced with three stages or more: wrong sums, other bits in other runs. Two stages were right, and so was one
  such operand beside a box of two dimensions, in nine tiles of up to four stages;
- a load inside the loop that feeds nothing but masks and conditions gave wrong results with two stages. Loaded before
  the loop, into a register of bits, the same flags were right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

RACING_STAGES, PREFETCHING_STAGES = 3, 2


class Operation(NamedTuple):
    results: tuple[str, ...]
    name: str
    operands: tuple[str, ...]
    text: str


_OPERATION = re.compile(r'^\s*(?:(?P<results>%[^=]*?) = )?"?(?P<name>\w+\.[\w.]+)"?(?P<rest>.*)$')
_VALUE = re.compile(r"%[\w$.-]+")


class Loop(NamedTuple):
    body: list[Operation]
    own: list[Operation]  # what is in no loop inside of it: an outer loop prefetches nothing of an inner one
    stages: int


def hazard(ttir: str, stages: int) -> str | None:
    """What of the two is in a kernel, in words, or None. ``stages`` is the kernel's; a loop may have its own."""
    for loop in _loops(list(_read(ttir)), stages):
        for operation in loop.own:
            if loop.stages >= RACING_STAGES and operation.name == "tt.dot" and _boxes(operation, loop.body) == 2:
                return (
                    f"both operands of a product are reshaped boxes of more than two dimensions, {loop.stages} stages"
                )
            if loop.stages >= PREFETCHING_STAGES and operation.name == "tt.load" and _only_masks(operation, loop.body):
                return f"a load in a loop of {loop.stages} stages feeds masks only: {operation.results[0]}"
    return None


def _read(ttir: str) -> Iterator[tuple[int, Operation]]:
    """Operations and the depth of the braces that they stand in; the end of a region is one without a name."""
    depth = 0
    for line in ttir.splitlines():
        code = re.sub(r" loc\(.*$", "", line)
        change = code.count("{") - code.count("}")
        if match := _OPERATION.match(code):
            results = tuple(name.split(":")[0] for name in _VALUE.findall(match["results"] or ""))
            yield depth, Operation(results, match["name"], tuple(_VALUE.findall(match["rest"])), match["rest"])
        elif code.lstrip().startswith("}"):
            yield depth + min(change, -1), Operation((), "", (), code)
        depth += change


def _loops(read: list[tuple[int, Operation]], stages: int) -> Iterator[Loop]:
    for i, (depth, operation) in enumerate(read):
        if operation.name == "scf.for":
            end = next(j for j in range(i + 1, len(read)) if read[j][0] <= depth)
            inner, own = read[i + 1 : end], []
            inside = None  # the depth of a loop in this one
            for at, each in inner:
                if inside is None and each.name == "scf.for":
                    inside = at
                elif inside is None:
                    own.append(each)
                elif at <= inside:
                    inside = None
            said = re.search(r"tt\.num_stages = (\d+)", read[end][1].text)
            yield Loop([each for _, each in inner], own, int(said[1]) if said else stages)


def _boxes(product: Operation, operations: list[Operation]) -> int:
    """How many operands of a product are boxes of more than two dimensions."""
    makers = {result: operation for operation in operations for result in operation.results}
    found = 0
    for operand in product.operands[:2]:
        maker = makers.get(operand)
        while maker is not None and maker.name != "tt.descriptor_load":
            maker = makers.get(maker.operands[0]) if len(maker.operands) == 1 else None  # a reshape, a transpose
        if maker is not None:
            shape = re.search(r"-> tensor<((?:\d+x)+)", maker.text)
            found += shape is not None and shape[1].count("x") > 2
    return found


def _only_masks(load: Operation, loop: list[Operation]) -> bool:
    """Whether what a load gives decides what is loaded, stored or selected, and is no part of any value."""
    values, reached = set(load.results), False
    for operation in loop[loop.index(load) + 1 :]:
        places = {i for i, operand in enumerate(operation.operands) if operand in values}
        if not places:
            continue
        mask = {"tt.load": {1}, "tt.store": {2}, "arith.select": {0}}.get(operation.name)
        if mask is not None:
            if not places <= mask:
                return False
            reached = True
        elif operation.name in ("tt.dot", "scf.yield", "tt.reduce") or not operation.results:
            return False
        else:
            values.update(operation.results)
    return reached
