"""Derivatives beyond `backward`, of every op: forward mode, torch.func, and an error where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from found_ops import OPS, WITH_KERNELS, backend_of, needs_native, outputs_of
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import walt_kernels as wk
from walt_kernels import testing
from walt_kernels.testing import K_FORWARD, compare, random, sample_call

pytestmark = needs_native

Function = Callable[..., tuple[Tensor, ...]]


def as_function(op: str, given: dict[str, Any]) -> tuple[Function, tuple[Tensor, ...]]:
    """The op as a function of its floating tensors alone, and these tensors."""
    names = [n for n, value in given.items() if isinstance(value, Tensor) and value.is_floating_point()]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return outputs_of(op, **{**given, **dict(zip(names, tensors, strict=True))})

    return function, tuple(given[n].detach() for n in names)


def sample(op: str, dtype: torch.dtype = torch.float32) -> tuple[Function, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A function, the place and the direction of a derivative."""
    torch.manual_seed(0)
    function, place = as_function(op, sample_call(op, dtype=dtype))
    return function, place, tuple(torch.randn_like(t) for t in place)


def wide(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.double() for t in tensors)


def loss_of(function: Function) -> Callable[..., Tensor]:
    return lambda *tensors: sum((out.square().sum() for out in function(*tensors)), torch.zeros(()))


