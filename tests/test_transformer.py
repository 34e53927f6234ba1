"""The denoiser: the forward pass in plain PyTorch, joint batches of videos and images, compilation, errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformer_cases import EVERYTHING, FEATURES, SHAPE, SMALL, close, draw, inputs, make

from walt.model.config import TransformerConfig
from walt.model.transformer import Transformer, patchify, unpatchify

# The forward pass


def plain_attention(q: Tensor, k: Tensor, v: Tensor, part: torch.nn.Module, bias: Tensor, visible: Tensor) -> Tensor:
    """One head after another of q [N, width] against k, v [M, width]; visible bool [N, M], bias [heads, N, M] or 0."""
    heads = part.heads
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    q = F.layer_norm(q, q.shape[-1:], eps=1e-6) * part.q_norm
    k = F.layer_norm(k, k.shape[-1:], eps=1e-6) * part.k_norm
    scores = (q @ k.mT / q.shape[-1] ** 0.5 + bias).masked_fill(~visible, float("-inf"))
    return part.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))


def plain_embedding(embed: torch.nn.Module, time: Tensor) -> Tensor:
    half = embed.features // 2
    angles = time.float() * torch.exp(torch.arange(half) * (-math.log(10000) / half))
    return embed.second(F.silu(embed.first(torch.cat([angles.cos(), angles.sin()]).double())))


def plain_forward(model: Transformer, image: Tensor, **batch: Tensor) -> Tensor:
    """The paper's sections 3.2 to 3.5 for one sample after another, token by token masks, nothing fused."""
    config, outputs = model.config, []
    grid, p = config.grid, config.patch
    places = torch.cartesian_prod(*map(torch.arange, grid))
    frame = places[:, 0]
    for b in range(image.shape[0]):
        given = {name: tensor[b] for name, tensor in batch.items()}
        channels = [given["z_t"], given["self_condition"]]
        if config.frame_condition:
            mask = (torch.arange(grid[0]) < given["known"]).double()[:, None, None].expand_as(given["z_t"][0])
            channels += [mask * given["frames"], mask[None]]
        if config.low_resolution:
            conv = model.upscale.conv
            four = F.conv2d(given["low_resolution"].transpose(0, 1), conv.weight[:, :, 0], conv.bias, padding=1)
            channels.append(F.pixel_shuffle(four, 2).transpose(0, 1))
        pixels = torch.cat(channels)
        tokens = torch.stack([pixels[:, t, p * y : p * y + p, p * x : p * x + p].flatten() for t, y, x in places])
        standing = torch.zeros_like(frame) if image[b] else frame
        x = model.project_in(tokens) + model.time_table[standing] + model.space_table[places[:, 1], places[:, 2]]

        cond = plain_embedding(model.embed_time, given["time"])
        if config.classes:
            cond = cond + model.embed_class.table[given["label"]]
        if config.low_resolution:
            cond = cond + plain_embedding(model.embed_noise, given["noise_level"])
        base = F.silu(cond) @ model.modulation.base.weight.T + model.modulation.base.bias
        if config.text_width:
            embed, seen = model.embed_text, given["text_mask"]
            text = given["text"][seen]
            if config.text_vocabulary:
                text = embed.table[text] + embed.positions[: len(seen)][seen]
            text = text if seen.any() else embed.null[None]
            text = F.layer_norm(embed.project(text), (config.width,), eps=1e-6)

        for i, layer in enumerate(model.layers):
            low = model.modulation.up[i] @ (model.modulation.down[i] @ cond)
            parts = iter((base + low).unflatten(0, (3, config.sublayers, -1)).transpose(0, 1))
            g, s, a = next(parts)
            h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + g) + s
            window = torch.tensor(config.spacetime_window if i % 2 else config.spatial_window)
            shared = (places[:, None] // window == places[None] // window).all(-1)
            if i % 2 and image[b]:
                shared = torch.eye(len(places), dtype=torch.bool)
            offset = torch.minimum((places[:, None] - places[None] + window - 1).clamp_min(0), 2 * window - 2)
            bias = layer.attention.bias_table[:, offset[..., 0], offset[..., 1], offset[..., 2]]
            x = x + a * plain_attention(*layer.attention.qkv(h).chunk(3, -1), layer.attention, bias, shared)
            if config.text_width:
                g, s, a = next(parts)
                h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + g) + s
                window = torch.tensor(config.cross_windows()[i])
                shared = (places[:, None] // window == places[None] // window).all(-1)
                k, v = layer.cross.kv(torch.cat([h, text])).chunk(2, -1)
                shared = F.pad(shared, (0, len(text)), value=True)
                x = x + a * plain_attention(layer.cross.q(h), k, v, layer.cross, torch.zeros(()), shared)
            g, s, a = next(parts)
            h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + g) + s
            x = x + a * layer.mlp[2](F.gelu(layer.mlp[0](h), approximate="tanh"))

        g, shift = model.final_modulation(F.silu(cond)).chunk(2)
        x = model.project_out(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + g) + shift)
        out = torch.empty_like(given["z_t"])
        for token, (t, row, column) in zip(x, places, strict=True):
            out[:, t, p * row : p * row + p, p * column : p * column + p] = token.reshape(-1, p, p)
        outputs.append(out)
    return torch.stack(outputs)


