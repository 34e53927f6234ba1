"""Causal convolutions of other libraries: ours against the original class, and every class of diffusers' tokenizers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from walt_kernels.integrations import accelerate, causal_convolutions, replace, restore
from walt_kernels.integrations.adapter import fingerprint
from walt_kernels.testing import K_BACKWARD, K_FORWARD, compare, random

autoencoders = pytest.importorskip("diffusers.models.autoencoders", reason="diffusers is not installed")

CHANNELS, HEIGHT, WIDTH = 4, 6, 7
TERMS = CHANNELS * 27  # of one output


class MagvitCausalConv3d(nn.Module):
    """What magvit2_pytorch.magvit2_pytorch.CausalConv3d does."""

    def __init__(self, chan_in: int, chan_out: int, kernel: int, pad_mode: str = "constant", stride: int = 1) -> None:
        super().__init__()
        self.pad_mode, self.time_pad = pad_mode, kernel - 1 + 1 - stride
        self.time_causal_padding = (*[kernel // 2] * 4, self.time_pad, 0)
        self.conv = nn.Conv3d(chan_in, chan_out, kernel, (stride, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mode = self.pad_mode if x.shape[2] > self.time_pad else "constant"
        return self.conv(F.pad(x, self.time_causal_padding, mode=mode))


class CosmosTokenizerCausalConv3d(nn.Module):
    """What cosmos_tokenizer.modules.layers3d.CausalConv3d does."""

    def __init__(self, chan_in: int, chan_out: int, kernel: int, stride: int = 1, padding: int = 1) -> None:
        super().__init__()
        self.pad_mode, self.time_pad = "constant", kernel - stride
        self.spatial_pad = (padding,) * 4
        self.conv3d = nn.Conv3d(chan_in, chan_out, kernel, stride)

    def _replication_pad(self, x: Tensor) -> Tensor:
        first = x[:, :, :1].expand(-1, -1, self.time_pad, -1, -1)
        return F.pad(torch.cat([first, x], dim=2), (*self.spatial_pad, 0, 0), mode=self.pad_mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3d(self._replication_pad(x))


# The classes of packages that are not installed, under their paths.
PUBLIC: dict[str, Any] = {
    "magvit2_pytorch.magvit2_pytorch.CausalConv3d": MagvitCausalConv3d,
    "cosmos_tokenizer.modules.layers3d.CausalConv3d": CosmosTokenizerCausalConv3d,
}
for path, cls in PUBLIC.items():
    cls.__module__, _, cls.__qualname__ = path.rpartition(".")


@pytest.fixture(autouse=True)
def public(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, cls in PUBLIC.items():
        adapter = replace._ADAPTERS[path]
        known = frozenset({fingerprint(*(vars(cls)[method] for method in adapter.methods))})
        monkeypatch.setitem(replace._ADAPTERS, path, dataclasses.replace(adapter, known=known))


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one in every call of our op."""
    calls: list[int] = []
    op = causal_convolutions.causal_conv3d

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return op(*args, **kwargs)

    monkeypatch.setattr(causal_convolutions, "causal_conv3d", counted)
    return calls


def make(name: str, *args: Any, **kwargs: Any) -> nn.Module:
    cls = {cls.__name__: cls for cls in PUBLIC.values()}.get(name) or classes()[name]
    module: nn.Module = cls(*args, **kwargs)
    return module


@functools.cache
def classes() -> dict[str, type[nn.Module]]:
    """Every class of diffusers' tokenizers that is a causal convolution by its name."""
    found = {}
    for info in pkgutil.iter_modules(autoencoders.__path__, autoencoders.__name__ + "."):
        module = importlib.import_module(info.name)
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if "CausalConv3d" in name and cls.__module__ == module.__name__:
                found[name] = cls
    return found


# How each class is run over the chunks of a clip.


def whole(module: Any, chunks: list[Tensor]) -> Iterator[Tensor]:
    for chunk in chunks:
        yield module(chunk)


def with_cache(module: Any, chunks: list[Tensor]) -> Iterator[Tensor]:
    cache = None
    for chunk in chunks:
        kept = chunk[:, :, -2:].clone()
        if kept.shape[2] < 2 and cache is not None:
            kept = torch.cat([cache[:, :, -1:], kept], dim=2)
        yield module(chunk, cache)
        cache = kept


def with_returned_cache(module: Any, chunks: list[Tensor]) -> Iterator[Tensor]:
    cache = None
    for chunk in chunks:
        y, cache = module(chunk, conv_cache=cache)
        yield y
    if cache is not None:
        yield cache


