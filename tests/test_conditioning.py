"""Conditions of the denoiser: labels, text, known frames, low resolution; and checkpointing, which changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformer_cases import EVERYTHING, FEATURES, SHAPE, SMALL, close, draw, inputs, make

from walt.model.conditioning import Upscale, frame_condition, frame_mask
from walt.model.config import TransformerConfig

TOKENS = replace(FEATURES, text_vocabulary=9)
FRAMES = replace(SMALL, frame_condition=True)
LOW = replace(SMALL, low_resolution=True)


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# Text


@pytest.mark.parametrize("config", [FEATURES, TOKENS], ids=["features", "tokens"])
def test_no_text_is_one_thing(config: TransformerConfig) -> None:
    """Left out, or nothing of it visible, whatever is written there."""
    model, batch = make(config), inputs(2, config)
    nothing = {**batch, "text_mask": torch.zeros_like(batch["text_mask"])}
    before = model(**nothing)
    bare = {name: tensor for name, tensor in batch.items() if not name.startswith("text")}
    close(model(**bare), before)
    close(model(**{**nothing, "text": batch["text"].flip(1)}), before)
    assert difference(model(**batch)[0], before[0]) > 1e-3  # the second text of the batch is empty as well
    model.embed_text.null.add_(draw(*model.embed_text.null.shape))
    assert difference(model(**bare), before) > 1e-3


@pytest.mark.parametrize("config", [FEATURES, TOKENS], ids=["features", "tokens"])
def test_only_visible_tokens_matter(config: TransformerConfig) -> None:
    model, batch = make(config), inputs(1, config)
    before = model(**batch)  # two tokens are visible
    for token in range(config.text_length):
        text = batch["text"].clone()
        text[:, token] += 1
        after = model(**{**batch, "text": text})
        assert torch.equal(after, before) == (token >= 2), token
    short = {"text": batch["text"][:, :2], "text_mask": batch["text_mask"][:, :2]}
    close(model(**{**batch, **short}), before)
    del short["text_mask"]
    bare = {name: tensor for name, tensor in batch.items() if name != "text_mask"}
    close(model(**{**bare, **short}), before)


def test_words_in_another_order_are_another_text() -> None:
    """Token ids carry their position; features are the encoder's business and do not."""
    model, batch = make(TOKENS), inputs(1, TOKENS)
    batch["text_mask"].fill_(True)
    assert difference(model(**{**batch, "text": batch["text"].flip(1)}), model(**batch)) > 1e-3
    model, batch = make(FEATURES), inputs(1, FEATURES)
    batch["text_mask"].fill_(True)
    close(model(**{**batch, "text": batch["text"].flip(1)}), model(**batch))


def test_text_reaches_images_one_by_one() -> None:
    """Joint training: cross-attention stays in a frame, so a stack's images are independent given their text."""
    model, batch = make(FEATURES), inputs(2, FEATURES)
    image = torch.tensor([True, False])
    before = model(**batch, image=image)
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    changed["z_t"][0, :, 1] += 1
    after = model(**changed, image=image)
    for frame in range(3):
        assert torch.equal(after[0, :, frame], before[0, :, frame]) == (frame != 1)
    changed["text"][0, 0] += 1
    everywhere = model(**changed, image=image)
    for frame in range(3):
        assert difference(everywhere[0, :, frame], after[0, :, frame]) > 1e-5


def test_images_are_refused_where_they_would_see_one_another() -> None:
    config = replace(FEATURES, cross_attention="all")
    with pytest.raises(ValueError, match='image: got a tensor; expected None: with cross_attention="all"'):
        make(config)(**inputs(2, config), image=torch.tensor([True, False]))


def test_cross_attention_sees_other_frames_only_with_all() -> None:
    """Another frame is out of sight, but not in the spacetime layers' own windows."""
    for cross, windows in (("spatial", [(1, 4, 6)] * 3), ("all", [(1, 4, 6), (3, 2, 3), (1, 4, 6)])):
        config = replace(FEATURES, cross_attention=cross)
        assert config.cross_windows() == windows
        model, batch = make(config), inputs(2, config)
        with torch.no_grad():  # a spacetime layer whose self-attention is closed
            model.layers[1].attention.proj.weight.zero_()
        before = model(**batch)
        batch["z_t"][:, :, 2] += 1
        after = model(**batch)
        assert torch.equal(after[:, :, 0], before[:, :, 0]) == (cross == "spatial")


# Known frames


def test_frame_condition_is_the_known_frames_and_their_mask() -> None:
    clean, known = draw(4, 2, 3, 2, 2), torch.tensor([0, 1, 2, 3])
    clean[1, :, 1] = float("nan")  # what is not known is not looked at
    joined = frame_condition(clean, known)
    assert joined.shape == (4, 3, 3, 2, 2)
    assert frame_mask(known, 3).shape == (4, 1, 3, 1, 1)
    for b in range(4):
        for t in range(3):
            expected = clean[b, :, t] if t < b else torch.zeros(2, 2, 2)
            assert torch.equal(joined[b, :2, t], expected.double())
            assert (joined[b, 2, t] == float(t < b)).all()


