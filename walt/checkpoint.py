"""Checkpoints: a folder of safetensors and JSON files, replaced as a whole. Nothing is ever unpickled.

Sharded tensors are written by each rank into its own file, `<name>-00001-of-00002.safetensors`, whose header tells
which rows of which tensors it holds. They are read by name like a single file, by any number of ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from walt.atomic import atomic_folder, flush, latest_complete, read_document, staging
from walt.distributed import full, is_rank0, is_sharded, local, local_rows, raise_on_all_ranks, rank, world_size
from walt.errors import WaltError

FORMAT = "walt-checkpoint"
VERSION = 2  # those of version 1 hold states of random generators beside the weights
# A stage's folder in a run: which `walt train` makes it.
MADE_BY = {"tokenizer": "tokenizer", "transformer": "base", "sr1": "sr", "sr2": "sr --level 2"}
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """safetensors file; a failed write (a full disk) is an OSError like any other."""
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def save_checkpoint(
    folder: str | Path,
    kind: str,
    description: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any] | None = None,
    *,
    keep_as: Path | None = None,
) -> None:
    """Write config.json (kind, description), `<name>.safetensors` for each group of tensors, and state.json, if any.

    The folder appears complete or not at all; it replaces an older one, which is moved to `keep_as` or deleted.
    WaltError if the disk is full.
    """
    with atomic_folder(folder, keep_as) as temporary:
        for name, group in tensors.items():
            write_tensors(temporary / f"{name}.safetensors", group)
        _write_documents(temporary, kind, description, state)


def save_together(
    folder: str | Path,
    kind: str,
    description: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep_as: Path | None = None,
) -> None:
    """`save_checkpoint` by all ranks: each writes its shards, rank 0 all else. They need one file system.

    If a rank cannot write, every rank raises WaltError, and the old checkpoint stays.
    """
    if world_size() == 1:
        return save_checkpoint(folder, kind, description, tensors, state, keep_as=keep_as)
    folder, what = Path(folder), f"cannot write {folder}"
    local_tensors = {name: _local_tensors(group) for name, group in tensors.items()}
    with contextlib.ExitStack() as stack:
        with raise_on_all_ranks(what):
            temporary = stack.enter_context(atomic_folder(folder, keep_as)) if is_rank0() else staging(folder)
        with raise_on_all_ranks(what):
            for name, (held, rows) in local_tensors.items():
                sharded = any(is_sharded(tensor) for tensor in tensors[name].values())
                if sharded:
                    path = temporary / f"{name}-{rank() + 1:05d}-of-{world_size():05d}.safetensors"
                    write_tensors(path, held, {"rows": json.dumps(rows)})
                    flush(path)
                elif is_rank0():
                    write_tensors(temporary / f"{name}.safetensors", held)
        with raise_on_all_ranks(what):
            if is_rank0():
                _write_documents(temporary, kind, description, state)
            stack.close()


def _write_documents(folder: Path, kind: str, description: Mapping[str, Any], state: Mapping[str, Any] | None) -> None:
    document = {"format": FORMAT, "version": VERSION, "kind": kind, **description}
    if state is not None:
        (folder / "state.json").write_text(json.dumps(state))
    (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n")


def _local_tensors(group: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    """The tensors of a group that this rank writes, and for sharded ones (first row, rows of all ranks)."""
    held, rows = {}, {}
    for name, tensor in group.items():
        span = local_rows(tensor)
        if span is None:
            complete = full(tensor)  # a collective
            if is_rank0():
                held[name] = complete
        elif span[0] < span[1]:
            held[name] = local(tensor)
            rows[name] = (span[0], tensor.shape[0])
    return held, rows


class TensorFiles:
    """The tensors of `<name>.safetensors`, or of the shards in its place: their shapes, and rows of them on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.metadata: dict[str, str] = {}
        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}  # first row, last + 1, file
        files = [path] if path.is_file() else _shards(path)
        if not files:
            raise WaltError(f"{path.parent} is not a complete checkpoint: {path.name} is missing")
        for file in files:
            with _readable(file):
                self._index(safe_open(file, framework="pt"))
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece[:2])
            rows = self.shapes[name][0] if self.shapes[name] else 1
            ends = [0, *(stop for _, stop, _ in pieces)]
            if ends[-1] != rows or any(start != end for (start, _, _), end in zip(pieces, ends, strict=False)):
                raise WaltError(f"{path} is broken: the shards do not make up {name!r}")

    def _index(self, file: Any) -> None:
        metadata = file.metadata() or {}
        self.metadata |= metadata
        rows = json.loads(metadata.get("rows", "{}"))
        for name in file.keys():  # noqa: SIM118 (no mapping)
            shape = tuple(file.get_slice(name).get_shape())
            first, total = rows.get(name, (0, shape[0] if shape else 1))
            held = shape[0] if shape else 1
            self.shapes[name] = (total, *shape[1:]) if shape else ()
            self._pieces.setdefault(name, []).append((first, first + held, file))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or its rows from rows[0] to rows[1] - 1."""
        pieces = self._pieces[name]
        with _readable(self.path):
            if rows is None and len(pieces) == 1:
                return pieces[0][2].get_tensor(name)
            first, last = rows if rows is not None else (0, self.shapes[name][0])
            tensors = [
                file.get_slice(name)[max(first, start) - start : min(last, stop) - start]
                for start, stop, file in pieces
                if start < last and first < stop
            ]
            return torch.cat(tensors) if tensors else pieces[0][2].get_slice(name)[0:0]

    def read_into(self, targets: Mapping[str, Tensor]) -> None:
        """Copy into tensors of the same names and shapes, sharded ones too; WaltError names the first that differs."""
        _check_fit(targets, self.shapes, self.path)
        with torch.no_grad():
            for name, target in targets.items():
                local(target).copy_(self.read(name, local_rows(target)))


@contextlib.contextmanager
def _readable(path: Path) -> Any:
    try:
        yield
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise WaltError(f"{path} is broken: {error}") from error


def _shards(path: Path) -> list[Path]:
    """The files of all ranks, or none; WaltError if some are missing."""
    found = {}
    for file in path.parent.glob(f"{path.stem}-*.safetensors"):
        if match := SHARD.fullmatch(file.name.removeprefix(path.stem)):
            found[match.groups()] = file
    count = max((int(total) for _, total in found), default=0)
    names = [(f"{i + 1:05d}", f"{count:05d}") for i in range(count)]
    for name in names:
        if name not in found:
            missing = f"{path.stem}-{name[0]}-of-{name[1]}.safetensors"
            raise WaltError(f"{path.parent} is not a complete checkpoint: {missing} is missing")
    return [found[name] for name in names]


def checkpoint_folder(folder: str | Path) -> Path | None:
    """The complete checkpoint at folder, or None."""
    found = latest_complete(folder)
    return found if (found / "config.json").is_file() else None


def load_description(folder: str | Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """The complete folder and what its config.json says; WaltError if it is missing, foreign or of another kind."""
    folder = latest_complete(folder)
    if not folder.is_dir():
        first = f"; run walt train {MADE_BY[folder.name]} --out {folder.parent} first" if folder.name in MADE_BY else ""
        inside = sorted(found.parent for found in folder.parent.glob(f"*/{folder.name}") if found.is_dir())
        raise WaltError(f"no such checkpoint: {folder}{f'; did you mean {inside[0]}?' if inside else first}")
    advice = '; in version 1 weights are the same: set "version" to 2 there'
    document = read_document(folder / "config.json", "a checkpoint", FORMAT, VERSION, advice)
    if document.get("kind") != kind:
        raise WaltError(f"{folder} holds a {document.get('kind')}, expected a {kind}")
    return folder, document


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of the shards in its place."""
    files = TensorFiles(path)
    return {name: files.read(name) for name in files.shapes}


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors into module; WaltError names the first tensor that is missing, unknown or of another shape."""
    _check_fit(module.state_dict(), {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
    module.load_state_dict(dict(tensors))


def _check_fit(targets: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    missing = [name for name in targets if name not in shapes]
    unknown = [name for name in shapes if name not in targets]
    if missing or unknown:
        what = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which the model does not"
        raise WaltError(f"{path} does not fit its config.json: it {what} ({len(missing) + len(unknown)} such tensors)")
    for name, tensor in targets.items():
        if tuple(tensor.shape) != shapes[name]:
            raise WaltError(
                f"{path} does not fit its config.json: {name!r} has shape {list(shapes[name])},"
                f" expected {list(tensor.shape)}"
            )


def weights_in(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state dict with its parameters in dtype (None: as they are); buffers, which are few, keep theirs.

    WaltError for a value that is beyond the dtype's range.
    """
    tensors = dict(module.state_dict())
    for name, parameter in module.named_parameters() if dtype is not None else ():
        tensors[name] = parameter.detach().to(dtype)
        if not bool(tensors[name].isfinite().all()):
            raise WaltError(f"dtype: got {dtype}; expected one whose range holds {name!r}")
    return tensors


def best_weights(folder: Path) -> Path:
    """The averaged weights where there are some, else the plain ones."""
    averaged = folder / "ema.safetensors"
    return averaged if averaged.is_file() or _shards(averaged) else folder / "model.safetensors"


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer, named "index of the parameter.key"; not copied."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{index}.{key}": value
        for index, parameter in enumerate(parameters)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Restore what `optimizer_tensors` gave, into a fresh optimizer of the same parameters. They may be sharded."""
    files = TensorFiles(path)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    used = {name.partition(".")[0] for name in files.shapes}
    # A step of size 0 makes the state's tensors, on the device and sharded as this optimizer wants them.
    rates = [group["lr"] for group in optimizer.param_groups]
    for index, parameter in enumerate(parameters):
        parameter.grad = torch.zeros_like(parameter) if str(index) in used else None
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    files.read_into(optimizer_tensors(optimizer))


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
