"""The tokenizer: causality, images as first frames, streaming, norms, errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from walt.config import PRESETS, TokenizerConfig
from walt.tokenizer import FrameNormSwish, Tokenizer, Upsample, depth_to_space
from walt_kernels import explain
from walt_kernels.nn import CausalConv3d
from walt_kernels.testing import K_BACKWARD, K_FORWARD, compare

SMALL = TokenizerConfig(channels=8, multipliers=(1, 2, 2, 3), blocks=1, middle_blocks=1, latent_channels=4, groups=4)

PIXEL = torch.zeros(1, 1, 1, 1, 1)
NO_NATIVE = explain("causal_conv3d", PIXEL, PIXEL).get("cpu", "not built")
# PyTorch's own convolutions choose algorithm and layout by the sizes; the native one promises not to.
native = pytest.mark.skipif(NO_NATIVE is not None, reason=f"native causal_conv3d: {NO_NATIVE}")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(config: TokenizerConfig = SMALL, dtype: torch.dtype = torch.float32) -> Tokenizer:
    """A tokenizer whose every parameter and statistic is away from its initial value."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    channels = torch.arange(config.latent_channels, dtype=dtype)
    tokenizer.set_latent_statistics(0.1 * channels - 0.1, 0.5 + 0.25 * channels)
    return tokenizer.requires_grad_(False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on two threads, much slower where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
@pytest.mark.parametrize(("height", "width"), [(64, 64), (24, 40), (8, 8)])
def test_an_image_is_the_first_frame_of_a_video_bitwise(height: int, width: int, time_padding: str) -> None:
    torch.set_num_threads(2)
    tokenizer = make(replace(SMALL, time_padding=time_padding))
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


# Streams


def agree(code: Callable[[Tensor], Tensor], stream: Callable, whole: Tensor, plan: list[int]) -> None:
    """The chunks of `plan` give the whole, to the rounding of the dtype."""
    expected = code(whole)
    parts = list(stream(iter(whole.split(plan, dim=2))))
    assert len(parts) == len(plan)
    limit = 64 * torch.finfo(whole.dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("plan", [[1, 4, 4, 4], [1, 8, 4], [1, 12], [5, 8], [9, 4], [13]])
def test_encoding_in_chunks(plan: list[int], dtype: torch.dtype, time_padding: str) -> None:
    tokenizer = make(replace(SMALL, time_padding=time_padding), dtype)
    agree(tokenizer.encode, tokenizer.encode_chunks, draw(2, 3, 13, 16, 16, dtype=dtype), plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("plan", [[1, 1, 1, 1], [1, 2, 1], [1, 3], [2, 2], [3, 1], [4]])
def test_decoding_in_chunks(plan: list[int], dtype: torch.dtype, time_padding: str) -> None:
    tokenizer = make(replace(SMALL, time_padding=time_padding), dtype)
    agree(tokenizer.decode, tokenizer.decode_chunks, draw(2, 4, 4, 2, 2, dtype=dtype), plan)


def test_streams_are_lazy_and_apart() -> None:
    tokenizer = make()
    video = draw(1, 3, 9, 16, 16)
    whole = tokenizer.encode(video)
    first, second = (tokenizer.encode_chunks(iter(video.split([1, 4, 4], dim=2))) for _ in range(2))
    pieces = [next(first), next(first), next(second), next(first), next(second), next(second)]
    for order in ((0, 1, 3), (2, 4, 5)):
        torch.testing.assert_close(torch.cat([pieces[i] for i in order], 2), whole)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that PyTorch held at a time of what it allocated during `work`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_the_memory_of_a_stream_does_not_grow_with_its_length(direction: str) -> None:
    tokenizer = make()
    code = getattr(tokenizer, f"{direction}_chunks")
    shape, length = ((1, 4, 1, 4, 4), 1) if direction == "decode" else ((1, 3, 4, 32, 32), 4)

    def stream(count: int) -> int:
        chunks = (draw(*shape)[:, :, : 1 if i == 0 else None] for i in range(count))
        return peak_bytes(lambda: [None for _ in code(chunks)])

    whole = draw(*shape[:2], 1 + 15 * length, *shape[3:])
    assert stream(16) <= stream(4) < peak_bytes(lambda: getattr(tokenizer, direction)(whole)) / 2


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([2, 4], "first chunk: got 2 frames; expected 1 [+] 4k, the nearest being 1 or 5"),
        ([1, 3], "chunk 1: got 3 frames; expected a multiple of 4"),
        ([5, 4, 1], "chunk 2: got 1 frames; expected a multiple of 4"),
    ],
)
def test_bad_chunks(plan: list[int], message: str) -> None:
    tokenizer = make()
    with pytest.raises(ValueError, match=message):
        list(tokenizer.encode_chunks(draw(1, 3, sum(plan), 8, 8).split(plan, dim=2)))


def test_chunks_must_be_alike() -> None:
    tokenizer = make()
    with pytest.raises(ValueError, match=r"chunk 1: got \(1, 3, 16, 8\) beside its frames; expected \(1, 3, 8, 8\)"):
        list(tokenizer.encode_chunks([draw(1, 3, 1, 8, 8), draw(1, 3, 4, 16, 8)]))
    with pytest.raises(ValueError, match=r"chunk 1: got \(1, 4, 2, 2\)"):
        list(tokenizer.decode_chunks([draw(2, 4, 1, 2, 2), draw(1, 4, 1, 2, 2)]))


# Layers


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


def test_compiles_without_graph_breaks() -> None:
    tokenizer = make(dtype=torch.float64).requires_grad_(True)
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


@native
def test_activations_stay_channels_last() -> None:
    """A contiguous tensor in the middle would mean a copy of the video at every layer."""
    tokenizer = make()
    strays: list[str] = []

    def look(name: str) -> Callable:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.is_contiguous(memory_format=torch.channels_last_3d):
                strays.append(name)

        return hook

    for name, module in tokenizer.named_modules():
        if name and not isinstance(module, torch.nn.ModuleList):
            module.register_forward_hook(look(name))
    tokenizer(draw(2, 3, 9, 32, 32))
    assert strays == []


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
    for config in (SMALL, *(pair[0] for pair in PRESETS.values())):
        assert TokenizerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 0}, "channels: got 0"),
        ({"multipliers": (1, 2)}, "multipliers: got"),
        ({"groups": 5}, "groups: got 5; expected a divisor of the stage widths"),
        ({"time_padding": "reflect"}, "time_padding: got 'reflect'"),
        ({"space_padding": "wrap"}, "space_padding: got 'wrap'"),
        ({"middle_blocks": -1}, "middle_blocks: got -1"),
        ({"colour": 3}, "TokenizerConfig: got 'colour'"),
    ],
)
def test_bad_configuration(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerConfig.from_dict({**SMALL.to_dict(), **changes})
