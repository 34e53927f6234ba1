"""What a pipeline's folder holds: tokenizer, denoiser, super-resolution stages; and whether they fit together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from walt.checkpoint import best_weights, checkpoint_folder, load_description, load_weights, read_tensors
from walt.config import DiffusionConfig, TokenizerConfig, TransformerConfig, plain_fields
from walt.diffusion import Diffusion
from walt.errors import WaltError, require, user_values
from walt.text import TextEncoder, check_text
from walt.tokenizer import Tokenizer
from walt.transformer import Transformer

HUB = "hub:"
DENOISERS = {"transformer": "base", "sr1": "sr", "sr2": "sr --level 2"}  # their folders, and what trains them


@dataclass(frozen=True)
class ClipShape:
    """What the model was trained on, in pixels and frames a second."""

    frames: int
    height: int
    width: int
    fps: float

    def __post_init__(self) -> None:
        plain_fields(self)


@dataclass
class Stage:
    """A denoiser, its diffusion process and the clips it makes."""

    transformer: Transformer
    diffusion: Diffusion
    clip: ClipShape


def tokenizer_description(config: TokenizerConfig) -> dict[str, Any]:
    return {"config": config.to_dict()}


def transformer_description(
    config: TransformerConfig, diffusion: DiffusionConfig, clip: ClipShape, classes: Sequence[str], text: str = ""
) -> dict[str, Any]:
    """text: the name of the text encoder."""
    return {
        "config": config.to_dict(),
        "diffusion": diffusion.to_dict(),
        "clip": asdict(clip),
        "classes": list(classes),
        "text": text,
    }


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, averaged weights if it has them."""
    folder, document = load_description(folder, "tokenizer")
    with user_values(str(folder / "config.json")):
        # Checkpoints from before the field was there are of tokenizers without adaptive norms.
        model = Tokenizer(TokenizerConfig.from_dict({"adaptive_norm": False, **document.get("config", {})}))
    path = best_weights(folder)
    load_weights(model, read_tensors(path), path)
    return model.eval()


def load_stage(folder: str | Path) -> tuple[Stage, dict[str, Any]]:
    """The denoiser of a checkpoint folder, averaged weights if it has them, and what its config.json says."""
    folder, document = load_description(folder, "transformer")
    with user_values(str(folder / "config.json")):
        transformer = Transformer(TransformerConfig.from_dict(document.get("config", {})))
        diffusion = Diffusion(DiffusionConfig.from_dict(document.get("diffusion", {})))
        clip = ClipShape(**document.get("clip", {}))
    path = best_weights(folder)
    load_weights(transformer, read_tensors(path), path)
    return Stage(transformer.eval(), diffusion, clip), document


def of_another_tokenizer(folder: Path, key: str, names: Iterable[str] = DENOISERS) -> Iterator[str]:
    """A sentence for each denoiser in the folder that was trained with another tokenizer than that of fingerprint
    `key`, which it holds. Checkpoints that name none are passed over."""
    for name in names:
        if checkpoint_folder(folder / name) is None:
            continue
        _, document = load_description(folder / name, "transformer")
        if (document.get("tokenizer") or key) != key:
            yield (
                f"{folder / name} was trained on the latents of another tokenizer than {folder / 'tokenizer'} holds;"
                f" remove it and train it again (walt train {DENOISERS[name]}), or put its tokenizer back"
            )


def check_fit(tokenizer: Tokenizer, stages: Sequence[Stage], text: TextEncoder | None) -> None:
    """Raise ValueError, naming the field, unless the base model and the super-resolution stages after it fit."""
    parts = [("transformer" if i == 0 else f"sr{i}", stage) for i, stage in enumerate(stages)]
    for i, (name, stage) in enumerate(parts):
        config, clip = stage.transformer.config, stage.clip
        channels, *size = tokenizer.config.latent_shape(clip.frames, clip.height, clip.width)
        _expect(f"{name} latent_channels", config.latent_channels, channels, "as the tokenizer has")
        _expect(f"{name} latent_size", config.latent_size, tuple(size), f"the tokenizer's of {clip}")
        _expect(f"{name} low_resolution", config.low_resolution, i > 0, "by its place in the cascade")
        if config.text_width and text is None:
            raise ValueError(f"text: got no text encoder; expected one: {name} has text_width={config.text_width}")
        if config.text_width and text is not None:
            check_text(config, text)
    for (_, before), (name, after) in pairwise(parts):
        frames, height, width = before.transformer.config.latent_size
        expected = (frames, 2 * height, 2 * width)
        _expect(f"{name} latent_size", after.transformer.config.latent_size, expected, "twice the stage before it")


def _expect(name: str, got: object, expected: object, why: str) -> None:
    if got != expected:
        raise ValueError(f"{name}: got {got}; expected {expected}, {why}")


def local_folder(folder: str | Path) -> Path:
    """The folder; one on the Hugging Face hub, "hub:<owner>/<name>", is downloaded once."""
    if not str(folder).startswith(HUB):
        return Path(folder)
    hub = require("huggingface_hub", "hub")
    try:
        name = str(folder).removeprefix(HUB)
        return Path(hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise WaltError(f"{folder} cannot be downloaded: {error}") from error