def with_features(module: Any, chunks: list[Tensor]) -> Iterator[Tensor]:
    module._clear_conv_cache()
    for chunk in chunks:
        yield module(chunk)
        yield module.prev_features


def with_first_chunk(offset: int) -> Callable[..., Iterator[Tensor]]:
    def run(module: Any, chunks: list[Tensor]) -> Iterator[Tensor]:
        module.causal_cache, module.is_first_chunk, module.cache_offset = None, True, offset
        for chunk in chunks:
            yield module(chunk)
            # The original keeps more of the past; this is what it reads.
            yield module.causal_cache[:, :, -module.time_pad :] if module.time_pad else module.causal_cache[:, :, :0]
            module.is_first_chunk = False

    return run


def with_dictionary(module: Any, chunks: list[Tensor]) -> Iterator[Tensor]:
    cache = {"padding": None}
    for chunk in chunks:
        yield module(chunk, cache)
        assert cache["padding"] is not None
        yield cache["padding"]


Case = tuple[str, tuple[Any, ...], dict[str, Any], Any, list[list[int]]]
CLIPS = [[1], [5]]  # an image, a video
CHUNKS = [[1], [5], [1, 3, 1, 1], [2, 3]]
# Class, arguments, how it is run, and the lengths of chunks in which.
CASES: dict[str, Case] = {
    "wan": ("WanCausalConv3d", (4, 6, 3), {"padding": 1}, with_cache, CHUNKS),
    "wan, time padding alone": ("WanCausalConv3d", (4, 6, (3, 1, 1)), {"padding": (1, 0, 0)}, with_cache, CHUNKS),
    "wan, one frame": ("WanCausalConv3d", (4, 6, 1), {}, with_cache, CHUNKS),
    "wan, strided": ("WanCausalConv3d", (4, 6, (3, 1, 1)), {"stride": (2, 1, 1)}, whole, [[5], [6]]),
    "qwen-image": ("QwenImageCausalConv3d", (4, 6, 3), {"padding": 1}, with_cache, CHUNKS),
    "qwen-image 2.1": ("QwenImage21CausalConv3d", (4, 6, 3), {"padding": 1}, whole, [[1]]),
    "qwen-image 2.1, strided": ("QwenImage21CausalConv3d", (4, 6, 3), {"padding": 1, "stride": 2}, whole, [[1]]),
    "hunyuan": ("HunyuanVideoCausalConv3d", (4, 6, 3), {}, whole, CLIPS),
    "hunyuan, zeros": ("HunyuanVideoCausalConv3d", (4, 6, 3), {"pad_mode": "constant"}, whole, CLIPS),
    "hunyuan, strided": ("HunyuanVideoCausalConv3d", (4, 6, 3), {"stride": (2, 2, 2)}, whole, CLIPS),
    "hunyuan image refiner": ("HunyuanImageRefinerCausalConv3d", (4, 6, 3), {}, whole, CLIPS),
    "hunyuan 1.5": ("HunyuanVideo15CausalConv3d", (4, 6, 3), {}, whole, CLIPS),
    "magvit2": ("MagvitCausalConv3d", (4, 6, 3), {}, whole, CLIPS),
    "magvit2, replicate": ("MagvitCausalConv3d", (4, 6, 3, "replicate"), {}, whole, CLIPS),
    "magvit2, strided": ("MagvitCausalConv3d", (4, 6, 3), {"stride": 2}, whole, [[2], [5]]),
    "kvae": ("KVAECausalConv3d", (4, 6, 3), {}, whole, CLIPS),
    "kvae, strided": ("KVAECausalConv3d", (4, 6, 3), {"stride": (2, 2, 2)}, whole, CLIPS),
    "cosmos": ("CosmosCausalConv3d", (4, 6, (3, 3, 3)), {}, whole, CLIPS),
    "cosmos, space": ("CosmosCausalConv3d", (4, 6, (1, 3, 3)), {"stride": (1, 2, 2), "padding": 0}, whole, CLIPS),
    "cosmos, time": ("CosmosCausalConv3d", (4, 6, (3, 1, 1)), {"stride": (2, 1, 1), "padding": 0}, whole, [[2], [6]]),
    "cosmos tokenizer": ("CosmosTokenizerCausalConv3d", (4, 6, 3), {}, whole, CLIPS),
    "cosmos tokenizer, strided": ("CosmosTokenizerCausalConv3d", (4, 6, 3, 2, 0), {}, whole, [[2], [6]]),
    "ltx": ("LTXVideoCausalConv3d", (4, 6, 3), {}, whole, CLIPS),
    "ltx, strided": ("LTXVideoCausalConv3d", (4, 6, 3), {"stride": 2}, whole, CLIPS),
    "ltx, grouped": ("LTXVideoCausalConv3d", (4, 6, 3), {"groups": 2}, whole, CLIPS),
    "ltx 2": ("LTX2VideoCausalConv3d", (4, 6, 3), {}, whole, CLIPS),
    "ltx 2, reflect": ("LTX2VideoCausalConv3d", (4, 6, 3), {"spatial_padding_mode": "reflect"}, whole, CLIPS),
    "ltx 2, dilated": ("LTX2VideoCausalConv3d", (4, 6, 3), {"dilation": 2}, whole, [[4], [5]]),
    "cogvideox": ("CogVideoXCausalConv3d", (4, 6, 3), {}, with_returned_cache, CHUNKS),
    "cogvideox, one frame": ("CogVideoXCausalConv3d", (4, 6, 1), {}, with_returned_cache, CHUNKS),
    "mochi": (
        "CogVideoXCausalConv3d",
        (4, 6, (2, 2, 2)),
        {"stride": (2, 2, 2), "pad_mode": "replicate"},
        with_returned_cache,
        CLIPS,
    ),
    "minimax": ("MiniMaxH3VideoCausalConv3d", (4, 6, 3, 1, 1, 2), {}, whole, CLIPS),
    "minimax, strided": ("MiniMaxH3VideoCausalConv3d", (4, 6, 3, 2, 1, 2), {}, whole, CLIPS),
    "easyanimate": ("EasyAnimateCausalConv3d", (4, 6, 3), {}, with_features, CHUNKS),
    "easyanimate, strided": ("EasyAnimateCausalConv3d", (4, 6, 3, 2), {}, with_features, [[1], [5], [1, 4], [1, 2, 2]]),
    "vidtok": ("VidTokCausalConv3d", (4, 6, 3), {}, with_first_chunk(0), CHUNKS),
    "vidtok, one frame": ("VidTokCausalConv3d", (4, 6, 1), {}, with_first_chunk(0), CHUNKS),
    "vidtok, strided": ("VidTokCausalConv3d", (4, 6, 3, (2, 2, 2)), {}, with_first_chunk(0), [[2], [4, 4]]),
    "vidtok, overlapping": ("VidTokCausalConv3d", (4, 6, 3), {"pad_mode": "replicate"}, with_first_chunk(1), CHUNKS),
    "kvae, cached": ("KVAECachedCausalConv3d", (4, 6, 3), {}, with_dictionary, [[5], [3, 2], [2, 3, 2]]),
    "kvae, cached, one frame": ("KVAECachedCausalConv3d", (4, 6, 1), {}, with_dictionary, CHUNKS),
    "kvae, cached, strided": (
        "KVAECachedCausalConv3d",
        (4, 6, 3, (2, 1, 1)),
        {},
        with_dictionary,
        [[1], [5], [5, 4], [4, 4]],
    ),
    "kandinsky": ("Kandinsky6SRCausalConv3d", (4, 6, 3), {}, with_dictionary, CHUNKS),
    "kandinsky, strided": (
        "Kandinsky6SRCausalConv3d",
        (4, 6, 3, (2, 1, 1)),
        {},
        with_dictionary,
        [[1], [5], [5, 4], [4, 4]],
    ),
}
DTYPES = [torch.float32, torch.bfloat16]


