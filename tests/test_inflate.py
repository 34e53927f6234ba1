"""Image tokenizers, and video tokenizers inflated from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_tokenizer import SMALL, draw, make
from small_tokenizer import one_thread as one_thread
from torch import Tensor

from walt.model.convert import inflate
from walt.model.tokenizer import Tokenizer
from walt_kernels.nn import CausalConv3d

IMAGE = replace(SMALL, kind="image")


def test_an_image_tokenizer_codes_each_frame_alone() -> None:
    tokenizer = make(IMAGE, torch.float64)
    convs = [module for module in tokenizer.modules() if isinstance(module, CausalConv3d)]
    assert {(conv.kernel_size[0], conv.stride[0]) for conv in convs} == {(1, 1)}
    video = draw(2, 3, 6, 16, 24, dtype=torch.float64)  # six frames: images need not be 1 + 4k
    latent = tokenizer.encode(video)
    assert latent.shape == (2, 4, 6, 2, 3)
    assert latent.shape[1:] == IMAGE.latent_shape(6, 16, 24)
    decoded = tokenizer.decode(latent)
    assert decoded.shape == video.shape
    assert decoded.shape[1:] == IMAGE.video_shape(6, 2, 3)
    for frame in range(6):
        alone = tokenizer.encode(video[:, :, frame : frame + 1])
        close(alone, latent[:, :, frame : frame + 1])
        close(tokenizer.decode(alone), decoded[:, :, frame : frame + 1])


def test_an_image_tokenizer_streams_frame_by_frame() -> None:
    tokenizer = make(IMAGE, torch.float64)
    video = draw(1, 3, 4, 16, 16, dtype=torch.float64)
    latent = torch.cat(list(tokenizer.encode_chunks(video.split([1, 2, 1], dim=2))), dim=2)
    close(latent, tokenizer.encode(video))
    close(torch.cat(list(tokenizer.decode_chunks(latent.split([2, 2], dim=2))), dim=2), tokenizer.decode(latent))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("time_padding", ["zeros", "first_frame"])
@pytest.mark.parametrize("adaptive_norm", [True, False])
def test_an_inflated_tokenizer_codes_what_it_sees_as_the_image_tokenizer_does(
    time_padding: str, adaptive_norm: bool
) -> None:
    image = make(replace(IMAGE, adaptive_norm=adaptive_norm), torch.float64)
    video = inflate(image, replace(SMALL, time_padding=time_padding, adaptive_norm=adaptive_norm))
    frames = draw(2, 3, 9, 16, 24, dtype=torch.float64)

    one = video.encode(frames[:, :, :1])
    close(one, image.encode(frames[:, :, :1]))
    close(video.decode(one), image.decode(one))

    latent = video.encode(frames)
    close(latent, image.encode(frames[:, :, ::4]))
    own = torch.tensor([0, 1, 1, 1, 1, 2, 2, 2, 2])  # the latent frame of each frame
    close(video.decode(latent), image.decode(latent)[:, :, own])


def test_inflation_fills_the_last_time_slice_and_nothing_else() -> None:
    image = make(IMAGE)
    video = inflate(image, SMALL)
    assert video.config == SMALL
    kernels = {name: tensor for name, tensor in video.state_dict().items() if tensor.ndim == 5}
    assert {tensor.shape[2] for tensor in kernels.values()} == {1, 3, 4}
    for name, kernel in kernels.items():
        assert not kernel[:, :, :-1].any(), name
        source = image.state_dict()[name][:, :, 0]
        assert all(torch.equal(part, source) for part in kernel[:, :, -1].split(len(source))), name
    for parameter in video.parameters():
        assert parameter.requires_grad
    before = image.state_dict()["decoder.first.weight"].clone()
    with torch.no_grad():
        video.decoder.first.weight.add_(1)
    assert torch.equal(image.state_dict()["decoder.first.weight"], before)  # no memory is shared


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 16}, "channels: got 16; expected the image tokenizer's 8"),
        ({"multipliers": (1, 1, 2, 3)}, r"multipliers: got \(1, 1, 2, 3\); expected the image tokenizer's"),
        ({"latent_channels": 8}, "latent_channels: got 8"),
        ({"blocks": 2}, "blocks: got 2"),
        ({"adaptive_norm": False}, "adaptive_norm: got False"),
        ({"space_padding": "reflect"}, "space_padding: got 'reflect'"),
        ({"kind": "image"}, "config: got kind 'image'; expected 'video'"),
    ],
)
def test_configurations_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inflate(Tokenizer(IMAGE), replace(SMALL, **changes))


def test_only_image_tokenizers_are_inflated() -> None:
    with pytest.raises(ValueError, match="image_tokenizer: got one of kind 'video'; expected 'image'"):
        inflate(Tokenizer(SMALL), SMALL)
