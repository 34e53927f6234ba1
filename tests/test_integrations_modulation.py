"""AdaLN of other libraries, replaced: against the classes themselves in float64, and what is left as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerated import as_public, cast, check, ops, randomize, results
from torch import Tensor, nn

from walt_kernels import testing
from walt_kernels.integrations import accelerate

pytest.importorskip("diffusers", reason="diffusers is not installed")

from diffusers.models import attention, normalization
from diffusers.models.transformers import (
    transformer_cosmos,
    transformer_hunyuan_video,
    transformer_wan,
    transformer_wan_animate,
)

B, N, D = 2, 10, 32


def tokens(n: int = N, width: int = D, seed: int = 0) -> Tensor:
    return testing.random(B, n, width, seed=seed, grad=False)


def rows(width: int = D, seed: int = 1) -> Tensor:
    return testing.random(B, width, seed=seed, grad=False)


def cosmos(cls: Any, thirds: int, form: str) -> tuple[nn.Module, dict[str, Any]]:
    temb = None if form == "no temb" else rows(3 * D, 2)[:, : thirds * D] if form == "sample" else tokens(N, 3 * D, 2)
    if form == "token" and thirds == 3:
        temb = tokens(N, 3 * D, 2)
    timestep = tokens(N, D, 1) if form == "token" else rows()
    return cls(D, 8), {"hidden_states": tokens(), "embedded_timestep": timestep, "temb": temb}


def basic(norm_type: str, cross: bool, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    zero = norm_type == "ada_norm_zero"
    block = attention.BasicTransformerBlock(
        D,
        2,
        16,
        norm_type=norm_type,
        num_embeds_ada_norm=10 if zero else None,
        norm_elementwise_affine=False,
        cross_attention_dim=24 if cross else None,
        **options,
    )
    inputs: dict[str, Any] = {"hidden_states": tokens(), "timestep": torch.tensor([3, 7]) if zero else rows(6 * D)}
    if zero:
        inputs["class_labels"] = torch.tensor([1, 9])
    if cross:
        inputs["encoder_hidden_states"] = tokens(5, 24, 3)
    return block, inputs


def wan(cls: Any, form: str = "sample", **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    shape = (B, 6, D) if form == "sample" else (B, N, 6, D)
    inputs = {
        "hidden_states": tokens(),
        "encoder_hidden_states": tokens(5, D, 3),
        "temb": testing.random(*shape, seed=4, grad=False),
        "rotary_emb": None,
    }
    return cls(D, 64, 2, **options), inputs


def conditioned(module: nn.Module, **inputs: Any) -> tuple[nn.Module, dict[str, Any]]:
    return module, inputs


BOTH = "adaln_residual_modulate"
CASES: dict[str, tuple[str, Callable[[], tuple[nn.Module, dict[str, Any]]]]] = {
    **{
        f"{cls.__name__}, {form}": (
            "adaln_modulate",
            lambda cls=cls, thirds=thirds, form=form: cosmos(cls, thirds, form),
        )
        for cls, thirds in ((transformer_cosmos.CosmosAdaLayerNorm, 2), (transformer_cosmos.CosmosAdaLayerNormZero, 3))
        for form in ("no temb", "sample", "token")
    },
    "AdaLayerNorm": (
        "adaln_modulate",
        lambda: conditioned(
            normalization.AdaLayerNorm(24, output_dim=2 * D, norm_eps=1e-5, chunk_dim=1), x=tokens(), temb=rows(24)
        ),
    ),
    "AdaLayerNorm, embedding": (
        "adaln_modulate",
        lambda: conditioned(
            normalization.AdaLayerNorm(D, num_embeddings=9, chunk_dim=1), x=tokens(), timestep=torch.tensor([2, 8])
        ),
    ),
    "AdaLayerNormZero": (
        "adaln_modulate",
        lambda: conditioned(normalization.AdaLayerNormZero(D), x=tokens(), emb=rows()),
    ),
    "AdaLayerNormZero, embedding": (
        "adaln_modulate",
        lambda: conditioned(
            normalization.AdaLayerNormZero(D, 9),
            x=tokens(),
            timestep=torch.tensor([2, 8]),
            class_labels=torch.tensor([1, 3]),
            hidden_dtype=torch.float32,
        ),
    ),
    "AdaLayerNormZero, float32 norm": (
        "adaln_modulate",
        lambda: conditioned(normalization.AdaLayerNormZero(D, norm_type="fp32_layer_norm"), x=tokens(), emb=rows()),
    ),
    "AdaLayerNormZeroSingle": (
        "adaln_modulate",
        lambda: conditioned(normalization.AdaLayerNormZeroSingle(D), x=tokens(), emb=rows()),
    ),
    "AdaLayerNormContinuous": (
        "adaln_modulate",
        lambda: conditioned(
            normalization.AdaLayerNormContinuous(D, 24, elementwise_affine=False, eps=1e-6),
            x=tokens(),
            conditioning_embedding=rows(24),
        ),
    ),
    "CogVideoXLayerNormZero": (
        "adaln_modulate",
        lambda: conditioned(
            normalization.CogVideoXLayerNormZero(24, D, elementwise_affine=False),
            hidden_states=tokens(),
            encoder_hidden_states=tokens(3, seed=5),
            temb=rows(24),
        ),
    ),
    "Latte": ("adaln_residual", lambda: basic("ada_norm_single", cross=False)),
    "PixArt": ("adaln_residual", lambda: basic("ada_norm_single", cross=True)),
    "DiT": ("adaln_residual", lambda: basic("ada_norm_zero", cross=False)),
    "DiT with a context": ("adaln_residual", lambda: basic("ada_norm_zero", cross=True)),
    "Wan": ("adaln_modulate", lambda: wan(transformer_wan.WanTransformerBlock)),
    "Wan, norm of the context": (
        "adaln_modulate",
        lambda: wan(transformer_wan.WanTransformerBlock, cross_attn_norm=True),
    ),
    "Wan 2.2, tokens": ("adaln_modulate", lambda: wan(transformer_wan.WanTransformerBlock, "token")),
    "Wan animate": ("adaln_modulate", lambda: wan(transformer_wan_animate.WanTransformerBlock)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_the_class_in_float64(name: str, dtype: torch.dtype) -> None:
    op, case = CASES[name]
    module, inputs = case()
    check(randomize(module), inputs, op, dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """What DiT's models.py has under this name."""
    return x * (scale[:, None] + 1) + shift[:, None]