@pytest.mark.parametrize("config", [SMALL, EVERYTHING, FEATURES], ids=["small", "everything", "features"])
def test_forward_is_the_paper_in_plain_pytorch(config: TransformerConfig) -> None:
    model = make(config)
    batch = inputs(4, config)
    image = torch.tensor([True, False, False, True])
    close(model(**batch, image=image), plain_forward(model, image, **batch))


def test_cross_attention_in_every_window_is_the_paper_in_plain_pytorch() -> None:
    config = replace(FEATURES, cross_attention="all")
    model, batch = make(config), inputs(2, config)
    close(model(**batch), plain_forward(model, torch.zeros(2, dtype=torch.bool), **batch))


def test_starts_as_zero_and_identity() -> None:
    torch.manual_seed(0)
    model = Transformer(SMALL).double()
    assert not model(**inputs()).any()
    assert not model.final_modulation.weight.any()
    # With an open output, a closed gate still makes every layer the identity: the blocks cannot matter.
    with torch.no_grad():
        model.project_out.weight.normal_()
        before = model(**inputs())
        for layer in model.layers:
            for parameter in layer.parameters():
                parameter.normal_()
        assert torch.equal(model(**inputs()), before)


def test_separate_adaln_with_equal_layers_is_lora_without_its_pairs() -> None:
    lora = make()
    with torch.no_grad():
        lora.modulation.up.zero_()
    separate = make(replace(SMALL, adaln="separate"))
    state = {name: value for name, value in lora.state_dict().items() if not name.startswith("modulation.")}
    for i in range(SMALL.layers):
        for part in ("weight", "bias"):
            state[f"modulation.layers.{i}.{part}"] = getattr(lora.modulation.base, part)
    separate.load_state_dict(state)
    close(separate(**inputs()), lora(**inputs()))


