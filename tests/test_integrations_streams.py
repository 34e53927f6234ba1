"""stream_encode and stream_decode: joined, what the whole clip gives, in memory that does not grow with it."""

from __future__ import annotations

import copy
import gc
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import small_tokenizer
from walt_kernels.integrations import accelerate, stream_decode, stream_encode
from walt_kernels.testing import K_FORWARD, compare

pytest.importorskip("diffusers", reason="diffusers is not installed")

WAN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [True, True]}
LTX = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "layers_per_block": (1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
    "spatio_temporal_scaling": (True, True, False),
    "decoder_spatio_temporal_scaling": (True, True, False),
    "decoder_inject_noise": (False, False, False, False),
    "down_block_types": ("LTXVideoDownBlock3D",) * 3,
    "downsample_type": ("conv",) * 3,
    "upsample_residual": (False,) * 3,
    "upsample_factor": (1, 1, 1),
    "patch_size": 2,
    "decoder_causal": True,
}
LTX_095 = LTX | {
    "block_out_channels": (8, 8, 16, 16),
    "decoder_block_out_channels": (8, 16, 32),
    "spatio_temporal_scaling": (True, True, True),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 3,
    "downsample_type": ("spatial", "temporal", "spatiotemporal"),
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
}
LTX2 = {
    "latent_channels": 8,
    "block_out_channels": (8, 8, 16),
    "decoder_block_out_channels": (8, 16),
    "layers_per_block": (1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "spatio_temporal_scaling": (True, True, True),
    "decoder_spatio_temporal_scaling": (True, True),
    "decoder_inject_noise": (False, False, False),
    "down_block_types": ("LTX2VideoDownBlock3D",) * 3,
    "downsample_type": ("spatial", "temporal", "spatiotemporal"),
    "upsample_residual": (True, True),
    "upsample_factor": (2, 2),
    "patch_size": 2,
    "decoder_causal": True,
}
EASYANIMATE = {
    "latent_channels": 4,
    "block_out_channels": [8, 8, 8],
    "down_block_types": ["SpatialDownBlock3D", "SpatialTemporalDownBlock3D", "SpatialTemporalDownBlock3D"],
    "up_block_types": ["SpatialUpBlock3D", "SpatialTemporalUpBlock3D", "SpatialTemporalUpBlock3D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
KVAE = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4, "temporal_compress_times": 2}
KANDINSKY = {
    "latent_channels": 4,
    "encoder_block_out_channels": (8, 8, 16),
    "decoder_block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
    "temporal_compression_ratio": 2,
}
MINIMAX = {
    "latent_channels": 4,
    "block_out_channels": (8, 8, 8),
    "layers_per_block": 1,
    "spatial_downsample_factors": (2, 1, 1),
    "temporal_downsample_factors": (2, 2, 1),
    "norm_num_groups": 4,
    "decoder_num_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_attention_head_dim": 8,
    "latents_mean": (0.0,) * 4,
    "latents_std": (1.0,) * 4,
}
MOCHI = {
    "encoder_block_out_channels": (32, 32, 32, 32),
    "decoder_block_out_channels": (32, 32, 32, 32),
    "latent_channels": 4,
    "layers_per_block": (1, 1, 1, 1, 1),
}
PATCHED = WAN | {"patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True, "decoder_base_dim": 8}

# Class, options, frames to encode, latent frames to decode (None: not in this direction), pixels, channels of latents.
VAES: dict[str, tuple[str, dict[str, Any], int | None, int | None]] = {
    "Wan": ("kl_wan.AutoencoderKLWan", WAN, 13, 4),
    "Wan of patches": ("kl_wan.AutoencoderKLWan", PATCHED, 9, 3),
    "QwenImage": ("kl_qwenimage.AutoencoderKLQwenImage", WAN, 13, 4),
    "LTX": ("kl_ltx.AutoencoderKLLTXVideo", LTX, 13, 4),
    "LTX 0.9.5": ("kl_ltx.AutoencoderKLLTXVideo", LTX_095, 13, 4),
    "LTX 2": ("kl_ltx2.AutoencoderKLLTX2Video", LTX2, 13, 4),
    "EasyAnimate": ("kl_magvit.AutoencoderKLMagvit", EASYANIMATE, 13, 4),
    "EasyAnimate over clips": ("kl_magvit.AutoencoderKLMagvit", EASYANIMATE | {"spatial_group_norm": False}, 11, 4),
    "KVAE": ("kl_kvae_video.AutoencoderKLKVAEVideo", KVAE, 41, 21),
    "Kandinsky": ("kandinsky6_sr.Kandinsky6SRVAE", KANDINSKY, 37, 19),
    "MiniMax": ("kl_minimax_h3.AutoencoderKLMiniMaxH3", MINIMAX, 40, None),
    "MiniMax, one frame": ("kl_minimax_h3.AutoencoderKLMiniMaxH3", MINIMAX, 1, None),
}
ENCODED = [name for name, vae in VAES.items() if vae[2]]
DECODED = [name for name, vae in VAES.items() if vae[3]]


def build(path: str, **options: Any) -> Any:
    module, name = path.split(".")
    torch.manual_seed(0)
    return getattr(importlib.import_module(f"diffusers.models.autoencoders.autoencoder_{module}"), name)(
        **options
    ).eval()


def make(name: str) -> Any:
    path, options, *_ = VAES[name]
    return build(path, **options)


def video(vae: Any, frames: int) -> Tensor:
    return torch.rand(1, 3, frames, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latent(vae: Any, frames: int) -> Tensor:
    config = vae.config
    channels = config.get("z_dim") or config.get("z_channels") or config["latent_channels"]
    return torch.randn(1, channels, frames, 4, 4, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def encoded(vae: Any, x: Tensor) -> Tensor:
    parameters: Tensor = vae.encode(x).latent_dist.parameters
    return parameters


@torch.no_grad()
def decoded(vae: Any, z: Tensor) -> Tensor:
    sample: Tensor = vae.decode(z).sample
    return sample


def joined(chunks: Iterator[Tensor]) -> Tensor:
    parts = list(chunks)
    assert all(not part.requires_grad for part in parts)
    return torch.cat(parts, dim=2)


def check(name: str, stream: Any, whole: Any, draw: Any, frames: int, *, ours: bool) -> None:
    vae = make(name)
    x = draw(vae, frames)
    yardstick, truth = whole(vae, x), whole(copy.deepcopy(vae).double(), x.double())
    if ours:
        assert accelerate(vae).replaced
    y = joined(stream(vae, x))
    compare("stream", y, truth, yardstick, k=K_FORWARD)
    assert torch.equal(joined(stream(vae, iter(cut(x)))), y)
    compare("whole, after", whole(vae, x), truth, yardstick, k=K_FORWARD)  # nothing of the stream stayed in it


def cut(x: Tensor) -> list[Tensor]:
    """Chunks of 2, 3, 1, 0, 4, 2, ... frames, and an empty one."""
    chunks, start, lengths = [], 0, (2, 3, 1, 0, 4)
    while start < x.shape[2]:
        length = lengths[len(chunks) % 5]
        chunks.append(x[:, :, start : start + length])
        start += length
    return [*chunks, x[:, :, :0]]


@pytest.mark.parametrize("ours", [False, True], ids=["plain", "accelerated"])
@pytest.mark.parametrize("name", ENCODED)
def test_encoded_in_parts_as_whole(name: str, ours: bool) -> None:
    frames = VAES[name][2]
    assert frames is not None
    check(name, stream_encode, encoded, video, frames, ours=ours)


@pytest.mark.parametrize("ours", [False, True], ids=["plain", "accelerated"])
@pytest.mark.parametrize("name", DECODED)
def test_decoded_in_parts_as_whole(name: str, ours: bool) -> None:
    frames = VAES[name][3]
    assert frames is not None
    check(name, stream_decode, decoded, latent, frames, ours=ours)


def test_a_walt_tokenizer() -> None:
    tokenizer = small_tokenizer.make()
    x = small_tokenizer.draw(1, 3, 9, 16, 16)
    latents = joined(stream_encode(tokenizer, cut(x)))
    torch.testing.assert_close(latents, tokenizer.encode(x).detach(), rtol=1e-4, atol=1e-5)
    frames = joined(stream_decode(tokenizer, latents))
    torch.testing.assert_close(frames, tokenizer.decode(latents).detach(), rtol=1e-4, atol=1e-5)


def live_bytes() -> int:
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("name", ["Wan", "LTX", "EasyAnimate", "Kandinsky"])
def test_memory_does_not_grow(name: str) -> None:
    vae = make(name)

    def drawn(draw: Any, count: int) -> Iterator[Tensor]:
        yield draw(vae, 1)
        for _ in range(count):
            yield draw(vae, 4)

    for stream, draw in ((stream_encode, video), (stream_decode, latent)):
        held = []
        for i, part in enumerate(stream(vae, drawn(draw, 10))):
            del part
            if i in (4, 8):
                held.append(live_bytes())
        assert held[0] == held[1] > 0


def test_nothing_is_read_before_it_is_wanted() -> None:
    read = []

    def chunks() -> Iterator[Tensor]:
        for i in range(3):
            read.append(i)
            yield torch.zeros(1, 3, 5, 16, 16)

    parts = stream_encode(make("Wan"), chunks())
    assert read == []
    next(parts)
    assert read == [0]


def test_two_streams_of_a_class_that_keeps_the_past_itself() -> None:
    vae = make("EasyAnimate")
    x = video(vae, 13)
    alone = list(stream_encode(vae, x))
    streams = stream_encode(vae, x), stream_encode(vae, x.flip(3))
    for expected, (first, _) in zip(alone, zip(*streams, strict=True), strict=True):
        assert torch.equal(first, expected)
    next(stream_encode(vae, x))  # left in the middle
    assert all(getattr(module, "prev_features", None) is None for module in vae.modules())


def test_an_offloaded_vae_is_brought_back_first() -> None:
    class Hook:
        def pre_forward(self, module: nn.Module) -> None:
            brought.append(module)

    brought: list[nn.Module] = []
    vae = make("Wan")
    vae._hf_hook = Hook()
    stream_decode(vae, latent(vae, 2))
    assert brought == [vae]


def test_what_the_whole_leaves_out_is_left_out() -> None:
    vae = make("Wan")
    x = video(vae, 11)
    assert torch.equal(joined(stream_encode(vae, x)), joined(stream_encode(vae, x[:, :, :9])))
    assert encoded(vae, x).shape[2] == 3


CHANNELS = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
COSMOS = {
    "encoder_block_out_channels": (8, 8, 8),
    "decode_block_out_channels": (8, 8, 8),
    "latent_channels": 4,
    "num_layers": 1,
    "attention_resolutions": (),
}
HUNYUAN_15 = {
    "latent_channels": 4,
    "block_out_channels": (32, 32, 32),
    "layers_per_block": 1,
    "spatial_compression_ratio": 4,
    "temporal_compression_ratio": 2,
}


@pytest.mark.parametrize(
    ("path", "options", "tasks", "reason"),
    [
        ("kl_hunyuan_video.AutoencoderKLHunyuanVideo", CHANNELS, "ed", "norm1 takes its statistics over all frames"),
        ("kl_cogvideox.AutoencoderKLCogVideoX", CHANNELS, "ed", "norm1 takes its statistics over as many frames"),
        ("kl_cosmos.AutoencoderKLCosmos", COSMOS, "ed", "temp_attentions.0 attends to all frames before"),
        (
            "kl_hunyuanvideo15.AutoencoderKLHunyuanVideo15",
            HUNYUAN_15,
            "ed",
            "attentions.0 attends to all frames before",
        ),
        ("kl_mochi.AutoencoderKLMochi", MOCHI, "ed", "conv1 keeps no frames"),
        ("kl_minimax_h3.AutoencoderKLMiniMaxH3", MINIMAX, "d", "decoder.transformer_blocks.0 attends to frames ahead"),
        ("kl_ltx.AutoencoderKLLTXVideo", LTX | {"decoder_causal": False}, "d", "decoder.conv_in looks ahead"),
        ("kl_ltx2.AutoencoderKLLTX2Video", LTX2 | {"decoder_causal": False}, "d", "decoder looks ahead"),
        ("kl_ltx.AutoencoderKLLTXVideo", LTX | {"timestep_conditioning": True}, "d", "decoder takes a timestep"),
        (
            "kl_ltx.AutoencoderKLLTXVideo",
            LTX | {"decoder_inject_noise": (True, False, False, False)},
            "d",
            "resnets.0 adds noise",
        ),
        ("kl.AutoencoderKL", {}, "ed", "which is not known"),
    ],
)
def test_what_cannot_be_streamed_says_why(path: str, options: dict[str, Any], tasks: str, reason: str) -> None:
    vae = build(path, **options)
    for task, stream in (("e", stream_encode), ("d", stream_decode)):
        if task in tasks:
            with pytest.raises(ValueError, match=reason):
                stream(vae, torch.zeros(1, 3, 5, 16, 16))
    accelerate(vae)
    if "d" in tasks:
        with pytest.raises(ValueError, match=reason):
            stream_decode(vae, torch.zeros(1, 4, 5, 4, 4))


def test_tiles_are_refused() -> None:
    vae = make("Wan")
    vae.enable_tiling()
    with pytest.raises(ValueError, match="blends tiles"):
        stream_encode(vae, video(vae, 5))


def test_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = make("Wan")
    monkeypatch.setattr(type(vae), "_encode", lambda self, x: x)
    with pytest.raises(ValueError, match="release that was not checked"):
        stream_encode(vae, video(vae, 5))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            torch.zeros(3, 5, 16, 16),
            r"a chunk of shape \(3, 5, 16, 16\), expected a tensor \[B, C, T, H, W\]",
        ),
        ([torch.zeros(1, 3, 5, 16, 16), torch.zeros(1, 3, 4, 16, 8)], "beside its frames, expected"),
        ([None], "a chunk of NoneType"),
        ([], "video has no frames"),
        (torch.zeros(1, 3, 0, 16, 16), "video has no frames"),
    ],
)
def test_frames_that_do_not_fit(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(stream_encode(make("Wan"), source))


def test_a_last_part_that_does_not_fit() -> None:
    vae = make("LTX")
    with pytest.raises(ValueError, match="video ends with 2 frames more than 1 \\+ 4 k"):
        list(stream_encode(vae, video(vae, 7)))


def test_a_vae_is_a_module() -> None:
    for source, words in (
        (None, "video is a NoneType, expected a tensor"),
        (torch.zeros(1, 3, 5, 16, 16, dtype=torch.int64), "video has a chunk of dtype torch.int64, expected floating"),
        (
            [torch.zeros(1, 3, 1, 16, 16), torch.zeros(1, 3, 4, 16, 16).double()],
            "torch.float64, expected torch.float32",
        ),
    ):
        with pytest.raises(TypeError, match=words):
            list(stream_encode(make("Wan"), source))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"vae is a str, expected an nn\.Module"):
        stream_encode("vae", torch.zeros(1, 3, 5, 16, 16))  # type: ignore[arg-type]