class Block(nn.Module):
    """As DiT's and Latte's: adaLN-zero around an attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.attn, self.mlp = nn.Sequential(nn.Linear(D, D), nn.Tanh()), nn.Sequential(nn.Linear(D, D), nn.GELU())
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        rows = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + rows[2][:, None] * self.attn(modulate(self.norm1(x), rows[0], rows[1]))
        return x + rows[5][:, None] * self.mlp(modulate(self.norm2(x), rows[3], rows[4]))


class Final(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_final, self.linear = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6), nn.Linear(D, 8)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


PUBLIC = {
    "models.DiTBlock": (Block, BOTH),
    "models.FinalLayer": (Final, "adaln_modulate"),
    "models.latte.TransformerBlock": (Block, BOTH),
    "models.latte.FinalLayer": (Final, "adaln_modulate"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", PUBLIC)
def test_public_definitions(path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, op = PUBLIC[path]
    cls = as_public(monkeypatch, path, kind, modulate=modulate)
    check(randomize(cls()), {"x": tokens(), "c": rows()}, op, dtype)


def test_another_modulate_is_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = as_public(monkeypatch, "models.DiTBlock", Block, modulate=modulate)
    monkeypatch.setattr("models.modulate", rows)  # of a fork that has changed it
    (left,) = accelerate(cls()).left
    assert "forward and modulate are of a release that was not checked" in left.what


def reasons(module: nn.Module) -> list[str]:
    report = accelerate(module)
    assert report.replaced == []
    return [row.what for row in report.left if row.name == ""]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: normalization.AdaLayerNormSingle(D), "has no norm"),
        (lambda: transformer_hunyuan_video.HunyuanVideoAdaNorm(D), "has no norm"),
        (lambda: normalization.AdaLayerNorm(D), "chunk_dim is 0"),
        (lambda: normalization.AdaLayerNorm(D, norm_elementwise_affine=True, chunk_dim=1), "norm has a weight"),
        (lambda: normalization.CogVideoXLayerNormZero(24, D), "norm has a weight"),
        (lambda: normalization.AdaLayerNormContinuous(D, 24), "norm has a weight"),
        (
            lambda: normalization.AdaLayerNormContinuous(D, 24, elementwise_affine=False, norm_type="rms_norm"),
            "norm is a RMSNorm",
        ),
        (lambda: basic("layer_norm", cross=False)[0], "norm_type is 'layer_norm'"),
        (
            lambda: basic("ada_norm_single", False, positional_embeddings="sinusoidal", num_positional_embeddings=16)[
                0
            ],
            "positions inside the block",
        ),
        (lambda: normalization.SD35AdaLayerNormZeroX(D), "no adapter for this class"),
    ],
)
def test_left_with_a_reason(module: Callable[[], nn.Module], reason: str) -> None:
    (what,) = reasons(module())
    assert reason in what


def pair(cls: Any = normalization.AdaLayerNormZeroSingle) -> tuple[nn.Module, nn.Module]:
    plain = randomize(cls(D))
    ours = copy.deepcopy(plain)
    assert len(accelerate(ours).replaced) == 1
    return plain, ours


@pytest.mark.parametrize("emb", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_are_the_originals(x: torch.dtype, emb: torch.dtype) -> None:
    """Float32 scales beside bfloat16 tokens widen them; where ours would not, it is the class's own formula."""
    plain, ours = pair()
    plain.to(emb), ours.to(emb)
    inputs = {"x": tokens().to(x).requires_grad_(), "emb": rows().to(emb).requires_grad_()}
    expected, actual = results(plain, inputs), results(ours, inputs)
    assert {name: value.dtype for name, value in actual.items()} == {name: v.dtype for name, v in expected.items()}
    same = x == torch.bfloat16 != emb
    assert ("adaln_modulate" in ops(lambda: ours(**inputs))) is not same
    if same:
        assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_under_autocast(x: torch.dtype) -> None:
    plain, ours = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = plain(tokens().to(x), rows()), ours(tokens().to(x), rows())
    assert [out.dtype for out in actual] == [out.dtype for out in expected] == [x, torch.bfloat16]
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_one_condition_for_all_samples() -> None:
    plain, ours = pair()
    assert torch.equal(ours(tokens(), rows()[:1])[0], plain(tokens(), rows()[:1])[0])


