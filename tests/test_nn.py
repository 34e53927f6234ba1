"""The modules over the ops against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import walt_kernels.nn as kernels_nn
from walt_kernels.nn import AdaLNLoRA, CausalConv3d, WindowAttention


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturb(module: nn.Module, seed: int = 0) -> None:
    """Move every parameter off its initial value: zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)


def close(actual: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(actual, truth, rtol=1e-10, atol=1e-10)


# CausalConv3d


@pytest.mark.parametrize("time_padding", ["zeros", "first_frame"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (4, 4, 4), "stride": (2, 2, 2), "padding": 1},
        {"kernel_size": (1, 4, 4), "stride": (1, 2, 2), "padding": 1},
        {"kernel_size": 1},
        {"kernel_size": 3, "dilation": (2, 1, 1), "groups": 2, "bias": False},
    ],
)
def test_conv_with_the_weights_of_torch_is_pad_and_conv(options: dict, time_padding: str) -> None:
    torch.manual_seed(0)
    theirs_options = {**options, "padding": (0, 1, 1) if options["kernel_size"] != 1 else 0}
    theirs = nn.Conv3d(4, 6, **theirs_options).double()
    ours = CausalConv3d(4, 6, **options, time_padding=time_padding, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = draw(2, 4, 5, 8, 6)
    past = x[:, :, :1].expand(-1, -1, ours.time_span, -1, -1)
    padded = torch.cat([past if time_padding == "first_frame" else torch.zeros_like(past), x], dim=2)
    close(ours(x), theirs(padded))


def test_conv_state_dict_loads_back_into_torch() -> None:
    ours, theirs = CausalConv3d(3, 5, 3, groups=1), nn.Conv3d(3, 5, 3)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.weight, ours.weight)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_conv_starts_as_torch_does() -> None:
    weight = CausalConv3d(16, 64, 3, groups=2).weight.detach()
    bound = (8 * 27) ** -0.5
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.99 * bound
    assert abs(weight.std().item() - bound / 3**0.5) < 0.02 * bound


def test_conv_history_continues_a_video() -> None:
    conv = CausalConv3d(3, 4, 3, dilation=(2, 1, 1), time_padding="first_frame", dtype=torch.float64)
    x = draw(1, 3, 12, 5, 5)
    assert conv.time_span == 4
    close(conv(x[:, :, 7:], x[:, :, 3:7]), conv(x)[:, :, 7:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels is 0, expected a positive int"),
        ({"out_channels": 5, "groups": 2}, "out_channels is 5 with groups=2, expected a positive multiple"),
        ({"kernel_size": (3, 3)}, "kernel_size is .3, 3.*expected"),
        ({"stride": 0}, "stride is 0, expected"),
        ({"dilation": (1, 1, -1)}, "dilation is .1, 1, -1.*expected"),
    ],
)
def test_conv_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        CausalConv3d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **arguments})


# WindowAttention