def test_only_known_frames_matter() -> None:
    model, batch = make(FRAMES), inputs(2, FRAMES)  # 1 and 2 frames are known
    before = model(**batch)
    for frame, seen in ((0, [True, True]), (1, [False, True]), (2, [False, False])):
        changed = {**batch, "frames": batch["frames"].clone()}
        changed["frames"][:, :, frame] += 1
        after = model(**changed)
        assert [not torch.equal(a, b) for a, b in zip(after, before, strict=True)] == seen
    without = {name: tensor for name, tensor in batch.items() if name not in ("frames", "known")}
    assert torch.equal(model(**without), model(**{**batch, "known": torch.zeros(2, dtype=torch.int64)}))


# Low resolution


def test_upscale_keeps_places_and_frames() -> None:
    torch.manual_seed(0)
    upscale = Upscale(3).double().requires_grad_(False)
    latent = draw(2, 3, 4, 3, 5)
    out = upscale(latent)
    assert out.shape == (2, 3, 4, 6, 10)
    latent[1, :, 2, 1, 3] += 1
    changed = (upscale(latent) != out).any(dim=1).nonzero()
    assert changed[:, 0].unique().tolist() == [1]
    assert changed[:, 1].unique().tolist() == [2]
    assert changed[:, 2].unique().tolist() == [0, 1, 2, 3, 4, 5]  # rows 0 to 2, twice as high
    assert changed[:, 3].unique().tolist() == [4, 5, 6, 7, 8, 9]


def test_low_resolution_of_a_stack_stays_with_its_image() -> None:
    model, batch = make(LOW), inputs(2, LOW)
    image = torch.tensor([True, False])
    before = model(**batch, image=image)
    batch["low_resolution"][:, :, 1] += 1
    after = model(**batch, image=image)
    assert [not torch.equal(after[0, :, t], before[0, :, t]) for t in range(3)] == [False, True, False]
    assert [not torch.equal(after[1, :, t], before[1, :, t]) for t in range(3)] == [True, True, True]


@pytest.mark.parametrize("name", ["text", "known", "frames", "low_resolution", "noise_level"])
def test_every_condition_matters(name: str) -> None:
    model, batch = make(EVERYTHING), inputs(2, EVERYTHING)
    before = model(**batch)
    changed = {**batch, name: batch[name] - 1 if name == "known" else batch[name] + 1}
    if name == "text":
        changed["text"] = changed["text"] % EVERYTHING.text_vocabulary
    assert difference(model(**changed)[0], before[0]) > 1e-4


def test_samples_do_not_depend_on_their_batch() -> None:
    model, batch = make(EVERYTHING), inputs(4, EVERYTHING)
    together = model(**batch)
    for i in range(4):
        close(model(**{name: tensor[i : i + 1] for name, tensor in batch.items()}), together[i : i + 1])


# Checkpointing


@pytest.mark.parametrize("config", [SMALL, EVERYTHING], ids=["small", "everything"])
def test_checkpointing_changes_no_gradient(config: TransformerConfig) -> None:
    model, batch = make(config).requires_grad_(True), inputs(2, config)
    calls = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(None))
    gradients, passes = [], []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        model(**batch, image=torch.tensor([True, False])).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        passes.append(len(calls))
        calls.clear()
    assert passes == [config.layers, 2 * config.layers]
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text": torch.zeros(2, 4)},
            r"text: got torch.float32 \(2, 4\); expected token ids, torch.int64 \[B, 1 to 4\]",
        ),
        ({"text": torch.zeros(2, 5, dtype=torch.int64)}, r"text: got torch.int64 \(2, 5\)"),
        ({"text": torch.full((2, 4), 9)}, "text: got values 9 .. 9; expected 0 .. 8"),
        ({"text_mask": torch.ones(2, 4)}, r"text_mask: got torch.float32 \(2, 4\); expected bool \(2, 4\)"),
        ({"text": None}, "text_mask: got a tensor; expected None without text"),
        ({"known": None}, "known: got None beside frames; expected both or neither"),
        ({"frames": None}, "frames: got None beside known"),
        ({"known": torch.ones(2)}, r"known: got torch.float32 \(2,\); expected torch.int64 \[2\]"),
        ({"frames": torch.zeros(2, 4, 1, 4, 6)}, r"frames: got shape \(2, 4, 1, 4, 6\); expected \(2, 4, 3, 4, 6\)"),
        ({"low_resolution": None}, "low_resolution: got None; expected a tensor"),
        ({"noise_level": None}, "noise_level: got None; expected a tensor"),
        ({"noise_level": torch.zeros(3)}, r"noise_level: got shape \(3,\); expected \(2,\)"),
        ({"low_resolution": torch.zeros(SHAPE)}, r"low_resolution: got shape .*; expected \(2, 4, 3, 2, 3\)"),
    ],
)
def test_bad_conditions(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(EVERYTHING)(**{**inputs(2, EVERYTHING), **changes})


def test_bad_text_features() -> None:
    model, batch = make(FEATURES), inputs(2, FEATURES)
    with pytest.raises(ValueError, match=r"text: got torch.float32 \(2, 5, 7\); expected features, floating point"):
        model(**{**batch, "text": torch.zeros(2, 5, 7)})
    with pytest.raises(ValueError, match="text: got 3 texts; expected 2"):
        model(**{**batch, "text": draw(3, 5, 12), "text_mask": None})


@pytest.mark.parametrize("name", ["text", "text_mask", "frames", "low_resolution", "noise_level"])
def test_conditions_that_the_model_was_made_without(name: str) -> None:
    given = {name: inputs(2, EVERYTHING)[name]}
    if name == "frames":
        given["known"] = torch.ones(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"{name}: got a tensor; expected None"):
        make()(**inputs(), **given)
