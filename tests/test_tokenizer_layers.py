"""The layers of the tokenizer."""

from __future__ import annotations

import pytest
import torch
from small_tokenizer import SMALL, draw
from small_tokenizer import one_thread as one_thread
from torch import Tensor
from torch.nn import functional as F

from walt.model.tokenizer_layers import AdaptiveNorm, FrameNormSwish, Upsample, depth_to_space, frame_means
from walt_kernels.testing import K_BACKWARD, K_FORWARD, compare


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_norm_is_group_norm_of_each_frame(layout: torch.memory_format) -> None:
    norm = FrameNormSwish(12, groups=4)
    x, cotangent = draw(2, 12, 3, 9, 7).contiguous(memory_format=layout), draw(2, 12, 3, 9, 7, seed=1)
    results = []
    for dtype, function in ((torch.float32, norm), (torch.float64, None), (torch.float32, None)):
        inputs = [x.to(dtype), 1 + draw(12, seed=2, dtype=dtype), draw(12, seed=3, dtype=dtype)]
        inputs = [tensor.clone().requires_grad_() for tensor in inputs]
        if function is norm:
            y = torch.func.functional_call(norm, {"weight": inputs[1], "bias": inputs[2]}, (inputs[0],))
            assert y.is_contiguous(memory_format=layout)
        else:
            frames = [F.group_norm(inputs[0][:, :, t], 4, *inputs[1:], norm.eps) for t in range(3)]
            y = F.silu(torch.stack(frames, dim=2))
        results.append((y, *torch.autograd.grad(y, inputs, cotangent.to(dtype))))
    names = ("y", "grad_x", "grad_weight", "grad_bias")
    for name, actual, truth, yardstick in zip(names, *results, strict=True):
        k = K_FORWARD if name == "y" else K_BACKWARD
        compare(name, actual.detach(), truth.detach(), yardstick.detach(), k=k, rows=2 * 3 * 9 * 7)


def test_norm_gradcheck() -> None:
    norm = FrameNormSwish(4, groups=2).double()
    x = draw(1, 4, 2, 3, 2, dtype=torch.float64).requires_grad_()
    parameters = {
        name: draw(4, seed=i, dtype=torch.float64).requires_grad_() for i, name in enumerate(("weight", "bias"))
    }

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters.values()))


def test_depth_to_space_puts_each_channel_in_its_place() -> None:
    x = draw(2, 2 * 3 * 4 * 5, 3, 2, 2)
    y = depth_to_space(x, (2, 3, 4))
    assert y.shape == (2, 5, 6, 6, 8)
    parts = x.unflatten(1, (2, 3, 4, 5))
    for t, h, w in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
        assert torch.equal(y[:, :, t::2, h::3, w::4], parts[:, t, h, w])


def test_upsampling_drops_what_comes_before_the_first_frame() -> None:
    layer = Upsample(4, (2, 2, 2), SMALL)
    x = draw(1, 4, 3, 2, 2).contiguous(memory_format=torch.channels_last_3d)
    y = layer(x)
    assert y.shape == (1, 4, 5, 4, 4)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(y, depth_to_space(layer.conv(x), (2, 2, 2))[:, :, 1:], rtol=0, atol=0)


# The adaptive norm

LATENT = SMALL.latent_channels


def adaptive(channels: int, frames: int, dtype: torch.dtype = torch.float64) -> AdaptiveNorm:
    layer = AdaptiveNorm(channels, frames, SMALL).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(draw(2 * channels, LATENT, seed=5))
        layer.bias.copy_(draw(2 * channels, seed=6))
    return layer


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_each_frame_is_modulated_by_its_latent_frame(frames: int, layout: torch.memory_format) -> None:
    layer = adaptive(8, frames)
    length = 1 + 2 * frames
    x = draw(2, 8, length, 3, 5, dtype=torch.float64).contiguous(memory_format=layout)
    latent = draw(2, LATENT, 3, 2, 3, seed=1, dtype=torch.float64)
    y = layer(x, frame_means(latent))
    assert y.is_contiguous(memory_format=layout)
    for frame in range(length):
        place = 0 if frame == 0 else 1 + (frame - 1) // frames
        mean = latent[:, :, place].flatten(2).mean(2)
        scale, shift = (mean @ layer.weight.T + layer.bias)[..., None, None].split(8, dim=1)
        expected = F.group_norm(x[:, :, frame], SMALL.groups, eps=layer.eps) * (1 + scale) + shift
        torch.testing.assert_close(y[:, :, frame], expected, rtol=1e-12, atol=1e-12)


def test_a_new_adaptive_norm_is_a_plain_norm() -> None:
    x = draw(1, 8, 3, 4, 4)
    y = AdaptiveNorm(8, 2, SMALL)(x, frame_means(draw(1, LATENT, 2, 2, 2)))
    plain = torch.stack([F.group_norm(frame, SMALL.groups, eps=1e-6) for frame in x.unbind(2)], dim=2)
    torch.testing.assert_close(y, plain)


def test_adaptive_norm_gradcheck() -> None:
    layer = adaptive(4, 2)
    x = draw(1, 4, 3, 2, 2, dtype=torch.float64).requires_grad_()
    latent = draw(1, LATENT, 2, 1, 2, seed=1, dtype=torch.float64).requires_grad_()

    def function(x: Tensor, latent: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, frame_means(latent)))

    assert torch.autograd.gradcheck(function, (x, latent, *layer.parameters()))


def test_adaptive_norm_of_a_chunk_is_that_of_the_whole_bitwise() -> None:
    layer = adaptive(8, 2, torch.float32)
    x, latent = draw(2, 8, 7, 5, 3), draw(2, LATENT, 4, 2, 3, seed=1)
    whole = layer(x, frame_means(latent))
    for plan in ([1, 1, 1, 1], [2, 2], [1, 3], [3, 1]):
        lengths = [2 * plan[0] - 1, *(2 * count for count in plan[1:])]
        pieces = zip(x.split(lengths, dim=2), latent.split(plan, dim=2), strict=True)
        assert torch.equal(torch.cat([layer(piece, frame_means(part)) for piece, part in pieces], dim=2), whole)