@pytest.mark.parametrize("patch", [1, 2])
def test_patches(patch: int) -> None:
    x = draw(2, 3, 5, 4, 6)
    tokens, grid = patchify(x, patch)
    assert grid == (5, 4 // patch, 6 // patch)
    assert tokens.shape == (2, 5 * 24 // patch**2, 3 * patch**2)
    assert torch.equal(unpatchify(tokens, grid, patch), x)
    # The second token of a row holds the second patch of that row, channel by channel.
    assert torch.equal(tokens[0, 1], x[0, :, 0, :patch, patch : 2 * patch].flatten())


@pytest.mark.parametrize(
    "changes",
    [
        {"patch": 2, "spatial_window": (1, 2, 3), "spacetime_window": (3, 1, 2)},
        {"qk_norm": False, "bias_tables": False},
        {"adaln": "separate", "classes": 0},
        {"self_condition": False},
        {"layers": 1},
        {"spacetime_window": (5, 3, 4)},
        {
            name: getattr(EVERYTHING, name)
            for name in ("text_width", "text_vocabulary", "frame_condition", "low_resolution")
        },
    ],
)
def test_gradients_reach_every_parameter(changes: dict) -> None:
    config = replace(SMALL, **changes)
    model = make(config).requires_grad_(True)
    batch = inputs(2, config)
    out = model(**batch, image=torch.tensor([False, True]))
    assert out.shape == batch["z_t"].shape
    (out * draw(*out.shape, seed=2)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_is_the_slope() -> None:
    model = make()
    batch, direction = inputs(), draw(*SHAPE, seed=5)
    image = torch.tensor([False, True])

    def energy(z_t: Tensor) -> Tensor:
        return model(**{**batch, "z_t": z_t}, image=image).square().mean()

    z_t = batch["z_t"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(energy(z_t), z_t)
    ends = [energy(batch["z_t"] + sign * 1e-5 * direction) for sign in (1, -1)]
    torch.testing.assert_close((slope * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-12)


# Joint batches


def test_tangent_is_the_slope() -> None:
    """Forward mode, by which consistency and flow-map models train."""
    model, given = make(EVERYTHING), inputs(config=EVERYTHING)
    z = given.pop("z_t")
    step = draw(*z.shape, seed=9)
    value, tangent = torch.func.jvp(lambda z: model(z, **given), (z,), (step,))
    close(value, model(z, **given))
    slope = (model(z + 1e-5 * step, **given) - model(z - 1e-5 * step, **given)) / 2e-5
    torch.testing.assert_close(tangent, slope, rtol=1e-6, atol=1e-7)


def test_vmap_is_a_batch() -> None:
    model, given = make(), inputs()
    together = torch.func.vmap(lambda given: model(**{k: v[None] for k, v in given.items()})[0])(given)
    close(together, model(**given))


def test_images_of_a_stack_do_not_see_one_another() -> None:
    model, batch = make(), inputs()
    image = torch.tensor([True, False])
    before = model(**batch, image=image)
    for frame in range(3):
        changed = {name: tensor.clone() for name, tensor in batch.items()}
        for name in ("z_t", "self_condition"):
            changed[name][0, :, frame] += 1
        after = model(**changed, image=image)
        for other in range(3):
            assert torch.equal(after[0, :, other], before[0, :, other]) == (other != frame)
        assert torch.equal(after[1], before[1])


def test_frames_of_a_video_do() -> None:
    model, batch = make(), inputs()
    before = model(**batch, image=torch.tensor([True, False]))
    batch["z_t"][1, :, 2] += 1
    after = model(**batch, image=torch.tensor([True, False]))
    for frame in range(3):
        assert not torch.equal(after[1, :, frame], before[1, :, frame])


def test_every_image_of_a_stack_stands_at_frame_0() -> None:
    model, batch = make(), inputs()
    image = torch.tensor([True, True])
    stack = model(**batch, image=image)
    order = [2, 0, 1]
    shuffled = {**batch, **{name: batch[name][:, :, order] for name in ("z_t", "self_condition")}}
    close(model(**shuffled, image=image), stack[:, :, order])
    for frame in range(3):
        alone = {**batch, **{name: batch[name][:, :, frame : frame + 1] for name in ("z_t", "self_condition")}}
        close(model(**alone, image=image), stack[:, :, frame : frame + 1])
    assert (model(**batch) - stack).abs().max() > 1e-3


def test_samples_do_not_depend_on_their_batch() -> None:
    model, batch = make(), inputs(4)
    image = torch.tensor([False, True, False, True])
    together = model(**batch, image=image)
    for i in range(4):
        alone = {name: tensor[i : i + 1] for name, tensor in batch.items()}
        close(model(**alone, image=image[i : i + 1]), together[i : i + 1])
        if not image[i]:
            close(model(**alone), together[i : i + 1])


# Conditions


@pytest.mark.parametrize("config", [SMALL, FEATURES, EVERYTHING], ids=["plain", "text", "everything"])
def test_an_empty_batch(config: TransformerConfig) -> None:
    given = inputs(2, config)
    out = make(config)(**{name: value[:0] for name, value in given.items()})
    assert out.shape == (0, *given["z_t"].shape[1:])


def test_labels_per_frame() -> None:
    model, batch = make(), inputs()
    image = torch.tensor([True, True])
    per_frame = batch["label"][:, None].expand(2, 3).clone()
    before = model(**batch, image=image)
    close(model(**{**batch, "label": per_frame}, image=image), before)
    per_frame[0, 1] = 4
    after = model(**{**batch, "label": per_frame}, image=image)
    close(after[0, :, [0, 2]], before[0, :, [0, 2]])
    assert (after[0, :, 1] - before[0, :, 1]).abs().max() > 1e-3


def test_what_is_left_out_has_a_value() -> None:
    model, batch = make(), inputs()
    zeros, nothing = torch.zeros(SHAPE, dtype=torch.float64), torch.full((2,), SMALL.classes)
    expected = model(
        batch["z_t"], batch["time"], label=nothing, image=torch.zeros(2, dtype=torch.bool), self_condition=zeros
    )
    close(model(batch["z_t"], batch["time"]), expected)


@pytest.mark.parametrize("name", ["time", "label", "self_condition"])
def test_every_condition_matters(name: str) -> None:
    model, batch = make(), inputs()
    before = model(**batch)
    changed = {**batch, name: batch[name] + 1 if name != "time" else batch[name] - 1}
    assert (model(**changed) - before).abs().max() > 1e-4


def test_neighbouring_steps_are_apart_in_bfloat16() -> None:
    model = Transformer(SMALL).to(torch.bfloat16)
    embedded = model.embed_time(torch.tensor([998, 999]))
    assert embedded.dtype == torch.bfloat16
    assert not torch.equal(embedded[0], embedded[1])


def test_float_steps() -> None:
    model, batch = make(), inputs()
    close(model(**{**batch, "time": batch["time"].float()}), model(**batch))


@pytest.mark.parametrize(("config", "dynamic"), [(SMALL, True), (EVERYTHING, None)])
def test_compiles_without_graph_breaks_or_recompiles(config: TransformerConfig, dynamic: bool | None) -> None:
    model = make(config)
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)
    for batch in (2, 3, 4):
        arguments = {**inputs(batch, config), "image": torch.arange(batch) % 2 == 0}
        expected = model(**arguments)
        for tensor in arguments.values() if dynamic is None else ():
            torch._dynamo.mark_dynamic(tensor, 0)
        close(compiled(**arguments), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("config", [SMALL, EVERYTHING], ids=["small", "everything"])
def test_autocast_costs_no_more_than_its_rounding(config: TransformerConfig) -> None:
    model, batch = make(config).float(), inputs(2, config)
    batch = {name: t.float() if t.is_floating_point() else t for name, t in batch.items()}
    expected = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch)
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() / expected.norm() < 4 * torch.finfo(torch.bfloat16).eps


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z_t": torch.zeros(2, 3, 3, 4, 6)}, r"z_t: got shape \(2, 3, 3, 4, 6\); expected \[B, 4, 1 to 3, 4, 6\]"),
        ({"z_t": torch.zeros(2, 4, 4, 4, 6)}, r"z_t: got shape \(2, 4, 4, 4, 6\)"),
        ({"z_t": torch.zeros(2, 4, 3, 8, 6)}, r"z_t: got shape \(2, 4, 3, 8, 6\)"),
        ({"z_t": torch.zeros(4, 3, 4, 6)}, r"z_t: got shape \(4, 3, 4, 6\)"),
        ({"time": torch.zeros(3)}, r"time: got shape \(3,\); expected \[2\]"),
        ({"label": torch.zeros(3, dtype=torch.int64)}, r"label: got shape \(3,\); expected \[2\] or \[2, 3\]"),
        ({"label": torch.tensor([0, 6])}, r"label: got values 0 .. 6; expected 0 .. 4"),
        ({"label": torch.tensor([-1, 0])}, r"label: got values -1 .. 0; expected 0 .. 4"),
        ({"image": torch.zeros(2)}, r"image: got torch.float32 \(2,\); expected torch.bool \[2\]"),
        ({"image": torch.zeros(3, dtype=torch.bool)}, r"image: got torch.bool \(3,\); expected torch.bool \[2\]"),
        ({"self_condition": torch.zeros(2, 4, 1, 4, 6)}, r"self_condition: got shape \(2, 4, 1, 4, 6\); expected"),
    ],
)
def test_bad_inputs(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(**{**inputs(), **changes})


def test_inputs_that_the_model_was_made_without() -> None:
    model = make(replace(SMALL, classes=0, self_condition=False))
    with pytest.raises(ValueError, match="label: got a tensor; expected None"):
        model(draw(*SHAPE), torch.zeros(2), label=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="self_condition: got a tensor; expected None"):
        model(draw(*SHAPE), torch.zeros(2), self_condition=draw(*SHAPE))
    with pytest.raises(TypeError, match=r"label: got dtype torch.int32; expected torch.int64"):
        make()(draw(*SHAPE), torch.zeros(2), label=torch.zeros(2, dtype=torch.int32))
