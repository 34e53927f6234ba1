"""Window attention of other libraries, replaced: against the classes themselves in float64, and what is left."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accelerated import as_public, cast, check, ops, randomize, results
from torch import Tensor, nn
from torch.nn import functional as F

from walt_kernels import testing
from walt_kernels.integrations import accelerate, restore

OP = "window_attention"


def windows(*shape: int) -> Tensor:
    return testing.random(*shape, grad=False, seed=7)


def relative_positions(window: Sequence[int]) -> Tensor:
    """[tokens, tokens]: places in a table of all offsets, by loops."""
    tokens = [(t, h, w) for t in range(window[0]) for h in range(window[1]) for w in range(window[2])]
    index = torch.empty(len(tokens), len(tokens), dtype=torch.long)
    for i, a in enumerate(tokens):
        for j, b in enumerate(tokens):
            t, h, w = (p - q + size - 1 for p, q, size in zip(a, b, window, strict=True))
            index[i, j] = (t * (2 * window[1] - 1) + h) * (2 * window[2] - 1) + w
    return index


class Packed(nn.Module):
    """As MONAI's and timm's WindowAttention: windows [B, N, C], the mask of shifted ones [windows, N, N]."""

    def __init__(self, window: Sequence[int] = (2, 3, 2), width: int = 24, heads: int = 3, drop: float = 0.0) -> None:
        super().__init__()
        three = (1, *window) if len(window) == 2 else tuple(window)
        self.window_size, self.num_heads, self.scale = tuple(window), heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_drop, self.proj_drop, self.softmax = nn.Dropout(drop), nn.Dropout(0.0), nn.Softmax(-1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(math.prod(2 * n - 1 for n in three), heads))
        self.register_buffer("relative_position_index", relative_positions(three))

    def _get_rel_pos_bias(self) -> Tensor:
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        samples, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(samples, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q * self.scale) @ k.transpose(2, 3) + self._get_rel_pos_bias()[:, :tokens, :tokens]
        if mask is not None:
            scores = scores.unflatten(0, (-1, len(mask))) + mask[:, None]
            scores = scores.flatten(0, 1)
        out = self.attn_drop(self.softmax(scores)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(samples, tokens, width)))


class WholeFrames(nn.Module):
    """As torchvision's ShiftedWindowAttention: [B, H, W, C] or [B, T, H, W, C], padded, rolled and masked inside."""

    def __init__(self, window: Sequence[int], shift: Sequence[int] = (0, 0, 0), dropout: float = 0.0) -> None:
        super().__init__()
        self.window_size, self.num_heads = list(window), 2
        self.shift_size = list(shift)[: len(window)]
        self.attention_dropout, self.dropout = dropout, 0.0
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        three = (1, *window) if len(window) == 2 else tuple(window)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(math.prod(2 * n - 1 for n in three), 2))
        self.register_buffer("relative_position_index", relative_positions(three).flatten())

    def get_relative_position_bias(self) -> Tensor:
        tokens = math.prod(self.window_size)
        return self.relative_position_bias_table[self.relative_position_index].view(tokens, tokens, -1).permute(2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        sizes, window = x.shape[1:-1], self.window_size
        margins = [-size % extent for size, extent in zip(sizes, window, strict=True)]
        x = F.pad(x, [0, 0, *(n for margin in reversed(margins) for n in (0, margin))])
        shift = [s if n > e else 0 for s, n, e in zip(self.shift_size, sizes, window, strict=True)]
        axes = list(range(1, x.dim() - 1))
        x = torch.roll(x, [-s for s in shift], axes)
        places = torch.arange(math.prod(x.shape[1:-1])).view(x.shape[1:-1])
        for axis, extent in reversed(list(enumerate(window))):
            places = places.unfold(axis, extent, extent)
        order = places.reshape(-1, math.prod(window)).sort(dim=1).values  # [windows, tokens]; unfold reversed the axes
        q, k, v = (
            F.linear(x.flatten(1, -2), self.qkv.weight, self.qkv.bias)[:, order].unflatten(-1, (3, 2, -1)).unbind(-3)
        )
        scores = torch.einsum("bnihd,bnjhd->bnhij", q * q.shape[-1] ** -0.5, k) + self.get_relative_position_bias()
        probabilities = F.dropout(scores.softmax(-1), self.attention_dropout, self.training)
        out = torch.einsum("bnhij,bnjhd->bnihd", probabilities, v).flatten(-2)
        out = torch.empty_like(out).flatten(1, 2).index_copy(1, order.flatten(), out.flatten(1, 2)).view_as(x)
        out = torch.roll(F.linear(out, self.proj.weight, self.proj.bias), shift, axes)
        for axis, size in enumerate(sizes, 1):
            out = out.narrow(axis, 0, size)
        return out


MONAI, TIMM = "monai.networks.nets.swin_unetr.WindowAttention", "timm.models.swin_transformer.WindowAttention"
FRAMES = "torchvision.models.swin_transformer.ShiftedWindowAttention"
VIDEO = "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d"


def frames(path: str, cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> type[nn.Module]:
    """With the functions that torchvision's classes call, which what stands here does without."""
    names = ("_get_relative_position_bias", "shifted_window_attention", "shifted_window_attention_3d")
    others = ("_get_window_and_shift_size", "_compute_pad_size_3d")
    return as_public(monkeypatch, path, cls, **dict.fromkeys((*names, *others), windows))


PUBLIC: dict[str, tuple[str, Callable[[Any], nn.Module], tuple[int, ...]]] = {
    "MONAI, 3D": (MONAI, lambda cls: cls((2, 3, 2)), (5, 12, 24)),
    "MONAI, 2D": (MONAI, lambda cls: cls((3, 4)), (5, 12, 24)),
    "timm": (TIMM, lambda cls: cls((3, 4)), (5, 12, 24)),
    "torchvision": (FRAMES, lambda cls: cls((2, 3)), (2, 4, 6, 16)),
    "torchvision, padded": (FRAMES, lambda cls: cls((3, 4)), (2, 4, 6, 16)),
    "torchvision, one window": (FRAMES, lambda cls: cls((4, 6), (2, 3)), (2, 4, 6, 16)),
    "torchvision, 3D": (VIDEO, lambda cls: cls((2, 2, 3)), (2, 4, 4, 6, 16)),
    "torchvision, 3D, padded": (VIDEO, lambda cls: cls((2, 3, 4)), (1, 3, 4, 6, 16)),
}


def public(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Tensor]:
    path, make, shape = PUBLIC[name]
    kind = WholeFrames if "torchvision" in path else Packed
    return randomize(make(frames(path, kind, monkeypatch))), windows(*shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PUBLIC)
def test_public_definitions(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = public(name, monkeypatch)
    check(module, {"x": x} | ({"mask": None} if isinstance(module, Packed) else {}), OP, dtype)


def test_calls_that_go_to_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of shifted windows, fewer tokens than a window, somebody who watches the weights, dropout in training."""
    plain, x = public("MONAI, 3D", monkeypatch)
    ours = copy.deepcopy(plain)
    accelerate(ours)
    mask = torch.zeros(5, 12, 12).masked_fill(torch.arange(12) > 7, -100.0)
    for inputs in ((x, mask), (x[:, :8], None)):
        assert torch.equal(ours(*inputs), plain(*inputs))
        assert OP not in ops(lambda inputs=inputs: ours(*inputs))
    seen: list[Tensor] = []
    hook = ours.softmax.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert torch.equal(ours(x, None), plain(x, None))
    assert len(seen) == 1
    hook.remove()
    assert OP in ops(lambda: ours(x, None))
    ours.softmax, softmax = nn.Softmin(-1), ours.softmax
    assert OP not in ops(lambda: ours(x, None))
    ours.softmax = softmax
    ours.attn_drop.p = plain.attn_drop.p = 0.5
    assert OP in ops(lambda: ours(x, None))  # not at work outside of training
    for module in (plain, ours):
        module.train()
        torch.manual_seed(0)
        seen.append(module(x, None))
    assert torch.equal(seen[-1], seen[-2])


@pytest.mark.parametrize(
    ("path", "window", "shift", "dropout", "shape"),
    [
        (FRAMES, (2, 3), (1, 1), 0.0, (2, 4, 6, 16)),
        (FRAMES, (2, 3), (0, 0), 0.5, (2, 4, 6, 16)),
        (VIDEO, (2, 2, 3), (0, 0, 1), 0.0, (2, 4, 4, 6, 16)),
        (VIDEO, (4, 2, 3), (0, 0, 0), 0.0, (2, 3, 4, 6, 16)),  # shrinks
    ],
)
def test_frames_that_go_to_the_class(
    path: str,
    window: tuple[int, ...],
    shift: tuple[int, ...],
    dropout: float,
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = randomize(frames(path, WholeFrames, monkeypatch)(window, shift, dropout)).train(dropout > 0)
    ours = copy.deepcopy(plain)
    accelerate(ours)
    outputs = []
    for module in (plain, ours):
        torch.manual_seed(0)
        outputs.append(module(windows(*shape)))
    assert torch.equal(*outputs)
    assert OP not in ops(lambda: ours(windows(*shape)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda module: setattr(module, "softmax", nn.Softmin(-1)), "its softmax is a Softmin"),
        (lambda module: module.relative_position_index.add_(1), "its relative_position_index is not Swin's"),
        (lambda module: module.qkv.__init__(24, 36), "its heads have dim 4, window_attention takes 8 to 256"),
    ],
)
def test_instances_left_with_a_reason(
    change: Callable[[Any], Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = public("MONAI, 3D", monkeypatch)
    change(module)
    report = accelerate(module)
    assert report.replaced == []
    assert [row.what for row in report.left] == [reason]


@pytest.mark.parametrize(
    "path",
    ["timm.models.swin_transformer_v2.WindowAttention", "torchvision.models.swin_transformer.ShiftedWindowAttentionV2"],
)
def test_cosines_are_left(path: str) -> None:
    module, name = path.rsplit(".", 1)
    (left,) = accelerate(type(name, (Packed,), {"__module__": module, "__qualname__": name})()).left
    assert "cosines" in left.what


def test_ours_is_no_stranger() -> None:
    import walt_kernels

    report = accelerate(nn.Sequential(walt_kernels.nn.WindowAttention(16, 2, 2)))
    assert report.replaced == report.left == []


class TestTransformers:
    """Swin and its copies in transformers."""

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("transformers", reason="transformers is not installed")

    def module(self, name: str, **options: Any) -> nn.Module:
        from transformers import SwinConfig
        from transformers.models.clap.modeling_clap import ClapAudioSelfAttention
        from transformers.models.donut.modeling_donut_swin import DonutSwinSelfAttention
        from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinSelfAttention
        from transformers.models.swin.modeling_swin import SwinAttention

        classes = (SwinAttention, DonutSwinSelfAttention, MaskFormerSwinSelfAttention, ClapAudioSelfAttention)
        cls = next(cls for cls in classes if cls.__name__ == name)
        return randomize(cls(SwinConfig(attn_implementation="sdpa", **options), 24, 3, 4))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(
        "name",
        ["SwinAttention", "DonutSwinSelfAttention", "MaskFormerSwinSelfAttention", "ClapAudioSelfAttention"],
    )
    def test_against_the_class_in_float64(self, name: str, dtype: torch.dtype) -> None:
        check(self.module(name), {"hidden_states": windows(5, 16, 24)}, OP, dtype)

    @pytest.mark.parametrize("name", ["SwinAttention", "DonutSwinSelfAttention"])
    def test_calls_that_go_to_the_class(self, name: str) -> None:
        plain = self.module(name, attention_probs_dropout_prob=0.5)
        ours, x = copy.deepcopy(plain), windows(4, 16, 24)
        accelerate(ours)
        mask = torch.zeros(2, 16, 16).masked_fill(torch.arange(16) > 7, -100.0)
        weights = {} if name == "SwinAttention" else {"output_attentions": True}
        for implementation, options in (("sdpa", {"attention_mask": mask}), ("eager", weights)):
            for module in (plain, ours):
                if name == "SwinAttention":  # which returns its weights where it is eager
                    module.config._attn_implementation = implementation
            expected = plain(x, **options)
            torch.testing.assert_close(ours(x, **options), expected)
            assert OP not in ops(lambda options=options: ours(x, **options))
        assert expected[1] is not None
        if name == "SwinAttention":
            ours.config._attn_implementation = "sdpa"
        assert OP in ops(lambda: ours(x))
        assert OP not in ops(lambda: ours.train()(x))

    def test_eager_is_left_and_so_is_what_is_no_swin(self) -> None:
        module: Any = self.module("SwinAttention")
        module.config._attn_implementation = "eager"
        assert "attn_implementation 'eager'" in accelerate(module).left[0].what
        module.config._attn_implementation, module.relative_position_bias = "sdpa", Packed()
        assert accelerate(module).left[0].what == "its relative_position_bias is a Packed"

    def test_whole_models(self) -> None:
        """Every other layer is shifted: the same values, some by the class."""
        from transformers import SwinConfig, SwinModel, Swinv2Config, Swinv2Model

        sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 3]}
        plain = randomize(SwinModel(SwinConfig(**sizes, window_size=4)))
        ours, inputs = copy.deepcopy(plain), {"pixel_values": testing.random(2, 3, 32, 32, grad=False)}
        report = accelerate(ours)
        assert [row.kind for row in report.replaced] == ["SwinAttention"] * 4
        assert report.left == []
        inputs = cast(inputs, torch.float32)
        torch.testing.assert_close(results(ours, inputs), results(plain, inputs), rtol=1e-4, atol=1e-4)
        assert OP in ops(lambda: ours(**inputs))
        restore(ours)
        assert torch.equal(ours(**inputs)[0], plain(**inputs)[0])
        left = accelerate(Swinv2Model(Swinv2Config(**sizes, window_size=4)))
        assert left.replaced == []
        assert {(row.kind, "cosines" in row.what) for row in left.left} == {("Swinv2SelfAttention", True)}

    def test_compiled_whole(self) -> None:
        for name in ("SwinAttention", "DonutSwinSelfAttention"):
            module, inputs = self.module(name), cast({"hidden_states": windows(5, 16, 24)}, torch.float32)
            accelerate(module)
            expected = results(module, inputs)
            module.compile(fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(results(module, inputs), expected)


@pytest.mark.parametrize("name", ["MONAI, 3D", "torchvision, padded"])
def test_compiled_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = public(name, monkeypatch)
    accelerate(module)
    inputs = cast({"x": x}, torch.float32)
    expected = results(module, inputs)
    module.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(module, inputs), expected)


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, x = public(name, monkeypatch)
    ours = copy.deepcopy(plain)
    accelerate(ours)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = plain(x), ours(x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
