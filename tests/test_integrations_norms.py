"""Norms of video autoencoders by video_norm, alone and with the SiLU after them, against the classes they replace."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from walt_kernels.integrations import accelerate, norms, restore
from walt_kernels.testing import K_BACKWARD, K_FORWARD, compare

pytest.importorskip("diffusers", reason="diffusers is not installed")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def found(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(f"diffusers.models.autoencoders.autoencoder_{module}"), name)


def make(path: str, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        module = found(path)(*args, **kwargs)
        for parameter in module.parameters():  # no weights of 1 and 0, which hide mistakes
            if parameter.dim() == 1 or parameter.numel() == max(parameter.shape):
                nn.init.normal_(parameter, 0.5, 0.3)
        return module

    return build


def cached(module: Any, x: Tensor) -> Tensor:
    return module(x, module.make_cache())


def afresh(module: Any, x: Tensor) -> Tensor:
    """Of the start of a video: these convolutions remember the frames of the call before."""
    for child in module.modules():
        if hasattr(child, "_clear_conv_cache"):
            child._clear_conv_cache()
    return module(x)


def with_nothing(module: Any, x: Tensor) -> Tensor:
    return module(x, None)


CLASSES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    **{
        f"{path}{options}": (make(path, 32, **options), None)
        for path in (
            "kl_wan.WanRMS_norm",
            "kl_qwenimage.QwenImageRMS_norm",
            "kl_qwenimage21.QwenImage21RMS_norm",
            "kl_hunyuanvideo15.HunyuanVideo15RMS_norm",
            "kl_hunyuanimage_refiner.HunyuanImageRefinerRMS_norm",
        )
        for options in ({"images": False}, {"images": False, "bias": True})
    },
    "Kandinsky6VAERMSNorm": (make("kandinsky6_sr.Kandinsky6VAERMSNorm", 32), None),
    "CosmosCausalGroupNorm": (make("kl_cosmos.CosmosCausalGroupNorm", 32), None),
    "CosmosCausalGroupNorm over the clip": (make("kl_cosmos.CosmosCausalGroupNorm", 32, 4), None),
    "KVAECachedGroupNorm": (make("kl_kvae_video.KVAECachedGroupNorm", 32), None),
    "PerChannelRMSNorm": (make("kl_ltx2.PerChannelRMSNorm"), None),
    "MiniMaxH3VideoGroupNorm": (make("kl_minimax_h3.MiniMaxH3VideoGroupNorm", 4, 32), None),
    "MochiChunkedGroupNorm3D": (make("kl_mochi.MochiChunkedGroupNorm3D", 32, 8, chunk_size=2), None),
    "VidTokLayerNorm": (make("vidtok.VidTokLayerNorm", 32), None),
    "WanResidualBlock": (make("kl_wan.WanResidualBlock", 32, 16), None),
    "QwenImageResidualBlock": (make("kl_qwenimage.QwenImageResidualBlock", 32, 16), None),
    "HunyuanVideo15ResnetBlock": (make("kl_hunyuanvideo15.HunyuanVideo15ResnetBlock", 32, 16), None),
    "HunyuanImageRefinerResnetBlock": (make("kl_hunyuanimage_refiner.HunyuanImageRefinerResnetBlock", 32, 16), None),
    "HunyuanVideoResnetBlockCausal3D": (
        make("kl_hunyuan_video.HunyuanVideoResnetBlockCausal3D", 32, 16, groups=4),
        None,
    ),
    "CogVideoXResnetBlock3D": (
        make("kl_cogvideox.CogVideoXResnetBlock3D", 32, 16, groups=4, temb_channels=0),
        lambda module, x: module(x)[0],
    ),
    "CosmosResnetBlock3d": (make("kl_cosmos.CosmosResnetBlock3d", 32, 16), None),
    "EasyAnimateResidualBlock3D": (make("kl_magvit.EasyAnimateResidualBlock3D", 32, 16, norm_num_groups=4), afresh),
    "EasyAnimateResidualBlock3D over the clip": (
        make("kl_magvit.EasyAnimateResidualBlock3D", 32, 16, norm_num_groups=4, spatial_group_norm=False),
        afresh,
    ),
    "MochiResnetBlock3D": (make("kl_mochi.MochiResnetBlock3D", 32), lambda module, x: module(x)[0]),
    "MiniMaxH3VideoResnetBlock3d": (make("kl_minimax_h3.MiniMaxH3VideoResnetBlock3d", 32, 16, 4), None),
    "Kandinsky6SRResnetBlock3D": (make("kandinsky6_sr.Kandinsky6SRResnetBlock3D", 32, 16), cached),
    "LTXVideoResnetBlock3d": (make("kl_ltx.LTXVideoResnetBlock3d", 32, 16, elementwise_affine=True), None),
    "LTX2VideoResnetBlock3d": (make("kl_ltx2.LTX2VideoResnetBlock3d", 32, 16), None),
    "VidTokResnetBlock": (make("vidtok.VidTokResnetBlock", 32, 16, temb_channels=0), with_nothing),
}


def video(channels: int = 32, frames: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, channels, frames, 6, 5, generator=generator) + 0.5).to(dtype)


def run(module: nn.Module, call: Any, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = module(x) if call is None else call(module, x)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y.dtype)
    names, parameters = zip(*module.named_parameters(), strict=True) if [*module.parameters()] else ((), ())
    grads = torch.autograd.grad(y, [x, *parameters], grad)
    return {"y": y.detach()} | dict(zip(("x", *names), grads, strict=True))


def ops(module: nn.Module, call: Any, x: Tensor) -> list[str]:
    """The norms and activations that a forward pass computes."""
    with torch.no_grad(), torch.profiler.profile() as profile:
        module(x) if call is None else call(module, x)
    names = [event.name for event in profile.events()]
    ours = ("walt_kernels::video_norm", "aten::silu", "aten::native_group_norm", "aten::native_layer_norm")
    return [name.split("::")[1] for name in names if name in ours or name == "aten::linalg_vector_norm"]


def check(module: nn.Module, call: Any, x: Tensor, dtype: torch.dtype) -> None:
    yardstick = run(copy.deepcopy(module).to(dtype), call, x.to(dtype))
    truth = run(copy.deepcopy(module).to(dtype).double(), call, x.to(dtype).double())
    ours = copy.deepcopy(module).to(dtype)
    accelerate(ours)
    rows = x.numel() // x.shape[1]  # a weight's gradient is a sum over positions
    for name, actual in run(ours, call, x.to(dtype)).items():
        k = K_FORWARD if name == "y" else K_BACKWARD
        compare(name, actual, truth[name], yardstick[name], k=k, rows=1 if name == "y" else rows)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_class_computes_what_it_did(name: str, dtype: torch.dtype) -> None:
    build, call = CLASSES[name]
    check(build(), call, video(), dtype)


@pytest.mark.parametrize("name", CLASSES)
def test_norm_and_silu_are_one_pass(name: str) -> None:
    build, call = CLASSES[name]
    module, x = build().bfloat16(), video(dtype=torch.bfloat16)
    before = ops(module, call, x)
    expected = call(module, x) if call else module(x)
    accelerate(module)
    blocks = before.count("silu")
    layer_norms = 1 if "LTX" in name else 0  # of the shortcut
    assert ops(module, call, x) == ["video_norm"] * (blocks + layer_norms or 1)
    restore(module)
    assert ops(module, call, x) == before
    assert torch.equal(call(module, x) if call else module(x), expected)


@pytest.mark.parametrize("name", CLASSES)
def test_one_frame(name: str) -> None:
    build, call = CLASSES[name]
    check(build(), call, video(frames=1), torch.float32)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_the_dtype_that_it_gave(name: str, dtype: torch.dtype) -> None:
    build, call = CLASSES[name]
    module = build()
    with torch.autocast("cpu", torch.bfloat16):
        expected = call(module, video(dtype=dtype)) if call else module(video(dtype=dtype))
        accelerate(module)
        y = call(module, video(dtype=dtype)) if call else module(video(dtype=dtype))
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("images", [False, True])
def test_a_float32_gain_makes_float32_of_bfloat16(images: bool) -> None:
    module = make("kl_wan.WanRMS_norm", 32, images=images)()
    x = video(dtype=torch.bfloat16)
    x = x[:, :, 0] if images else x
    expected = module(x)
    assert expected.dtype == torch.float32
    accelerate(module)
    assert ops(module, None, x) == ["video_norm"]
    compare("y", module(x), module.double()(x.double()), expected, k=K_FORWARD, dtype=torch.bfloat16)


def test_channels_last_and_other_shapes_of_a_wan_norm_are_the_original_s() -> None:
    module = make("kl_wan.WanRMS_norm", 32, channel_first=False)()
    x = video().movedim(1, -1)
    expected = module(x)
    accelerate(module)
    assert torch.equal(module(x), expected)
    assert "video_norm" not in ops(module, None, x)


def test_zero_pixels_stay_zero() -> None:
    module = make("kl_wan.WanRMS_norm", 32, images=False)()
    accelerate(module)
    x = torch.zeros(1, 32, 2, 3, 3, requires_grad=True)
    y = module(x)
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()


def test_hooks_of_the_norm_and_of_the_silu_see_what_they_saw() -> None:
    module, x = make("kl_wan.WanResidualBlock", 32, 16)(), video()
    seen: list[Tensor] = []
    for child in (module.norm2, module.nonlinearity):
        child.register_forward_hook(lambda _, inputs, y: seen.append(y))
    expected = module(x)
    before, seen[:] = [*seen], []
    accelerate(module)
    torch.testing.assert_close(module(x), expected)
    assert len(seen) == len(before) == 3
    for ours, theirs in zip(seen, before, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_kvae_marks_its_cache() -> None:
    module = make("kl_kvae_video.KVAECachedGroupNorm", 32)()
    accelerate(module)
    cache: dict[str, Any] = {"mean": None, "var": None}
    module(video(), cache=cache)
    assert cache == {"mean": 1, "var": 1}


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (make("kl_wan.WanResidualBlock", 32, 32, non_linearity="mish"), "Mish, not SiLU"),
        (make("kl_cogvideox.CogVideoXResnetBlock3D", 32, 32, groups=4), "that of an embedding, too"),
        (
            make("kl_cogvideox.CogVideoXResnetBlock3D", 32, 32, groups=4, temb_channels=0, spatial_norm_dim=4),
            "CogVideoXSpatialNorm3D is not known",
        ),
        (make("kl_ltx.LTXVideoResnetBlock3d", 32, timestep_conditioning=True), "modulated before the activation"),
    ],
)
def test_what_is_left_says_why(build: Callable[[], nn.Module], reason: str) -> None:
    left = [row.what for row in accelerate(build()).left if row.name == ""]
    assert len(left) == 1
    assert reason in left[0]


def test_another_silu_or_norm_put_in_later_is_used() -> None:
    module, x = make("kl_wan.WanResidualBlock", 32, 32)(), video()
    accelerate(module)
    module.nonlinearity, module.norm1 = nn.Mish(), nn.Identity()
    y = module(x)
    restore(module)
    torch.testing.assert_close(y, module(x))


def test_the_group_norm_of_a_spatial_norm() -> None:
    module = make("kl_cogvideox.CogVideoXSpatialNorm3D", 32, 4, groups=4)()

    def call(module: nn.Module, x: Tensor) -> Tensor:
        return module(x, torch.randn(2, 4, 3, 3, 5, generator=torch.Generator().manual_seed(3)).to(x.dtype))[0]

    for dtype in (torch.float32, torch.bfloat16):
        check(module, call, video(), dtype)
    accelerate(module)
    assert ops(module.bfloat16(), call, video(dtype=torch.bfloat16)) == ["video_norm"]


def test_a_float32_group_norm_alone_is_pytorch_s_on_a_cpu() -> None:
    """Which is faster; see _is_slower."""
    module = make("kl_cosmos.CosmosCausalGroupNorm", 32)()
    accelerate(module)
    assert ops(module, None, video()) == ["native_group_norm"]


SMALL = {"latent_channels": 4, "layers_per_block": 1}
GROUPED = SMALL | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
HUNYUAN_15 = {"spatial_compression_ratio": 4, "temporal_compression_ratio": 2, "block_out_channels": (32, 32, 32)}
VAES: dict[str, tuple[dict[str, Any], int]] = {
    "kl_hunyuan_video.AutoencoderKLHunyuanVideo": (GROUPED, 5),
    "kl_hunyuanvideo15.AutoencoderKLHunyuanVideo15": (SMALL | HUNYUAN_15, 5),
    "kl_hunyuanimage_refiner.AutoencoderKLHunyuanImageRefiner": (SMALL | HUNYUAN_15, 4),
    "kl_cogvideox.AutoencoderKLCogVideoX": (GROUPED, 5),
    "kl_cosmos.AutoencoderKLCosmos": (
        {
            "encoder_block_out_channels": (8, 8, 8),
            "decode_block_out_channels": (8, 8, 8),
            "latent_channels": 4,
            "num_layers": 1,
        },
        9,
    ),
    "vidtok.AutoencoderVidTok": ({"ch": 8, "ch_mult": [1, 1, 1, 1], "z_channels": 4, "num_res_blocks": 1}, 5),
}


@pytest.mark.parametrize("path", VAES)
def test_whole_autoencoders(path: str) -> None:
    """The pair at the end of an encoder and a decoder, and every block in between."""
    options, frames = VAES[path]
    vae = make(path, **options)().eval()
    x = torch.rand(1, 3, frames, 16, 16, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def run(vae: Any, x: Tensor) -> list[Tensor]:
        output = vae.encode(x)
        z = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents
        y = vae.decode(torch.ones_like(z))
        return [z, getattr(y, "sample", y)]

    yardsticks, truths = run(vae, x), run(copy.deepcopy(vae).double(), x.double())
    names = {row.name for row in accelerate(vae).replaced if row.what.startswith("video_norm")}
    assert not names.isdisjoint({"encoder", "encoder.norm_out"})
    for actual, truth, yardstick in zip(run(vae, x), truths, yardsticks, strict=True):
        compare(path, actual, truth, yardstick, k=K_FORWARD)


def test_compiles_whole() -> None:
    module, x = make("kl_hunyuan_video.HunyuanVideoResnetBlockCausal3D", 32, 32, groups=4)(), video()
    expected = module(x)
    accelerate(module)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)


def test_every_adapter_is_of_a_class_that_is_there_and_known() -> None:
    for adapter in norms.ADAPTERS:
        module, name = adapter.path.rsplit(".", 1)
        assert adapter.unknown(getattr(importlib.import_module(module), name)) is None, adapter.path
