"""CausalConv3d is an nn.Conv3d: what asks for one finds it, builds one like it, and never makes it look ahead."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, prune
from torch.utils import mkldnn

from walt_kernels import causal_conv3d
from walt_kernels.nn import CausalConv3d


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(**options: object) -> CausalConv3d:
    torch.manual_seed(0)
    return CausalConv3d(4, 4, 3, **{"time_padding": "first_frame", "space_padding": "replicate", **options})


def check_causal(layer: nn.Module, x: Tensor) -> None:
    """Frame 3 is what it is without the frames after it."""
    torch.testing.assert_close(layer(x)[:, :, :4], layer(x[:, :, :4]))


X = draw(1, 4, 6, 5, 5)


def test_it_is_one_with_the_same_attributes() -> None:
    ours, theirs = CausalConv3d(4, 6, 3, 2, 1, 1, 2), nn.Conv3d(4, 6, 3, 2, 1, 1, 2)
    assert isinstance(ours, nn.Conv3d)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups", "padding_mode"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.transposed, ours.output_padding) == (theirs.transposed, theirs.output_padding)
    missing = set(vars(theirs)) - set(vars(ours))
    assert not missing
    assert CausalConv3d(4, 6, 3, padding=(1, 2)).padding == (1, 2)
    assert (made().padding_mode, made().space_padding) == ("replicate", "replicate")


def test_space_padding_is_another_name_of_padding_mode() -> None:
    conv = CausalConv3d(4, 4, 3)
    conv.space_padding = "replicate"
    assert conv.padding_mode == "replicate"
    assert torch.equal(conv(X), causal_conv3d(X, conv.weight, conv.bias, space_padding="replicate"))
    with pytest.raises(ValueError, match="space_padding is 'circular'"):
        conv.space_padding = "circular"


def test_arguments_come_in_the_order_of_torch() -> None:
    ours, theirs = (list(inspect.signature(c).parameters) for c in (CausalConv3d, nn.Conv3d))
    assert ours[: len(theirs)] == theirs
    conv = CausalConv3d(4, 8, 3, 2, (1, 0), (2, 1, 1), 2, False, "reflect", "cpu", torch.float64)
    x = draw(1, 4, 6, 5, 5).double()
    options = {"stride": 2, "padding": (1, 0), "dilation": (2, 1, 1), "groups": 2, "space_padding": "reflect"}
    assert conv.bias is None
    assert torch.equal(conv(x), causal_conv3d(x, conv.weight, **options))


def test_it_starts_with_the_bits_of_torch() -> None:
    states = []
    for kind in (CausalConv3d, nn.Conv3d):
        torch.manual_seed(5)
        states.append(kind(4, 6, (3, 2, 1), groups=2).state_dict())
    ours, theirs = states
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


WRONG = [
    ({"padding": (0, 1, 1)}, TypeError, r"padding is \(0, 1, 1\), expected \(1, 1\), of the frame; time is always"),
    ({"padding": "valid"}, ValueError, r"padding is 'valid', expected 'same', an int \(0 for none\)"),
    ({"padding": -1}, ValueError, "padding is -1, expected integers of at least 0"),
    ({"padding_mode": "circular"}, ValueError, r"padding_mode \(space_padding\) is 'circular', expected one of"),
    ({"space_padding": "wrap"}, ValueError, r"padding_mode \(space_padding\) is 'wrap', expected one of 'zeros'"),
    ({"padding_mode": "reflect", "space_padding": "zeros"}, ValueError, "padding_mode is 'reflect', expected 'zeros'"),
    ({"time_padding": "replicate"}, ValueError, "time_padding is 'replicate', expected one of 'zeros', 'first"),
    ({"in_channels": True}, TypeError, "in_channels is True, expected a positive int"),
    ({"out_channels": 4.0}, TypeError, "out_channels is 4.0, expected a positive int"),
    ({"groups": 2.0}, TypeError, "groups is 2.0, expected a positive int"),
    ({"groups": 0}, ValueError, "groups is 0, expected a positive int"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_what_differs_from_torch_is_told_when_it_is_made(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        CausalConv3d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **arguments})


def fused(conv: CausalConv3d) -> nn.Module:
    norm = nn.BatchNorm3d(4).eval()
    norm.running_var.fill_(1 - norm.eps)
    return fuse_conv_bn_eval(conv.eval(), norm)


def with_backward(layer: nn.Module) -> nn.Module:
    layer(X).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    return layer


SAME: dict[str, Callable[[CausalConv3d], nn.Module]] = {
    "copy": copy.deepcopy,
    "pickle": lambda conv: pickle.loads(pickle.dumps(conv)),
    "weight_norm": lambda conv: with_backward(parametrizations.weight_norm(conv)),
    "batch norm": fused,
    "memory format": lambda conv: nn.utils.convert_conv3d_weight_memory_format(conv, torch.channels_last_3d),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("padding", ["same", 1])
def test_what_works_on_convolutions_leaves_the_numbers(name: str, padding: object) -> None:
    expected = made(padding=padding)(X)
    layer = SAME[name](made(padding=padding))
    assert isinstance(layer, CausalConv3d)
    torch.testing.assert_close(layer(X), expected)


def quantised(layer: nn.Module) -> nn.Module:
    layer.qconfig = quantization.get_default_qconfig("x86")
    prepared = quantization.prepare(layer.eval())
    prepared(X)
    return quantization.convert(prepared)


CAUSAL: dict[str, Callable[[CausalConv3d], nn.Module]] = {
    "spectral_norm": lambda conv: with_backward(parametrizations.spectral_norm(conv)).eval(),
    "orthogonal": parametrizations.orthogonal,
    "pruning": lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
    "quantised": lambda conv: quantised(nn.Sequential(conv)),
    "quantised in training": lambda conv: quantization.prepare_qat(nn.Sequential(with_qconfig(conv))),
}


def with_qconfig(conv: CausalConv3d) -> CausalConv3d:
    conv.qconfig = quantization.get_default_qat_qconfig("x86")
    return conv


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_what_changes_convolutions_leaves_it_causal(name: str) -> None:
    check_causal(CAUSAL[name](made()), X)


def test_a_convolution_with_other_weights_is_causal() -> None:
    # loralib and torch's own quantisation modules call this with a weight of theirs.
    conv, weight = made(), draw(4, 4, 3, 3, 3, seed=1)
    expected = causal_conv3d(X, weight, conv.bias, time_padding="first_frame", space_padding="replicate")
    assert torch.equal(conv._conv_forward(X, weight, conv.bias), expected)
    check_causal(lambda x: conv._conv_forward(x, weight, None), X)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("padding", ["same", 1, (1, 1), ((1, 1), (1, 1))])
def test_what_would_make_another_convolution_of_it_fails(padding: object) -> None:
    """Rather than look ahead: torch replaces every Conv3d by what it makes of the layer's padding."""
    assert mkldnn.to_mkldnn(nn.Conv3d(4, 4, 3).eval())(X.to_mkldnn()).shape == (1, 4, 4, 3, 3)
    with pytest.raises((RuntimeError, TypeError)):
        mkldnn.to_mkldnn(made(padding=padding).eval())(X.to_mkldnn())


def test_an_adapter_can_be_made_of_its_type() -> None:
    """As peft does: a layer of the same type and the same positional arguments, with another width."""
    conv = CausalConv3d(4, 4, 3, (2, 1, 1), 1)
    down = type(conv)(conv.in_channels, 2, conv.kernel_size, conv.stride, conv.padding, bias=False)
    up = type(conv)(2, conv.out_channels, (1, 1, 1), (1, 1, 1), bias=False)
    delta = torch.einsum("or,ricdf->oicdf", up.weight[:, :, 0, 0, 0], down.weight)
    merged = conv._conv_forward(X, conv.weight + delta, conv.bias)
    torch.testing.assert_close(conv(X) + up(down(X)), merged)


@pytest.mark.parametrize("name", ["weight", "bias", "history"])
def test_no_tensor_under_autocast(name: str) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=f"{name} is a list, expected a tensor"):
        causal_conv3d(**{"x": X, "weight": draw(4, 4, 3, 3, 3), name: [1.0]})