def compare_tangents(
    function: Function, place: tuple[Tensor, ...], direction: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> None:
    with wk.use_backend("reference"):
        truth = jvp(function, wide(place), wide(direction))[1]
        yardstick = jvp(function, place, direction)[1]
    for i, (a, t, y) in enumerate(zip(tangents, truth, yardstick, strict=True)):
        compare(f"tangent {i}", a, t, y, k=K_FORWARD)


# ---- forward mode ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_tangent(op: str, dtype: torch.dtype) -> None:
    """Of everything at once, by torch.func and by dual numbers; the value is the kernel's own, bit for bit."""
    function, place, direction = sample(op, dtype)
    values, tangents = jvp(function, place, direction)
    compare_tangents(function, place, direction, tangents)
    with wk.use_backend(backend_of(op)):  # which forward mode runs on
        plain = function(*place)
    for value, expected in zip(values, plain, strict=True):
        assert torch.equal(value, expected)
    with forward_ad.dual_level(), torch.no_grad():
        duals = function(*map(forward_ad.make_dual, place, direction))
        found = tuple(forward_ad.unpack_dual(dual).tangent for dual in duals)
    compare_tangents(function, place, direction, found)


@pytest.mark.parametrize("op", OPS)
def test_tangent_of_one_argument(op: str) -> None:
    function, place, direction = sample(op)
    for i in range(len(place)):

        def of_one(tensor: Tensor, i: int = i) -> tuple[Tensor, ...]:
            same = [t.to(tensor.dtype) for t in place]
            return function(*same[:i], tensor, *same[i + 1 :])

        compare_tangents(
            of_one, place[i : i + 1], direction[i : i + 1], jvp(of_one, place[i : i + 1], direction[i : i + 1])[1]
        )


def conv_calls() -> dict[str, dict[str, Any]]:
    x, weight, bias = random(2, 4, 3, 6, 5), random(6, 4, 3, 3, 3), random(6)
    plain, full = {"x": x, "weight": weight}, {"x": x, "weight": weight, "bias": bias}
    return {
        "history": {**full, "history": random(2, 4, 2, 6, 5)},
        "first_frame": {**plain, "time_padding": "first_frame", "space_padding": "replicate"},
        "stride": {**full, "stride": (2, 2, 1), "padding": 1, "space_padding": "reflect"},
        "groups": {"x": x, "weight": random(6, 2, 3, 3, 3), "groups": 2, "dilation": (2, 1, 1)},
        "channels_last": {**full, "x": testing.embed(x, "channels_last")},
    }


def attention_calls() -> dict[str, dict[str, Any]]:
    qkv = {name: random(2, 3, 5, 4, 2, 16, seed=i) for i, name in enumerate("qkv")}
    context_k, context_v = random(2, 7, 2, 16), random(2, 7, 2, 16, seed=1)
    mask = torch.arange(7).expand(2, 7) < torch.tensor([[3], [7]])
    table = random(2, 5, 7, 7)
    return {
        "images": {**qkv, "window": (3, 4, 4), "bias_table": table, "image": torch.tensor([True, False])},
        "context": {
            **qkv,
            **{"window": (1, 5, 4), "context_k": context_k, "context_v": context_v, "context_mask": mask},
        },
    }


CALLS = {("causal_conv3d", name): call for name, call in conv_calls().items()} | {
    ("window_attention", name): call for name, call in attention_calls().items()
}


@pytest.mark.parametrize(("op", "case"), CALLS)
def test_tangent_of_every_mode(op: str, case: str) -> None:
    function, place = as_function(op, CALLS[op, case])
    direction = tuple(torch.randn_like(t) for t in place)
    compare_tangents(function, place, direction, jvp(function, place, direction)[1])
    compare_tangents(  # what has no tangent counts as a constant
        lambda t: function(t, *(p.to(t.dtype) for p in place[1:])),
        place[:1],
        direction[:1],
        jvp(lambda t: function(t, *place[1:]), place[:1], direction[:1])[1],
    )


@pytest.mark.parametrize("op", OPS)
def test_reverse_over_forward(op: str) -> None:
    """A loss of the tangent has gradients, through the value and through the tangent."""
    function, place, direction = sample(op)

    def loss(*tensors: Tensor) -> Tensor:
        values, tangents = jvp(function, tensors, tuple(d.to(tensors[0].dtype) for d in direction))
        return sum((a.sin().sum() + b.square().sum() for a, b in zip(values, tangents, strict=True)), torch.zeros(()))

    arguments = tuple(range(len(place)))
    own = grad(loss, arguments)(*place)
    with wk.use_backend("reference"):
        truth, yardstick = grad(loss, arguments)(*wide(place)), grad(loss, arguments)(*place)
    for i, (a, t, y) in enumerate(zip(own, truth, yardstick, strict=True)):
        compare(f"gradient {i}", a, t, y, k=testing.K_BACKWARD, rows=place[0].shape[0] * place[0].shape[-1])


@pytest.mark.parametrize("op", OPS)
def test_backward_while_there_are_tangents(op: str) -> None:
    """MeanFlow's step: a backward pass through the value, the tangent a constant."""
    function, place, direction = sample(op)
    leaves = [t.clone().requires_grad_() for t in place]
    values, tangents = jvp(function, tuple(leaves), direction)
    sum(((v - t.detach()).square().sum() for v, t in zip(values, tangents, strict=True)), torch.zeros(())).backward()
    again = [t.clone().requires_grad_() for t in place]
    plain = function(*again)
    sum(((v - t.detach()).square().sum() for v, t in zip(plain, tangents, strict=True)), torch.zeros(())).backward()
    for a, b in zip(leaves, again, strict=True):
        assert torch.equal(a.grad, b.grad)


# ---- torch.func -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_functional_gradient(op: str) -> None:
    function, place, _ = sample(op)
    leaves = [t.clone().requires_grad_() for t in place]
    loss_of(function)(*leaves).backward()
    for own, leaf in zip(grad(loss_of(function), tuple(range(len(place))))(*place), leaves, strict=True):
        assert torch.equal(own, leaf.grad)


@pytest.mark.parametrize("op", OPS)
def test_gradient_of_each_sample(op: str) -> None:
    function, place, _ = sample(op)
    gradient = grad(loss_of(function), tuple(range(len(place))))
    batches = [torch.stack([t, t.flip(-1)], i % t.dim()) for i, t in enumerate(place)]
    dims = tuple(i % t.dim() for i, t in enumerate(place))
    together = vmap(gradient, dims)(*batches)
    for n in range(2):
        alone = gradient(*(b.select(d, n).contiguous() for b, d in zip(batches, dims, strict=True)))
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[n], b, rtol=1e-5, atol=1e-4)


def test_vmap_over_one_argument() -> None:
    x, weights = random(2, 4, 3, 5, 5, grad=False), random(3, 6, 4, 3, 3, 3, grad=False)
    together = vmap(wk.causal_conv3d, (None, 0), out_dims=1)(x, weights)
    for i, weight in enumerate(weights):
        assert torch.equal(together[:, i], wk.causal_conv3d(x, weight))


@pytest.mark.parametrize("op", OPS)
def test_vmap_over_nothing(op: str) -> None:
    function, place, _ = sample(op)
    none = tuple(t[None].expand(0, *t.shape) for t in place)
    for out, one in zip(vmap(function)(*(t.requires_grad_() for t in none)), function(*place), strict=True):
        assert out.shape == (0, *one.shape)
        assert out.requires_grad


