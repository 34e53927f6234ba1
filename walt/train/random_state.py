"""The random generators that a training run draws from, as tensors that are saved with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from walt.distributed import all_gather, is_main, rank
from walt.errors import WaltError


class RandomState:
    """`generator`, the same on every rank, for what is drawn for the global batch; and torch's global ones, for the
    rest (dropout), which are each rank's own."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        if not is_main():
            torch.manual_seed(seed + rank())

    def get(self) -> dict[str, Tensor]:
        state = {"generator": self.generator.get_state(), "global": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def set(self, state: Mapping[str, Tensor]) -> None:
        """Set those generators whose state is given."""
        if "generator" in state:
            self.generator.set_state(state["generator"])
        if "global" in state:
            torch.set_rng_state(state["global"])
        if "cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def of_all_ranks(self) -> dict[str, Tensor]:
        """What to save; every rank takes part. Those of rank i > 0 are named "global.i" and "cuda.i"."""
        mine = self.get()
        state = {"generator": mine.pop("generator")}
        for name, tensor in mine.items():
            state |= {f"{name}.{i}" if i else name: other for i, other in enumerate(all_gather(tensor))}
        return state

    def restore(self, saved: Mapping[str, Tensor], path: Path) -> None:
        """This rank's states from what `of_all_ranks` gave; a rank that there was not then keeps what it has."""
        suffix = f".{rank()}" if rank() else ""
        names = {"generator": "generator", "global": f"global{suffix}", "cuda": f"cuda{suffix}"}
        try:
            self.set({name: saved[key] for name, key in names.items() if key in saved})
        except (RuntimeError, TypeError) as error:
            raise WaltError(f"{path} is broken: {error}") from error