def plain_attention(
    module: WindowAttention,
    x: Tensor,
    image: Tensor | None = None,
    context: Tensor | None = None,
    context_mask: Tensor | None = None,
) -> Tensor:
    """Attention over all tokens with a mask that says who shares a window: no windows are cut out."""
    batch, frames, height, width, _ = x.shape
    sizes = (frames, height, width)
    places = torch.cartesian_prod(*map(torch.arange, sizes))
    window = torch.tensor(module.window)
    allowed = (places[:, None] // window == places[None] // window).all(-1).expand(batch, -1, -1).clone()
    for b in range(batch):
        if image is not None and image[b].any():
            still = image[b].expand(frames)[places[:, 0]]
            allowed[b] &= ~(still[:, None] | still[None])
            allowed[b] |= torch.eye(len(places), dtype=torch.bool)

    def split(y: Tensor, parts: int) -> tuple[Tensor, ...]:
        return tuple(
            part.reshape(batch, -1, module.heads, module.dim).transpose(1, 2) for part in y.chunk(parts, dim=-1)
        )

    q, k, v = split(module.qkv(x), 3)
    bias = q.new_zeros(batch, module.heads, len(places), len(places))
    if module.bias_table is not None:
        offset = (places[:, None] - places[None] + window - 1).clamp_min(0)
        offset = torch.minimum(offset, 2 * window - 2)
        bias = bias + module.bias_table[:, offset[..., 0], offset[..., 1], offset[..., 2]]
    bias = bias.masked_fill(~allowed[:, None], float("-inf"))
    if context is not None:
        assert module.context_kv is not None
        context_k, context_v = split(module.context_kv(context), 2)
        k, v = torch.cat([k, context_k], 2), torch.cat([v, context_v], 2)
        seen = context_mask if context_mask is not None else torch.ones(context.shape[:2], dtype=torch.bool)
        extra = q.new_zeros(seen.shape).masked_fill(~seen, float("-inf"))
        bias = torch.cat([bias, extra[:, None, None].expand(-1, module.heads, len(places), -1)], -1)
    if module.q_norm is not None and module.k_norm is not None:
        q = F.layer_norm(q, (module.dim,), eps=1e-6) * module.q_norm
        k = F.layer_norm(k, (module.dim,), eps=1e-6) * module.k_norm
    out = ((q @ k.mT) / module.dim**0.5 + bias).softmax(-1) @ v
    return module.proj(out.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("window", [(1, 4, 4), (3, 2, 3), (2, 3, 4)])
@pytest.mark.parametrize(("qk_norm", "bias_table"), [(True, True), (False, False)])
def test_attention_is_masked_attention(window: tuple[int, int, int], qk_norm: bool, bias_table: bool) -> None:
    module = WindowAttention(32, 2, window, qk_norm=qk_norm, bias_table=bias_table, dtype=torch.float64)
    perturb(module)
    x = draw(2, 3, 4, 6, 32)
    close(module(x), plain_attention(module, x))
    for image in (torch.tensor([True, False]), torch.tensor([[True, False, True], [False, True, False]])):
        close(module(x, image=image), plain_attention(module, x, image))


def test_attention_with_context() -> None:
    module = WindowAttention(32, 2, (2, 2, 2), context_width=24, dtype=torch.float64)
    perturb(module)
    x, context = draw(2, 2, 4, 4, 32), draw(2, 5, 24, seed=1)
    mask = torch.tensor([[True, True, False, True, False], [True] * 5])
    close(module(x, context=context), plain_attention(module, x, context=context))
    close(module(x, context=context, context_mask=mask), plain_attention(module, x, None, context, mask))


def test_attention_hands_views_to_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **kwargs: object) -> Tensor:
        seen.extend((q, k, v))
        return torch.zeros_like(q).contiguous()

    monkeypatch.setattr(kernels_nn, "window_attention", spy)
    WindowAttention(32, 2, (1, 2, 2))(torch.zeros(1, 1, 2, 2, 32))
    assert len({part.untyped_storage().data_ptr() for part in seen}) == 1
    assert [part.storage_offset() for part in seen] == [0, 32, 64]
    assert all(part.shape == (1, 1, 2, 2, 2, 16) for part in seen)


def test_attention_parameters() -> None:
    module = WindowAttention(32, 2, (5, 4, 3))
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert shapes == {
        "q_norm": (16,),
        "k_norm": (16,),
        "bias_table": (2, 9, 7, 5),
        "qkv.weight": (96, 32),
        "qkv.bias": (96,),
        "proj.weight": (32, 32),
        "proj.bias": (32,),
    }
    bare = WindowAttention(32, 2, (5, 4, 3), qk_norm=False, bias_table=False)
    assert {name.split(".")[0] for name, _ in bare.named_parameters()} == {"qkv", "proj"}


def test_attention_bad_arguments() -> None:
    with pytest.raises(ValueError, match="width is 30 with heads=4"):
        WindowAttention(30, 4, (1, 2, 2))
    with pytest.raises(ValueError, match=r"window is \(0, 2, 2\), expected"):
        WindowAttention(32, 4, (0, 2, 2))
    with pytest.raises(ValueError, match="context_width is 0, expected a positive int"):
        WindowAttention(32, 4, (1, 2, 2), context_width=0)
    x = torch.zeros(1, 1, 2, 2, 32)
    with pytest.raises(ValueError, match="context is a tensor, expected None"):
        WindowAttention(32, 4, (1, 2, 2))(x, context=torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="context is None, expected a tensor"):
        WindowAttention(32, 4, (1, 2, 2), context_width=8)(x)


# AdaLNLoRA


def test_adaln_is_base_plus_low_rank() -> None:
    module = AdaLNLoRA(16, layers=3, rank=2, dtype=torch.float64)
    perturb(module)
    cond = draw(4, 16)
    base = F.silu(cond) @ module.base.weight.T + module.base.bias
    expected = torch.stack([base + cond @ (module.up[i] @ module.down[i]).T for i in range(3)])
    close(module(cond), expected)
    assert module(cond).shape == (3, 4, 96)


def test_adaln_per_frame() -> None:
    module = AdaLNLoRA(16, layers=3, rank=2, chunks=2, dtype=torch.float64)
    perturb(module)
    cond = draw(4, 5, 16)
    out = module(cond)
    assert out.shape == (3, 4, 5, 32)
    close(out[:, :, 3], module(cond[:, 3]))


def test_adaln_layers_start_equal() -> None:
    module = AdaLNLoRA(16, layers=3, rank=2)
    assert not module.up.any()
    assert module.down.any()
    cond = draw(4, 16).float()
    out = module(cond)
    torch.testing.assert_close(out, module.base(F.silu(cond)).expand_as(out))


def test_adaln_bad_arguments() -> None:
    with pytest.raises(ValueError, match="rank is 0, expected a positive int"):
        AdaLNLoRA(16, layers=3, rank=0)


# All of them


CASES = {
    "conv": lambda: (CausalConv3d(4, 4, 3, time_padding="first_frame"), [(2, 4, 3, 6, 6)]),
    "attention": lambda: (WindowAttention(32, 2, (2, 2, 2)), [(2, 2, 4, 4, 32)]),
    "adaln": lambda: (AdaLNLoRA(16, layers=3, rank=2), [(4, 16)]),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_every_parameter(name: str) -> None:
    module, (shape,) = CASES[name]()
    perturb(module)
    x = draw(*shape).float().requires_grad_()
    out = module(x)
    (out * draw(*out.shape, seed=1).float()).sum().backward()
    for parameter_name, tensor in [*module.named_parameters(), ("x", x)]:
        assert tensor.grad is not None, parameter_name
        assert tensor.grad.isfinite().all(), parameter_name
        assert tensor.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", CASES)
def test_compiles_without_graph_breaks(name: str) -> None:
    module, (shape,) = CASES[name]()
    perturb(module)
    x = draw(*shape).float()
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), module(x))
    assert len(graphs) == 1
    torch._dynamo.reset()
    trained = torch.compile(module, fullgraph=True, backend="aot_eager")
    trained(x).square().sum().backward()
    compiled_grads = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    module(x).square().sum().backward()
    for parameter, grad in zip(module.parameters(), compiled_grads, strict=True):
        torch.testing.assert_close(grad, parameter.grad)


@pytest.mark.parametrize("name", CASES)
def test_printing_names_what_matters(name: str) -> None:
    module, _ = CASES[name]()
    expected = {"conv": "kernel_size=(3, 3, 3)", "attention": "window=(2, 2, 2)", "adaln": "rank=2"}
    assert expected[name] in repr(module)