def test_hooks_of_the_norm_run() -> None:
    plain, ours = pair()
    for module in (plain, ours):
        module.norm.register_forward_hook(lambda module, inputs, output: output + 1)
    assert torch.equal(ours(tokens(), rows())[0], plain(tokens(), rows())[0])


def test_calls_of_a_block_that_ours_does_not_take() -> None:
    module, inputs = basic("ada_norm_single", cross=False)
    plain, ours = randomize(module), copy.deepcopy(module)
    accelerate(ours)
    for block in (plain, ours):
        block.set_chunk_feed_forward(5, 1)
    assert torch.equal(ours(**inputs), plain(**inputs))
    assert ops(lambda: ours(**inputs)) == set()


def test_wan_in_float64_is_its_own() -> None:
    """It rounds to float32 on its way; ours would not."""
    module, inputs = wan(transformer_wan.WanTransformerBlock)
    plain, ours = randomize(module).double(), copy.deepcopy(module)
    accelerate(ours)
    inputs = cast(inputs, torch.float64)
    assert torch.equal(ours(**inputs), plain(**inputs))


@pytest.mark.parametrize("name", ["CosmosAdaLayerNormZero, sample", "Latte", "Wan"])
def test_compiled_whole(name: str) -> None:
    module, inputs = CASES[name][1]()
    accelerate(randomize(module))
    inputs = cast(inputs, torch.float32)
    expected = results(module, inputs)
    module.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(module, inputs), expected)
