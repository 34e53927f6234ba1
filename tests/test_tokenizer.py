"""The tokenizer: shapes, causality, images as first frames, gradients, statistics, errors."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from small_tokenizer import SMALL, draw, make, native
from small_tokenizer import one_thread as one_thread
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from walt.model.config import TokenizerConfig
from walt.model.tokenizer import Tokenizer
from walt.presets import PRESETS
from walt.settings import TokenizerLossConfig
from walt_kernels import use_backend
from walt_kernels.nn import CausalConv3d

COPIES = (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten.contiguous, torch.ops.aten._to_copy)


@pytest.fixture(params=["zeros", "first_frame"])
def time_padding(request: pytest.FixtureRequest) -> str:
    return request.param


# Shapes


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 2), (9, 3), (13, 4), (17, 5)])
def test_shapes(frames: int, latent_frames: int) -> None:
    tokenizer = make()
    latent = tokenizer.encode(draw(2, 3, frames, 16, 24))
    assert latent.shape == (2, 4, latent_frames, 2, 3)
    assert latent.shape[1:] == SMALL.latent_shape(frames, 16, 24)
    video = tokenizer.decode(latent)
    assert video.shape == (2, 3, frames, 16, 24)
    assert video.shape[1:] == SMALL.video_shape(latent_frames, 2, 3)


def test_sizes_of_the_paper() -> None:
    """Encoder 145 to 150 M and decoder about 226 M parameters at 128 channels, 4 blocks, 8 latent channels."""
    with torch.device("meta"):
        tokenizer = Tokenizer(TokenizerConfig())
    encoder, decoder = (sum(p.numel() for p in part.parameters()) for part in (tokenizer.encoder, tokenizer.decoder))
    assert 145e6 < encoder < 150e6
    assert abs(decoder / 226e6 - 1) < 0.005
    with torch.device("meta"):
        half = Tokenizer(TokenizerConfig(channels=64, blocks=2, middle_blocks=2))
    assert 0.9 < sum(p.numel() for p in half.parameters()) / 57e6 < 1.1


# No layer sees the future


def test_encoder_is_causal(time_padding: str) -> None:
    tokenizer = make(replace(SMALL, time_padding=time_padding))
    video = draw(1, 3, 17, 16, 16)
    whole = tokenizer.encode(video)
    for latent_frame in range(4):
        last_seen = 4 * latent_frame
        changed = video.clone()
        changed[:, :, last_seen + 1 :] = draw(1, 3, 16 - last_seen, 16, 16, seed=1)
        latent = tokenizer.encode(changed)
        assert torch.equal(latent[:, :, : latent_frame + 1], whole[:, :, : latent_frame + 1])
        assert not torch.equal(latent[:, :, latent_frame + 1], whole[:, :, latent_frame + 1])


def test_every_frame_is_seen(time_padding: str) -> None:
    tokenizer = make(replace(SMALL, time_padding=time_padding))
    video = draw(1, 3, 9, 16, 16)
    whole = tokenizer.encode(video)
    for frame in range(9):
        changed = video.clone()
        changed[:, :, frame] += 1
        first = (frame + 3) // 4  # the latent frame that covers it
        latent = tokenizer.encode(changed)
        assert torch.equal(latent[:, :, :first], whole[:, :, :first])
        assert not torch.equal(latent[:, :, first], whole[:, :, first])


def test_decoder_is_causal(time_padding: str) -> None:
    tokenizer = make(replace(SMALL, time_padding=time_padding))
    latent = draw(1, 4, 5, 2, 2)
    whole = tokenizer.decode(latent)
    for latent_frame in range(4):
        changed = latent.clone()
        changed[:, :, latent_frame + 1 :] = draw(1, 4, 4 - latent_frame, 2, 2, seed=1)
        video, frames = tokenizer.decode(changed), 1 + 4 * latent_frame
        assert torch.equal(video[:, :, :frames], whole[:, :, :frames])
        assert not torch.equal(video[:, :, frames : frames + 4], whole[:, :, frames : frames + 4])


def test_a_still_video_is_a_still_latent_where_frame_0_is_repeated() -> None:
    for time_padding, still in (("first_frame", True), ("zeros", False)):
        tokenizer = make(replace(SMALL, time_padding=time_padding), torch.float64)
        latent = tokenizer.encode(draw(1, 3, 1, 16, 16, dtype=torch.float64).expand(-1, -1, 9, -1, -1))
        assert ((latent - latent[:, :, -1:]).abs().max() < 1e-12) == still


def test_a_plain_colour_has_no_edges_where_space_is_not_padded_with_zeros() -> None:
    colour = torch.tensor([0.1, -0.5, 0.8], dtype=torch.float64)[:, None, None, None]
    for space_padding, plain in (("replicate", True), ("reflect", True), ("zeros", False)):
        tokenizer = make(replace(SMALL, space_padding=space_padding), torch.float64)
        latent = tokenizer.encode(colour.expand(1, 3, 5, 16, 16))
        assert ((latent - latent[..., :1, :1]).abs().max() < 1e-12) == plain


def test_all_convolutions_are_padded_as_configured() -> None:
    tokenizer = make(replace(SMALL, time_padding="zeros", space_padding="replicate"))
    convs = [module for module in tokenizer.modules() if isinstance(module, CausalConv3d)]
    assert {(conv.time_padding, conv.space_padding) for conv in convs} == {("zeros", "replicate")}


# 64x64 frames are large enough for threads to share one; 24x40 leaves tails in every vector loop.
@native
@pytest.mark.parametrize(
    ("height", "width", "adaptive_norm"), [(64, 64, True), (24, 40, True), (8, 8, True), (24, 40, False)]
)
def test_an_image_is_the_first_frame_of_a_video_bitwise(
    height: int, width: int, adaptive_norm: bool, time_padding: str
) -> None:
    torch.set_num_threads(2)
    tokenizer = make(replace(SMALL, time_padding=time_padding, adaptive_norm=adaptive_norm))
    video = draw(2, 3, 17, height, width)
    latent = tokenizer.encode(video)
    for batch in (slice(0, 2), slice(1, 2)):
        assert torch.equal(tokenizer.encode(video[batch, :, :1]), latent[batch, :, :1])
    assert torch.equal(tokenizer.decode(latent[:, :, :1]), tokenizer.decode(latent)[:, :, :1])


def test_samples_of_a_batch_do_not_meet() -> None:
    tokenizer = make(dtype=torch.float64)
    video = draw(3, 3, 5, 16, 16, dtype=torch.float64)
    latent = tokenizer.encode(video)
    pixels = tokenizer.decode(latent)
    for i in range(3):
        alone = tokenizer.encode(video[i : i + 1])
        torch.testing.assert_close(alone, latent[i : i + 1], rtol=0, atol=1e-12)
        torch.testing.assert_close(tokenizer.decode(alone), pixels[i : i + 1], rtol=0, atol=1e-12)


def test_compiles_without_graph_breaks() -> None:
    """Also the adaptive norm off the CPU is this: what is compiled does not go frame by frame."""
    config = replace(SMALL, multipliers=(1, 1, 1, 1), middle_blocks=0)
    tokenizer = make(config, torch.float64).requires_grad_(True)
    video = draw(1, 3, 5, 8, 8, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(tokenizer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, tokenizer):
        tokenizer.zero_grad()
        y = run(video)
        y.square().sum().backward()
        results.append((y.detach(), *(parameter.grad.clone() for parameter in tokenizer.parameters())))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_layout_is_copied(dtype: torch.dtype) -> None:
    """From the video's own format to that of the convolutions, then nothing, forward and backward, but for casts.

    What moves once in each direction is depth-to-space: a copy of more than five dimensions. The latent, which is
    small, is also copied for its means.
    """
    copies: list[tuple[str, torch.Size]] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            casts = func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") not in (None, args[0].dtype)
            if func.overloadpacket in COPIES and args[0].dim() == 5 and not casts:
                copies.append((str(func), args[0].shape))
            return func(*args, **(kwargs or {}))

    tokenizer = Tokenizer(replace(PRESETS["L"][0], channels=32))
    video = draw(2, 3, 5, 16, 16)
    with Copies(), use_backend("cpu"):  # oneDNN's convolution pads a copy
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            reconstruction = tokenizer(video)
        reconstruction.float().square().mean().backward()
    channels = tokenizer.config.latent_channels
    assert [copy for copy in copies if copy[1][1] != channels] == [("aten.clone.default", video.shape)]


def test_gradients_reach_every_parameter() -> None:
    tokenizer = make().requires_grad_(True)
    video = draw(1, 3, 5, 16, 16).requires_grad_()
    reconstruction = tokenizer(video)
    (reconstruction * draw(*reconstruction.shape, seed=1)).sum().backward()
    for name, tensor in [*tokenizer.named_parameters(), ("video", video)]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.abs().max() > 0, name


def test_gradient_of_the_whole_is_the_slope() -> None:
    tokenizer = make(dtype=torch.float64)
    video, direction = (draw(1, 3, 5, 8, 8, seed=seed, dtype=torch.float64) for seed in (0, 1))
    x = video.clone().requires_grad_()
    (slope,) = torch.autograd.grad(tokenizer(x).square().mean(), x)
    step = 1e-5
    ends = [tokenizer(video + sign * step * direction).square().mean() for sign in (1, -1)]
    torch.testing.assert_close((slope * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-10)


def test_tangent_is_the_slope_and_torch_func_gives_the_gradient() -> None:
    tokenizer = make(replace(SMALL, adaptive_norm=True), dtype=torch.float64)
    x, step = (draw(1, 3, 5, 16, 16, seed=i, dtype=torch.float64) for i in range(2))

    def there_and_back(x: Tensor) -> Tensor:
        return tokenizer.decode(tokenizer.encode(x))

    tangent = torch.func.jvp(there_and_back, (x,), (step,))[1]
    slope = (there_and_back(x + 1e-6 * step) - there_and_back(x - 1e-6 * step)) / 2e-6
    torch.testing.assert_close(tangent, slope, rtol=1e-5, atol=1e-7)
    gradient = torch.func.grad(lambda x: there_and_back(x).square().sum())(x)
    leaf = x.clone().requires_grad_()
    there_and_back(leaf).square().sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)


def test_gradients_of_each_sample() -> None:
    tokenizer = make(dtype=torch.float64)
    videos = draw(2, 3, 5, 16, 16, dtype=torch.float64)

    def loss(video: Tensor) -> Tensor:
        return tokenizer.decode(tokenizer.encode(video[None])).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss))(videos)
    torch.testing.assert_close(gradients, torch.func.grad(lambda v: loss(v[0]) + loss(v[1]))(videos))


def test_autocast_costs_no_more_than_its_rounding() -> None:
    tokenizer = make()
    video = draw(1, 3, 5, 16, 16)
    expected = tokenizer(video)
    with torch.autocast("cpu", torch.bfloat16):
        out = tokenizer(video)
    assert (out - expected).norm() / expected.norm() < 4 * torch.finfo(torch.bfloat16).eps


# Statistics, state, errors


def test_latents_are_normalised_and_come_back() -> None:
    tokenizer = make(dtype=torch.float64)
    video = draw(2, 3, 5, 16, 16, dtype=torch.float64)
    mean, std = tokenizer.latent_mean.clone(), tokenizer.latent_std.clone()
    latent, decoded = tokenizer.encode(video), tokenizer(video)
    tokenizer.set_latent_statistics(torch.zeros(4), torch.ones(4))
    raw = tokenizer.encode(video)
    expected = (raw - mean[:, None, None, None]) / std[:, None, None, None]
    torch.testing.assert_close(latent, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(tokenizer.decode(raw), decoded, rtol=0, atol=1e-12)


def test_state_dict_carries_everything() -> None:
    tokenizer, other = make(), Tokenizer(SMALL)
    other.load_state_dict(tokenizer.state_dict())
    video = draw(1, 3, 5, 16, 16)
    assert torch.equal(other(video), tokenizer(video))
    assert {"latent_mean", "latent_std"} <= set(tokenizer.state_dict())


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.zeros(3), torch.ones(4), r"mean: got shape \(3,\); expected \[4\]"),
        (torch.zeros(4), torch.zeros(4), "std: got .*; expected finite numbers above 0"),
        (torch.full((4,), float("nan")), torch.ones(4), "mean: got .*; expected finite numbers"),
    ],
)
def test_bad_statistics(mean: Tensor, std: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().set_latent_statistics(mean, std)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 16, 16), r"video: got 16 frames; expected 1 \+ 4k, the nearest being 13 or 17"),
        ((1, 3, 2, 16, 16), r"video: got 2 frames; expected 1 \+ 4k, the nearest being 1 or 5"),
        ((1, 3, 0, 16, 16), r"video: got 0 frames; expected 1 \+ 4k, the nearest being 1"),
        ((1, 3, 5, 20, 16), "height: got 20 pixels; expected a multiple of 8, such as 16 or 24"),
        ((1, 3, 5, 16, 7), "width: got 7 pixels; expected a multiple of 8, such as 8"),
        ((1, 4, 5, 16, 16), r"video: got torch.float32 \(1, 4, 5, 16, 16\)"),
        ((3, 5, 16, 16), r"video: got torch.float32 \(3, 5, 16, 16\)"),
    ],
)
def test_bad_videos(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().encode(torch.zeros(shape))


def test_integer_videos_and_foreign_latents() -> None:
    with pytest.raises(ValueError, match=r"video: got torch.uint8"):
        make().encode(torch.zeros(1, 3, 5, 16, 16, dtype=torch.uint8))
    with pytest.raises(
        ValueError, match=r"latent: got torch.float32 \(1, 8, 2, 2, 2\); expected floating point \[B, 4"
    ):
        make().decode(torch.zeros(1, 8, 2, 2, 2))


def test_configuration_round_trip() -> None:
    image = replace(SMALL, kind="image", adaptive_norm=False)
    for config in (SMALL, image, TokenizerLossConfig(r1_every=4), *(pair[0] for pair in PRESETS.values())):
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_all_presets_but_the_least_have_adaptive_norms() -> None:
    assert {name for name, (tokenizer, _) in PRESETS.items() if not tokenizer.adaptive_norm} == {"minimal"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 0}, "channels: got 0"),
        ({"multipliers": (1, 2)}, "multipliers: got"),
        ({"groups": 5}, "groups: got 5; expected a divisor of the stage widths"),
        ({"time_padding": "reflect"}, "time_padding: got 'reflect'"),
        ({"space_padding": "wrap"}, "space_padding: got 'wrap'"),
        ({"middle_blocks": -1}, "middle_blocks: got -1"),
        ({"kind": "audio"}, "kind: got 'audio'; expected video or image"),
        ({"adaptive_norm": 1}, "adaptive_norm: got 1; expected True or False"),
        ({"colour": 3}, "TokenizerConfig: got 'colour'"),
    ],
)
def test_bad_configuration(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerConfig.from_dict({**SMALL.to_dict(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adversarial": -0.1}, "adversarial: got -0.1; expected a number of at least 0"),
        ({"r1": float("nan")}, "r1: got nan"),
        ({"r1_every": 0}, "r1_every: got 0; expected an int >= 1"),
        ({"lecam_decay": 1.0}, "lecam_decay: got 1.0; expected a number from 0, below 1"),
    ],
)
def test_bad_loss_weights(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerLossConfig(**changes)
