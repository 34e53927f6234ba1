"""The denoiser: sizes of the paper, the forward pass in plain PyTorch, joint batches of videos and images, errors."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from walt.config import PRESETS, TransformerConfig
from walt.transformer import Transformer, patchify, unpatchify
from walt_kernels import use_backend

SMALL = TransformerConfig(
    layers=3,
    width=32,
    heads=2,
    latent_channels=4,
    latent_size=(3, 4, 6),
    spatial_window=(1, 4, 6),
    spacetime_window=(3, 2, 3),
    classes=5,
    time_features=16,
)
SHAPE = (2, 4, 3, 4, 6)
L, XL = PRESETS["L"][1], PRESETS["XL"][1]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(config: TransformerConfig = SMALL, seed: int = 0) -> Transformer:
    """A float64 model whose every parameter is away from its initial value."""
    torch.manual_seed(seed)
    model = Transformer(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def inputs(batch: int = 2, config: TransformerConfig = SMALL) -> dict[str, Tensor]:
    shape = (batch, config.latent_channels, *config.latent_size)
    extra = {"self_condition": draw(*shape, seed=1)} if config.self_condition else {}
    label = {"label": torch.arange(batch) % config.classes} if config.classes else {}
    return {"z_t": draw(*shape), "time": torch.tensor([999, 3, 500, 77])[:batch], **label, **extra}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * max(1.0, expected.abs().max().item()))


# Sizes


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (L, 313.2),
        (replace(L, adaln_rank=4), 313.6),
        (replace(L, adaln_rank=16), 315.7),
        (replace(L, adaln_rank=64), 323.9),
        (replace(L, adaln_rank=256), 356.9),
        (replace(L, adaln="separate"), 457.7),
        (XL, 460.0),
    ],
    ids=["L r=2", "L r=4", "L r=16", "L r=64", "L r=256", "L separate", "XL"],
)
def test_parameters_of_the_paper(config: TransformerConfig, millions: float) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    assert abs(sum(p.numel() for p in model.parameters()) / (millions * 1e6) - 1) < 1e-3


def test_flops_of_the_paper() -> None:
    """809 GFLOP a sample of L; 934 if every layer attended to all tokens."""
    assert L.tokens == 1280
    assert round(sum(L.flops().values()) / 1e9) == 809
    full = replace(L, spacetime_window=L.grid)
    doubled = 2 * sum(full.flops().values()) - sum(L.flops().values())  # S layers, too, would grow
    everywhere = sum(L.flops().values()) - L.flops()["attention windows"] + 24 * 4 * 1280**2 * 1024
    assert sum(L.flops().values()) < sum(full.flops().values()) < everywhere < doubled + everywhere
    assert round(everywhere / 1e9) == 934


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, adaln="separate", patch=2, spatial_window=(1, 2, 3))])
def test_flops_are_those_that_run(config: TransformerConfig) -> None:
    """PyTorch counts the products it sees; it sees all of them when our ops run as plain PyTorch."""
    model = make(config)
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        model(**inputs(1, config))
    assert counter.get_total_flops() == sum(config.flops().values())


def test_flops_of_windows_that_do_not_divide() -> None:
    config = replace(SMALL, latent_size=(3, 5, 7), spatial_window=(1, 2, 4), spacetime_window=(2, 5, 3))
    scores = 0
    for window in config.windows():
        cuts = [
            [min(side, size - i) for i in range(0, size, side)] for size, side in zip(config.grid, window, strict=True)
        ]
        scores += sum((a * b * c) ** 2 for a in cuts[0] for b in cuts[1] for c in cuts[2])
    assert config.flops()["attention windows"] == 2 * 2 * scores * config.width


# The forward pass


def plain_forward(model: Transformer, z_t: Tensor, time: Tensor, label: Tensor, self_condition: Tensor, image: Tensor):
    """The paper's sections 3.2 to 3.4 for one sample after another, token by token masks, nothing fused."""
    config, outputs = model.config, []
    grid, dim = config.grid, config.width // config.heads
    places = torch.cartesian_prod(*map(torch.arange, grid))
    frame = places[:, 0]
    for b in range(z_t.shape[0]):
        tokens = torch.cat([z_t[b], self_condition[b]]).permute(1, 2, 3, 0).flatten(0, 2)
        standing = torch.zeros_like(frame) if image[b] else frame
        x = model.project_in(tokens) + model.time_table[standing] + model.space_table[places[:, 1], places[:, 2]]

        half = config.time_features // 2
        angles = time[b].float() * torch.exp(torch.arange(half) * (-math.log(10000) / half))
        features = torch.cat([angles.cos(), angles.sin()]).double()
        assert model.embed_class is not None
        cond = model.embed_time.second(F.silu(model.embed_time.first(features))) + model.embed_class.table[label[b]]
        base = F.silu(cond) @ model.modulation.base.weight.T + model.modulation.base.bias

        for i, layer in enumerate(model.layers):
            low = model.modulation.up[i] @ (model.modulation.down[i] @ cond)
            g1, g2, b1, b2, a1, a2 = (base + low).chunk(6)
            h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + g1) + b1
            q, k, v = (
                part.unflatten(-1, (config.heads, dim)).transpose(0, 1) for part in layer.attention.qkv(h).chunk(3, -1)
            )
            q = F.layer_norm(q, (dim,), eps=1e-6) * layer.attention.q_norm
            k = F.layer_norm(k, (dim,), eps=1e-6) * layer.attention.k_norm
            window = torch.tensor(config.spacetime_window if i % 2 else config.spatial_window)
            shared = (places[:, None] // window == places[None] // window).all(-1)
            if i % 2 and image[b]:
                shared = torch.eye(len(places), dtype=torch.bool)
            offset = torch.minimum((places[:, None] - places[None] + window - 1).clamp_min(0), 2 * window - 2)
            bias = layer.attention.bias_table[:, offset[..., 0], offset[..., 1], offset[..., 2]]
            scores = (q @ k.mT / dim**0.5 + bias).masked_fill(~shared, float("-inf"))
            x = x + a1 * layer.attention.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
            h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + g2) + b2
            x = x + a2 * layer.mlp[2](F.gelu(layer.mlp[0](h), approximate="tanh"))

        g, shift = model.final_modulation(F.silu(cond)).chunk(2)
        x = model.project_out(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + g) + shift)
        outputs.append(x.unflatten(0, grid).permute(3, 0, 1, 2))
    return torch.stack(outputs)