def test_vmap_over_a_history() -> None:
    x = testing.embed(random(2, 4, 3, 5, 5, grad=False), "channels_last")
    together = vmap(lambda x: wk.next_history(x[None], None, 3)[0])(x)
    assert torch.equal(together, wk.next_history(x, None, 3))


def test_a_frozen_network_inside_of_a_transform() -> None:
    x, weight = random(2, 4, 3, 5, 5, grad=False), random(6, 4, 3, 3, 3, grad=False)

    def loss(x: Tensor) -> Tensor:
        with torch.inference_mode():
            wk.causal_conv3d(x, weight)
        return 2 * x.sum()

    assert torch.equal(grad(loss)(x), torch.full_like(x, 2))


@pytest.mark.parametrize("op", WITH_KERNELS)
def test_nodes_have_the_name_of_the_op(op: str) -> None:
    """Anomaly detection and profilers show it."""
    function, place, _ = sample(op)
    assert function(*(t.requires_grad_() for t in place))[0].grad_fn.name() == f"{op}Backward"


@pytest.mark.parametrize("op", OPS)
def test_jacobians_agree(op: str) -> None:
    function, place, _ = sample(op)

    def narrow(numbers: Tensor) -> Tensor:
        first = place[0] + torch.nn.functional.pad(numbers, (0, place[0].numel() - 3)).view_as(place[0])
        return torch.stack([out.flatten()[:4] for out in function(first, *place[1:])])

    at = torch.zeros(3)
    torch.testing.assert_close(jacrev(narrow)(at), jacfwd(narrow)(at), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transform", ["jvp", "grad"])
@pytest.mark.parametrize("op", OPS)
def test_transforms_compile(op: str, transform: str) -> None:
    function, place, direction = sample(op)
    torch._dynamo.reset()

    def transformed(*tensors: Tensor) -> tuple[Tensor, ...]:
        if transform == "jvp":
            return jvp(function, tensors, direction)[1]
        return grad(loss_of(function), tuple(range(len(tensors))))(*tensors)

    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager", dynamic=True)
    for a, b in zip(compiled(*place), transformed(*place), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_modules() -> None:
    """Dual numbers in the input and in the parameters of a block, against differences in float64."""
    torch.manual_seed(0)
    block = torch.nn.Sequential(
        torch.nn.Linear(8, 16), wk.nn.WindowAttention(16, 2, (2, 3, 3)), torch.nn.GELU(), torch.nn.Linear(16, 8)
    ).double()
    parameters = {n: p.detach() for n, p in block.named_parameters()}
    x = torch.randn(1, 4, 5, 6, 8, dtype=torch.float64)
    steps = {n: torch.randn_like(p) for n, p in parameters.items()}
    step = torch.randn_like(x)

    def run(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(block, parameters, (x,))

    tangent = jvp(run, (parameters, x), (steps, step))[1]
    h = 1e-6
    ends = [run({n: p + s * h * steps[n] for n, p in parameters.items()}, x + s * h * step) for s in (-1, 1)]
    torch.testing.assert_close(tangent, (ends[1] - ends[0]) / (2 * h), rtol=1e-6, atol=1e-6)


# ---- where there is none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["reverse", "forward", "hessian", "autograd"])
@pytest.mark.parametrize("op", WITH_KERNELS)
def test_second_derivative_names_the_op_and_the_way_out(op: str, second: str) -> None:
    function, place, direction = sample(op)
    loss = loss_of(function)
    arguments = tuple(range(len(place)))

    def again(*tensors: Tensor) -> Tensor:
        return sum((g.square().sum() for g in grad(loss, arguments)(*tensors)), torch.zeros(()))

    def compute() -> Any:
        if second == "reverse":
            return grad(again, arguments)(*place)
        if second == "forward":
            return jvp(grad(loss, arguments), place, direction)[1]
        if second == "hessian":
            return hessian(lambda n: loss(place[0] * n, *(t * n for t in place[1:])))(torch.ones(()))
        leaves = [t.clone().requires_grad_() for t in place]
        first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum((g.square().sum() for g in first), torch.zeros(())), leaves)

    name = "adaln_residual" if op == "adaln_residual_modulate" else op  # without the norm it is adaln_residual's
    with pytest.raises(
        RuntimeError, match=rf"{name}.* has no second derivative; run it with use_backend\('reference'\)"
    ):
        compute()
    with wk.use_backend("reference"):
        result = compute()
    for tensor in result if isinstance(result, tuple) else (result,):
        assert tensor.isfinite().all()
        assert tensor.abs().max() > 0
