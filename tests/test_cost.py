"""walt.model.cost: the memory of activations is what autograd really saves; what `walt info` prints."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from walt.commands import info
from walt.commands.info import describe, networks, table
from walt.errors import WaltError
from walt.model.config import TokenizerConfig, TransformerConfig
from walt.model.cost import activation_bytes, saved_bytes
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.presets import PRESETS


class TestActivations:
    @pytest.mark.parametrize("name", ["tiny", "tiny-text", "tiny-sr", "minimal"])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_equal_those_of_a_real_pass(self, name, checkpointing):
        """Of all layers, on tensors with memory; ids and labels aside to the byte."""
        config = PRESETS[name][1]
        found = activation_bytes(config, 2, checkpointing=checkpointing)
        without = replace(config, classes=0, text_vocabulary=0)
        assert found == saved_bytes(without, 2, checkpointing=checkpointing)
        assert found == pytest.approx(saved_bytes(config, 2, checkpointing=checkpointing), rel=0.01)

    @pytest.mark.parametrize("layers", [1, 2, 3, 5, 7, 8])
    def test_any_number_of_layers(self, layers):
        config = replace(PRESETS["minimal"][1], layers=layers, classes=0)
        assert activation_bytes(config, 1) == saved_bytes(config, 1)

    def test_hold_what_must_be_kept(self):
        """At least the inputs of the large products: of each layer width * tokens * (1 + 3 + 1 + 1 + 4 + 4) numbers."""
        config = PRESETS["tiny"][1]
        least = 4 * config.layers * config.tokens * config.width * 14
        assert least < activation_bytes(config, 1) < 3 * least

    def test_grow_with_the_batch(self):
        config = PRESETS["tiny"][1]
        one, two, three = (activation_bytes(config, batch) for batch in (1, 2, 3))
        assert three - two == two - one
        assert 1.9 < two / one <= 2

    def test_checkpointing_keeps_much_less(self):
        config = PRESETS["L"][1]
        plain, checkpointed = (activation_bytes(config, 1, checkpointing=value) for value in (False, True))
        assert checkpointed < plain / 5
        # The residual stream and the normed input of every layer are kept.
        assert checkpointed > 2 * 4 * config.layers * config.tokens * config.width


@pytest.fixture
def quick(monkeypatch):
    """Activations, which take a second a preset, as if they were known."""
    monkeypatch.setattr(info, "activation_bytes", lambda _, batch, checkpointing=False: batch * 3 * 2**20)


class TestText:
    def test_of_the_paper_s_model(self):
        lines = {line.strip().split("  ")[0]: line for line in describe("L").splitlines()}
        assert "17 x 128 x 128" in lines["video"]
        assert "5 x 16 x 16, 8 channels" in lines["latent"]
        assert "1280 = 5 x 16 x 16, patch 1" in lines["tokens"]
        assert "101 classes" in lines["conditions"]
        assert "313.2 M" in lines["transformer"]
        # 24 layers of d = 1024 on 1280 tokens: 24 d^2 N for each layer, and the windows' scores.
        windows = 4 * 1024 * (12 * 5 * 256**2 + 12 * 4 * 320**2)
        assert f"{24 * 1280 * 16 * 1024**2 / 1e9:.2f} G" in lines["mlp"]
        assert f"{24 * 1280 * 8 * 1024**2 / 1e9:.2f} G" in lines["attention projections"]
        assert f"{windows / 1e9:.2f} G" in lines["attention windows"]

    def test_conditions_and_batch(self, quick):
        assert "text of 256 tokens, first frames" in describe("tiny-text")
        text = describe("tiny-sr", 3)
        assert "conditions       a low resolution\n" in text
        assert "9 MiB of activations for a batch of 3" in text

    def test_table_lists_every_preset(self, quick):
        lines = table().splitlines()
        rows = {line.split()[0]: line.split() for line in lines[1:-1]}
        assert [*rows] == [*PRESETS]
        assert rows["L"][1:4] == ["17x128x128", "5x16x16", "1280"]
        assert "313.2" in rows["L"]
        assert {len(line) for line in lines[:-1]} == {len(lines[0])}  # columns are wide enough
        assert all("3 MiB" in line for line in lines[1:-1])
        for name, (_, transformer) in PRESETS.items():
            assert rows[name][3] == str(transformer.tokens)

    def test_networks_have_the_parameters_of_real_ones(self):
        tokenizer, transformer = networks(*PRESETS["tiny-text"])
        coder, denoiser = PRESETS["tiny-text"]
        assert isinstance(coder, TokenizerConfig)
        assert isinstance(denoiser, TransformerConfig)
        for found, real in ((tokenizer, Tokenizer(coder)), (transformer, Transformer(denoiser))):
            shapes = [{name: tensor.shape for name, tensor in model.named_parameters()} for model in (found, real)]
            assert shapes[0] == shapes[1]
            assert all(tensor.device == torch.device("meta") for tensor in found.parameters())

    @pytest.mark.parametrize(
        ("size", "text"),
        [(512, "0.5 KiB"), (2**20, "1 MiB"), (1023 * 2**20, "1023 MiB"), (7 * 2**29, "3.5 GiB"), (2**45, "32768 GiB")],
    )
    def test_sizes(self, size, text):
        assert info._size(size) == text

    def test_unknown_preset(self):
        with pytest.raises(WaltError, match="unknown preset or folder 'S'; there are tiny, L"):
            describe("S")
