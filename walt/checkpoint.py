"""Checkpoints: a folder of safetensors and JSON files, replaced as a whole. Nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from walt.errors import WaltError
from walt.files import read_json, replacing_folder, settled

FORMAT = "walt-checkpoint"
VERSION = 1


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """safetensors file; a failed write (a full disk) is an OSError like any other."""
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def save_checkpoint(
    folder: str | Path,
    kind: str,
    description: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json (kind, description), `<name>.safetensors` for each group of tensors, and state.json, if any.

    The folder appears complete or not at all; one that was there is replaced. WaltError if the disk is full.
    """
    document = {"format": FORMAT, "version": VERSION, "kind": kind, **description}
    with replacing_folder(folder) as temporary:
        for name, group in tensors.items():
            write_tensors(temporary / f"{name}.safetensors", group)
        if state is not None:
            (temporary / "state.json").write_text(json.dumps(state))
        (temporary / "config.json").write_text(json.dumps(document, indent=2) + "\n")


def checkpoint_folder(folder: str | Path) -> Path | None:
    """The complete checkpoint at folder, or None."""
    found = settled(folder)
    return found if (found / "config.json").is_file() else None


def load_description(folder: str | Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """The complete folder and what its config.json says; WaltError if it is missing, foreign or of another kind."""
    folder = settled(folder)
    if not folder.is_dir():
        raise WaltError(f"no such checkpoint: {folder}")
    path = folder / "config.json"
    if not path.is_file():
        raise WaltError(f"{folder} is not a checkpoint: it has no config.json")
    document = read_json(path)
    if document.get("format") != FORMAT:
        raise WaltError(f'{path} is not a checkpoint of walt (its "format" is {document.get("format")!r})')
    if document.get("version") != VERSION:
        raise WaltError(f"{path} has version {document.get('version')!r}; this walt reads version {VERSION}")
    if document.get("kind") != kind:
        raise WaltError(f"{folder} holds a {document.get('kind')}, expected a {kind}")
    return folder, document


def read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise WaltError(f"{path.parent} is not a complete checkpoint: {path.name} is missing")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise WaltError(f"{path} is broken: {error}") from error


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors into module; WaltError names the first tensor that is missing, unknown or of another shape."""
    own = module.state_dict()
    missing = [name for name in own if name not in tensors]
    unknown = [name for name in tensors if name not in own]
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which the model does not"
        raise WaltError(f"{path} does not fit its config.json: it {what} ({len(missing) + len(unknown)} such tensors)")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise WaltError(
                f"{path} does not fit its config.json: {name!r} has shape {list(tensors[name].shape)},"
                f" expected {list(tensor.shape)}"
            )
    module.load_state_dict(dict(tensors))


def best_weights(folder: Path) -> Path:
    """The averaged weights where there are some, else the plain ones."""
    averaged = folder / "ema.safetensors"
    return averaged if averaged.is_file() else folder / "model.safetensors"


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state dict as (tensors named "index.key", parameter groups for JSON)."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{key}": torch.as_tensor(value)
        for index, values in state["state"].items()
        for key, value in values.items()
    }
    return tensors, state["param_groups"]


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": groups})