def case(name: str) -> tuple[nn.Module, Any, list[list[int]]]:
    cls, args, kwargs, run, lengths = CASES[name]
    torch.manual_seed(0)
    return make(cls, *args, **kwargs), run, lengths


def results(module: nn.Module, run: Any, x: Tensor, lengths: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and caches of every chunk; gradients of the clip and of all parameters."""
    outputs = list(run(module, list(x.split(lengths, dim=2))))
    weights = [random(*y.shape, grad=False, seed=i).to(y.dtype) for i, y in enumerate(outputs)]
    loss = sum(((y * weight).double().sum() for y, weight in zip(outputs, weights, strict=True)), torch.zeros(()))
    assert isinstance(loss, Tensor)
    return [y.detach() for y in outputs], list(torch.autograd.grad(loss, [x, *module.parameters()]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_exact_forward_and_backward(name: str, dtype: torch.dtype, count: list[int]) -> None:
    original, run, all_lengths = case(name)
    original.to(dtype)
    module, truth = copy.deepcopy(original), copy.deepcopy(original).double()
    report = accelerate(module)
    assert len(report.replaced) == 1, report
    for lengths in all_lengths:
        count.clear()
        x = random(2, CHANNELS, sum(lengths), HEIGHT, WIDTH, dtype=dtype)
        wide = x.detach().double().requires_grad_()
        outputs, grads = zip(
            *(results(m, run, t, lengths) for m, t in ((module, x), (truth, wide), (original, x))), strict=True
        )
        assert len(count) == len(lengths), f"{lengths}: the op ran in {len(count)} of {len(lengths)} calls"
        for i, (ours, exact, theirs) in enumerate(zip(*outputs, strict=True)):
            compare(f"{lengths} output {i}", ours, exact, theirs, k=K_FORWARD, rows=TERMS)
        for i, (ours, exact, theirs) in enumerate(zip(*grads, strict=True)):
            compare(f"{lengths} gradient {i}", ours, exact, theirs, k=K_BACKWARD, rows=TERMS)
    restore(module)
    again = [results(m, run, x, all_lengths[-1]) for m in (module, original)]
    for kind in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(again[0][kind], again[1][kind], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_autocast_gives_what_the_original_gives(name: str, count: list[int]) -> None:
    original, run, all_lengths = case(name)
    module = copy.deepcopy(original)
    accelerate(module)
    x = random(1, CHANNELS, sum(all_lengths[-1]), HEIGHT, WIDTH)
    exact, _ = results(copy.deepcopy(original).double(), run, x.detach().double().requires_grad_(), all_lengths[-1])
    with torch.autocast("cpu", torch.bfloat16):
        (ours, _), (theirs, _) = (results(m, run, x, all_lengths[-1]) for m in (module, original))
    assert len(count) == len(all_lengths[-1])
    for a, b, c in zip(ours, exact, theirs, strict=True):
        compare(name, a, b, c, k=K_FORWARD, rows=TERMS, dtype=torch.bfloat16)


def test_every_class_of_diffusers_is_replaced_or_left_with_a_reason() -> None:
    replaced, found = set(), classes()
    makers = {cls: (args, kwargs) for cls, args, kwargs, _, _ in reversed(CASES.values())}
    for name, cls in found.items():
        if name in makers:
            module = make(name, *makers[name][0], **makers[name][1])
        else:  # of a later release
            module = cls.__new__(cls)
            nn.Module.__init__(module)
        report = accelerate(module)
        (row,) = report.replaced + report.left
        assert row.kind == name
        assert row.what
        if report.replaced:
            replaced.add(name)
    assert len(found) >= 16
    assert len(replaced) >= 14, sorted(found.keys() - replaced)


def pair(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """A module and the same one accelerated."""
    torch.manual_seed(0)
    original = make(name, *args, **kwargs)
    module = copy.deepcopy(original)
    accelerate(module)
    return original, module


def left(name: str, *args: Any, **kwargs: Any) -> str:
    """The reason why a module is left."""
    module = make(name, *args, **kwargs)
    cls = type(module)
    (row,) = accelerate(module).left
    assert type(module) is cls
    return row.what


X = random(1, CHANNELS, 5, HEIGHT, WIDTH, grad=False)


@pytest.mark.parametrize("name", [name for name in CASES if "," not in name or name == "kvae, cached"])
def test_compiled_whole(name: str, count: list[int]) -> None:
    original, run, all_lengths = case(name)
    module = copy.deepcopy(original)
    accelerate(module)
    chunks = [X[:, :, : all_lengths[0][0]]]

    def first(x: Tensor) -> list[Tensor]:
        return list(run(module, [x]))

    torch._dynamo.reset()
    compiled = torch.compile(first, fullgraph=True, backend="eager", dynamic=False)
    for ours, theirs in zip(compiled(*chunks), run(original, chunks), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert count


def test_a_call_that_is_not_causal_is_the_originals(count: list[int]) -> None:
    original, module = pair("LTX2VideoCausalConv3d", 4, 6, 3)
    assert torch.equal(module(X, causal=False), original(X, causal=False))
    assert not count
    assert left("LTXVideoCausalConv3d", 4, 6, 3, is_causal=False) == "it is not causal"
    original, module = pair("LTXVideoCausalConv3d", 4, 6, 3)
    original.is_causal = module.is_causal = False
    assert torch.equal(module(X), original(X))
    assert not count


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_a_cache_of_any_length(frames: int, count: list[int]) -> None:
    cache = random(1, CHANNELS, frames, HEIGHT, WIDTH, grad=False)
    for name, kwargs in (("WanCausalConv3d", {"padding": 1}), ("CogVideoXCausalConv3d", {})):
        original, module = pair(name, 4, 6, 3, **kwargs)
        torch.testing.assert_close(module(X, cache), original(X, cache))
    assert len(count) == (2 if frames < 3 else 0)


def test_what_the_op_cannot_take_is_the_originals(count: list[int]) -> None:
    original, module = pair("WanCausalConv3d", 4, 6, 3, padding=1)
    assert torch.equal(module(X[0]), original(X[0]))  # no batch
    for call in (original, module):
        with pytest.raises(RuntimeError, match="should be the same"):
            call(X.double())
    original, module = (m.double() for m in (original, module))
    cache = X[:, :, :2]
    assert torch.equal(module(X.double(), cache), original(X.double(), cache))  # widened by torch.cat
    assert not count


def test_hooks_and_wrappers_of_an_inner_convolution_are_not_passed_over(count: list[int]) -> None:
    def double(module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        return 2 * y

    original, module = pair("HunyuanVideoCausalConv3d", 4, 6, 3)
    handle = module.conv.register_forward_hook(double)
    assert torch.equal(module(X), 2 * original(X))
    assert not count
    handle.remove()
    module.conv = nn.Sequential(module.conv, nn.Identity())
    assert torch.equal(module(X), original(X))
    assert not count
    original.conv.register_forward_hook(double)
    (row,) = accelerate(original).left
    assert row.what == "its conv is a Conv3d of another kind, or has hooks"


def test_parametrized_weights(count: list[int]) -> None:
    weight_norm = nn.utils.parametrizations.weight_norm
    original, module = pair("WanCausalConv3d", 4, 6, 3, padding=1)
    torch.testing.assert_close(weight_norm(module)(X), original(X))
    assert len(count) == 1
    assert [row.name for row in accelerate(module).replaced] == [""]
    with pytest.raises(ValueError, match="another library"):
        restore(module)
    torch.nn.utils.parametrize.remove_parametrizations(module, "weight")
    restore(module)
    inner = make("CosmosTokenizerCausalConv3d", 4, 6, 3)
    weight_norm(inner.conv3d)
    (row,) = accelerate(inner).left
    assert row.what == "its conv3d is a ParametrizedConv3d of another kind, or has hooks"


def test_large_inputs_that_the_original_splits(monkeypatch: pytest.MonkeyPatch, count: list[int]) -> None:
    splitting = {path: (known, lambda itemsize: 1000) for path, (known, _) in causal_convolutions._SPLITTING.items()}
    monkeypatch.setattr(causal_convolutions, "_SPLITTING", splitting)
    for stride, calls in ((1, 1), (2, 0)):  # without a stride, splitting changes nothing
        original, module = pair("KVAECausalConv3d", 4, 6, 3, stride=(stride, 1, 1))
        count.clear()
        torch.testing.assert_close(module(X), original(X))
        assert len(count) == calls


def test_another_release_of_an_inner_class_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make("KVAECausalConv3d", 4, 6, 3)

    def forward(self: Any, input: Tensor, write_to: Tensor | None = None) -> Tensor:
        return input

    monkeypatch.setattr(type(module.conv), "forward", forward)
    assert "of a release that was not checked" in accelerate(module).left[0].what


@pytest.mark.parametrize(
    ("reason", "name", "args", "kwargs"),
    [
        ("pads by 'reflect'", "HunyuanVideoCausalConv3d", (4, 6, 3), {"pad_mode": "reflect"}),
        ("pads by 'circular'", "LTX2VideoCausalConv3d", (4, 6, 3), {"spatial_padding_mode": "circular"}),
        ("pads by 'circular'", "EasyAnimateCausalConv3d", (4, 6, 3), {"padding_mode": "circular"}),
        ("pads by 'circular'", "CosmosCausalConv3d", (4, 6, 3), {"pad_mode": "circular"}),
        ("pads twice", "HunyuanVideoCausalConv3d", (4, 6, 3), {"padding": 1}),
        ("pads twice", "KVAECausalConv3d", (4, 6, 3), {"padding": "valid"}),
        ("keeps all of its input", "EasyAnimateCausalConv3d", (4, 6, (1, 3, 3)), {}),
    ],
)
def test_options_that_the_op_has_not(reason: str, name: str, args: Any, kwargs: Any) -> None:
    assert reason in left(name, *args, **kwargs)
