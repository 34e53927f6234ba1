"""Activation checkpoints run a function twice on the backend of its first run.

``torch.utils.checkpoint`` runs its function again in the backward pass: after ``use_backend`` has been left, or inside
of another one, and for a GPU in a thread of autograd's. It restores the random state and autocast for that, and has no
hook for anybody but its caller. So the two places where it keeps the function get one that restores our setting, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import CheckpointFunction, _CheckpointFrame


def keep_setting(bound: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Has every checkpoint keep ``bound(function)`` for its second run."""
    make_frame, run = _CheckpointFrame.__init__, CheckpointFunction.forward

    def init(self: _CheckpointFrame, recompute_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        make_frame(self, bound(recompute_fn), *args, **kwargs)

    def forward(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:  # use_reentrant=True
        return run(ctx, bound(run_function), *args)

    _CheckpointFrame.__init__ = init  # type: ignore[method-assign]
    CheckpointFunction.forward = staticmethod(forward)  # type: ignore[method-assign]
