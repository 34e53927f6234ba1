"""Where a trained model is: a run's folder, this package, the hub; its tokenizer, and whether its denoisers fit it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from walt.atomic import no_folder
from walt.checkpoint import MADE_BY, best_weights, checkpoint_folder, load_description, load_weights, read_tensors
from walt.errors import WaltError, as_user_error, did_you_mean, require
from walt.model.config import TokenizerConfig
from walt.model.tokenizer import Tokenizer

DENOISERS = {folder: stage for folder, stage in MADE_BY.items() if folder != "tokenizer"}

PACKAGED = Path(__file__).parent / "weights"  # a folder for each model in this package
TINY_DOOM = "tiny-doom"  # what commands use if no other model is named
HUB = "hub:"


def packaged() -> tuple[str, ...]:
    """The names of the models in this package."""
    return tuple(sorted(path.name for path in PACKAGED.iterdir() if path.is_dir())) if PACKAGED.is_dir() else ()


def model_folder(name: str | Path) -> Path:
    """The folder of a trained model; one on the Hugging Face hub, "hub:<owner>/<name>", is downloaded once.

    name: a folder, or if there is no trained model of that name, one in this package. WaltError if it is neither.
    """
    if str(name).startswith(HUB):
        hub = require("huggingface_hub", "hub")
        try:
            files = ["*.json", "*.safetensors"]
            return Path(hub.snapshot_download(str(name).removeprefix(HUB), allow_patterns=files))
        except (OSError, ValueError) as error:
            raise WaltError(f"{name} cannot be downloaded: {error}") from error
    folder = Path(name)
    if str(folder) in packaged() and checkpoint_folder(folder / "tokenizer") is None:
        folder = PACKAGED / folder
    if not folder.is_dir():
        raise no_folder(folder, did_you_mean(str(name), packaged()))
    check_run_folder(folder)
    return folder


def check_run_folder(folder: Path) -> None:
    """WaltError if it is the folder of a stage, in the folder of the run that is wanted."""
    if folder.name in MADE_BY and checkpoint_folder(folder) is not None:
        raise WaltError(f"{folder} is a stage of a run; give the run's folder, {folder.parent}")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, averaged weights if it has them."""
    folder, document = load_description(folder, "tokenizer")
    with as_user_error(str(folder / "config.json")):
        # Checkpoints older than the field have no adaptive norms.
        model = Tokenizer(TokenizerConfig.from_dict({"adaptive_norm": False, **document.get("config", {})}))
    path = best_weights(folder)
    load_weights(model, read_tensors(path), path)
    return model.eval()


def tokenizer_mismatches(folder: Path, key: str, names: Iterable[str] = DENOISERS) -> Iterator[str]:
    """An error message for each denoiser in the folder that was not trained with its tokenizer, of fingerprint `key`.

    Checkpoints that name no tokenizer are passed over.
    """
    for name in names:
        if checkpoint_folder(folder / name) is None:
            continue
        _, document = load_description(folder / name, "transformer")
        if (document.get("tokenizer") or key) != key:
            yield (
                f"{folder / name} was trained on the latents of another tokenizer than {folder / 'tokenizer'} holds;"
                f" remove it and train it again (walt train {DENOISERS[name]}), or put its tokenizer back"
            )
