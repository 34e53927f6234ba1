"""The models in a run's folder: reads the tokenizer, and checks that the denoisers were trained with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from walt.checkpoint import best_weights, checkpoint_folder, load_description, load_weights, read_tensors
from walt.errors import as_user_error
from walt.model.config import TokenizerConfig
from walt.model.tokenizer import Tokenizer

DENOISERS = {"transformer": "base", "sr1": "sr", "sr2": "sr --level 2"}  # folder: what `walt train` makes it


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