def test_forward_is_the_paper_in_plain_pytorch() -> None:
    model = make()
    batch = inputs(4)
    image = torch.tensor([True, False, False, True])
    close(model(**batch, image=image), plain_forward(model, **batch, image=image))


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


@pytest.mark.parametrize("dynamic", [True, None])
def test_compiles_without_graph_breaks_or_recompiles(dynamic: bool | None) -> None:
    model = make()
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)
    for batch in (2, 3, 4):
        arguments = {**inputs(batch), "image": torch.arange(batch) % 2 == 0}
        expected = model(**arguments)
        for tensor in arguments.values() if dynamic is None else ():
            torch._dynamo.mark_dynamic(tensor, 0)
        close(compiled(**arguments), expected)
    assert len(graphs) == 1


def test_autocast_costs_no_more_than_its_rounding() -> None:
    model, batch = make().float(), {name: t.float() if t.is_floating_point() else t for name, t in inputs().items()}
    expected = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch)
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() / expected.norm() < 4 * torch.finfo(torch.bfloat16).eps


# Errors and configurations


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


def test_configuration_round_trip() -> None:
    for config in (SMALL, *(pair[1] for pair in PRESETS.values())):
        assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_presets_fit_together() -> None:
    for tokenizer, transformer in PRESETS.values():
        frames, height, width = transformer.latent_size
        pixels = tokenizer.video_shape(frames, height, width)[1:]
        assert tokenizer.latent_shape(*pixels) == (transformer.latent_channels, *transformer.latent_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 33}, "heads: got 2; expected a divisor of width=33"),
        ({"layers": 0}, "layers: got 0"),
        ({"patch": 4}, "patch: got 4; expected a divisor of the latent's 4 rows and 6 columns"),
        ({"spatial_window": [2, 4, 6]}, "spatial_window: got .* expected one frame"),
        ({"spacetime_window": [3, 2]}, "spacetime_window: got"),
        ({"adaln": "full"}, "adaln: got 'full'; expected lora or separate"),
        ({"time_features": 15}, "time_features: got 15; expected an even int"),
        ({"classes": -1}, "classes: got -1"),
        ({"depth": 3}, "TransformerConfig: got 'depth'"),
    ],
)
def test_bad_configuration(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_dict({**SMALL.to_dict(), **changes})


def test_configuration_must_be_a_dict() -> None:
    with pytest.raises(ValueError, match="TransformerConfig: got 3; expected a dict"):
        TransformerConfig.from_dict(3)  # type: ignore[arg-type]
