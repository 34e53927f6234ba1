"""Where the tests of Triton kernels run: on a GPU in every dtype, or by Triton's interpreter on the CPU in float32."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from walt_kernels import _triton, use_backend
from walt_kernels.testing import check_op, move

DEVICE = "cpu" if _triton.INTERPRET else "cuda"
torch.backends.cudnn.allow_tf32 = False  # the yardstick in float32 is PyTorch's own, at its full precision
DTYPES = (torch.float32,) if _triton.INTERPRET else (torch.float32, torch.bfloat16, torch.float16)


def marks() -> list[pytest.MarkDecorator]:
    """For a test file's ``pytestmark``."""
    if _triton.reason is not None:
        return [pytest.mark.skip(reason=str(_triton.reason))]
    if _triton.INTERPRET:
        return []
    skip = pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no GPU, and not under TRITON_INTERPRET=1 (see `make interpret`)"
    )
    return [pytest.mark.gpu, skip]


def without_plans(patch: pytest.MonkeyPatch) -> None:
    """Every call runs the Python of its backend, of which a test has replaced a part."""
    if plans := sys.modules.get("walt_kernels._plans"):
        patch.setattr(plans, "enabled", False)


def on_device(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: move(value, DEVICE) for name, value in inputs.items()}


def through(backend: str, op: Any) -> Any:
    """The op, forced onto a backend."""

    def call(**inputs: Any) -> Any:
        with use_backend(backend):
            return op(**inputs)

    return call


def check(op: Any, inputs: dict[str, Any], **options: Any) -> None:
    """The Triton kernels against the reference, forward and every gradient."""
    check_op(through("triton", op), through("reference", op), on_device(inputs), **options)
