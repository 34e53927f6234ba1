"""Integers of NumPy and of tensors wherever an int is asked for; bools and floats are none. Sizes stay symbolic."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_pipeline import QUICK, build, video
from torch import Tensor

from walt.atomic import read_json, write_json
from walt.errors import WaltError
from walt.model.config import ClipShape, DiffusionConfig, TokenizerConfig, TransformerConfig
from walt.model.diffusion import Diffusion
from walt.model.randoms import sample_noise
from walt.sample.pipeline import WaltPipeline
from walt.settings import DataConfig, TrainingConfig
from walt.train.discriminator import Discriminator
from walt_kernels import adaln_modulate, causal_conv3d, next_history, window_attention
from walt_kernels.nn import AdaLNLoRA, CausalConv3d, WindowAttention
from walt_kernels.values import plain


class Index:
    """What another library's integer is: something with __index__."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


KINDS: dict[str, Callable[[int], Any]] = {
    "int64": np.int64,
    "uint8": np.uint8,
    "array": np.array,
    "tensor": torch.tensor,
    "index": Index,
}
NO_INTEGERS = [True, np.bool_(True), torch.tensor(True), 1.0, np.float32(1), torch.tensor(1.0), "1", None]
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
no_integers = pytest.mark.parametrize("wrong", NO_INTEGERS, ids=repr)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@kinds
def test_plain(kind: Callable[[int], Any]) -> None:
    for value, expected in ((kind(3), 3), ((kind(3), [kind(1)]), (3, [1]))):
        assert plain(value) == expected
        assert json.dumps(plain(value)) == json.dumps(expected)
    assert type(plain(kind(3))) is int


def test_plain_of_other_values() -> None:
    assert plain(np.array([[1, 2]])) == [[1, 2]]
    assert plain(torch.tensor([1, 2])) == [1, 2]
    assert [type(plain(value)) for value in NO_INTEGERS] == [bool, bool, bool, float, float, Tensor, str, type(None)]
    weight = torch.ones((), requires_grad=True)
    assert plain(weight) is weight


X, W = draw(1, 4, 5, 6, 6), draw(4, 2, 3, 3, 3)
Q = draw(1, 2, 4, 4, 2, 8)


@kinds
def test_ops(kind: Callable[[int], Any]) -> None:
    expected = causal_conv3d(X, W, stride=2, dilation=(1, 1, 1), padding=1, groups=2)
    options = {"stride": kind(2), "dilation": [kind(1)] * 3, "groups": kind(2)}
    for padding in (kind(1), (kind(1), kind(1)), ((kind(1), 1), (1, kind(1))), np.ones((2, 2), int)):
        assert torch.equal(causal_conv3d(X, W, padding=padding, **options), expected)
    assert torch.equal(next_history(X, None, kind(3), kind(2)), next_history(X, None, 3, 2))
    assert torch.equal(
        window_attention(Q, Q, Q, window=(kind(1), kind(2), 2)), window_attention(Q, Q, Q, window=(1, 2, 2))
    )


def test_ops_take_arrays_of_sizes_and_numpy_fractions() -> None:
    sizes = np.array([1, 2, 2])
    for window in (sizes, torch.from_numpy(sizes), torch.Size([1, 2, 2])):
        assert torch.equal(window_attention(Q, Q, Q, window=window), window_attention(Q, Q, Q, window=(1, 2, 2)))
    assert torch.equal(causal_conv3d(X, W, stride=sizes, groups=2), causal_conv3d(X, W, stride=(1, 2, 2), groups=2))
    x, row, eps = draw(1, 3, 8), draw(1, 8), np.float32(0.5)
    assert torch.equal(adaln_modulate(x, row, row, eps=eps), adaln_modulate(x, row, row, eps=0.5))
    scaled = window_attention(Q, Q, Q, window=(1, 2, 2), scale=eps, norm_eps=eps)
    assert torch.equal(scaled, window_attention(Q, Q, Q, window=(1, 2, 2), scale=0.5, norm_eps=0.5))


@no_integers
def test_ops_refuse_what_is_no_integer(wrong: Any) -> None:
    for name in ("stride", "dilation", "padding", "groups"):
        with pytest.raises((TypeError, ValueError), match=f"{name} is .*expected"):
            causal_conv3d(X, W, **{"groups": 2, name: wrong})
    with pytest.raises(TypeError, match=r"window is .*expected three integers"):
        window_attention(Q, Q, Q, window=(1, wrong, 2))


@kinds
def test_modules(kind: Callable[[int], Any]) -> None:
    conv = CausalConv3d(kind(4), kind(6), kind(3), kind(1), kind(1), (kind(1), 2, 2), kind(2))
    sizes = (
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
    )
    assert repr(sizes) == "(4, 6, (3, 3, 3), (1, 1, 1), 1, (1, 2, 2), 2)"
    attention = WindowAttention(kind(16), kind(2), (kind(1), 2, 2), context_width=kind(4))
    assert repr((attention.width, attention.heads, attention.window)) == "(16, 2, (1, 2, 2))"
    assert repr(AdaLNLoRA(kind(16), kind(2), kind(3), kind(4))).startswith(
        "AdaLNLoRA(\n  16, layers=2, rank=3, chunks=4"
    )
    assert Discriminator(kind(4), [kind(2)])(draw(1, 3, 2, 4, 4)).shape == (1,)


@no_integers
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda wrong: CausalConv3d(wrong, 4, 3), "in_channels"),
        (lambda wrong: CausalConv3d(4, 4, wrong), "kernel_size"),
        (lambda wrong: CausalConv3d(4, 4, 3, groups=wrong), "groups"),
        (lambda wrong: WindowAttention(16, wrong, 2), "heads"),
        (lambda wrong: WindowAttention(16, 2, wrong), "window"),
        (lambda wrong: AdaLNLoRA(16, 2, wrong), "rank"),
    ],
    ids=["in_channels", "kernel_size", "groups", "heads", "window", "rank"],
)
def test_modules_refuse_what_is_no_integer(make: Callable[[Any], Any], name: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name}"):
        make(wrong)


def test_sizes_stay_symbolic() -> None:
    """A window and a padding that are sizes of a tensor: one graph for all of them."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Any:
        graphs.append(graph)
        return graph.forward

    def padded(x: Tensor, weight: Tensor, like: Tensor) -> Tensor:
        return causal_conv3d(x, weight, padding=(like.shape[0], (like.shape[0], like.shape[0] + 1)))

    torch._dynamo.reset()
    compiled = torch.compile(padded, fullgraph=True, dynamic=True, backend=backend)
    for size in (2, 3, 5):
        like = torch.zeros(size)
        assert torch.equal(compiled(X, W[:, [0, 1, 0, 1]], like), padded(X, W[:, [0, 1, 0, 1]], like))
    assert len(graphs) == 1


@kinds
def test_configurations(kind: Callable[[int], Any]) -> None:
    made = [
        (TokenizerConfig(channels=kind(4), multipliers=(kind(1),) * 4, groups=kind(2)), {"multipliers": (1,) * 4}),
        (TransformerConfig(layers=kind(2), latent_size=[kind(3), 4, 4], classes=kind(5)), {"latent_size": (3, 4, 4)}),
        (TransformerConfig(spacetime_window=np.array([3, 2, 2])), {"spacetime_window": (3, 2, 2)}),
        (DiffusionConfig(steps=kind(20)), {"steps": 20}),
        (TrainingConfig(steps=kind(20), seed=kind(1), lr=np.float32(0.5)), {"steps": 20, "seed": 1, "lr": 0.5}),
        (DataConfig(frames=kind(5), images=kind(1)), {"frames": 5}),
    ]
    for config, expected in made:
        assert {name: getattr(config, name) for name in expected} == expected
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert yaml.safe_load(yaml.safe_dump(config.to_dict())) == config.to_dict()
    assert json.dumps(dataclasses.asdict(ClipShape(kind(9), kind(16), kind(16), kind(8)))).startswith('{"frames": 9')


@pytest.mark.parametrize("wrong", [True, np.bool_(True), torch.tensor(True), 2.0, np.float64(2), "2", None], ids=repr)
def test_configurations_refuse_what_is_no_integer(wrong: Any) -> None:
    for config, name in (
        (TokenizerConfig, "channels"),
        (TokenizerConfig, "middle_blocks"),
        (TransformerConfig, "classes"),
        (DiffusionConfig, "steps"),
        (DataConfig, "images"),
    ):
        with pytest.raises(ValueError, match=f"{name}: got .*; expected an int"):
            config(**{name: wrong})
    for name in ("steps", "seed", "accumulate"):
        with pytest.raises(ValueError, match=f"{name}: got .*; expected an int"):
            TrainingConfig(**{"steps": 3, name: wrong})
    with pytest.raises(ValueError, match=r"latent_size: got .*; expected 3 ints"):
        TransformerConfig(latent_size=(5, wrong, 16))


@pytest.fixture(scope="module")
def pipeline() -> WaltPipeline:
    return build()


@kinds
def test_sampling(pipeline: WaltPipeline, kind: Callable[[int], Any]) -> None:
    expected = pipeline.generate([1, 0], 2, seed=3, batch=1, **QUICK)
    options = {"seed": kind(3), "batch": kind(1), "steps": kind(2), "progress": False}
    for labels in ([kind(1), kind(0)], np.array([1, 0]), torch.tensor([1, 0])):
        assert np.array_equal(pipeline.generate(labels, kind(2), **options), expected)
    assert np.array_equal(pipeline.generate(kind(1), **options), expected[:1])
    longer = pipeline.extend(video(9), kind(1), label=kind(1), **QUICK)
    assert np.array_equal(longer, pipeline.extend(video(9), 1, label=1, **QUICK))
    larger = pipeline.upscale(video(9), stages=kind(1), noise=np.float32(0.25), **QUICK)
    assert np.array_equal(larger, pipeline.upscale(video(9), stages=1, noise=0.25, **QUICK))
    assert pipeline.decode(torch.zeros(2, 4, 3, 2, 2), batch=kind(1)).shape == (2, 9, 16, 16, 3)
    assert torch.equal(sample_noise(kind(3), [(0,)], (2,)), sample_noise(3, [(0,)], (2,)))
    assert Diffusion().timesteps(kind(3)) == Diffusion().timesteps(3)


@no_integers
def test_sampling_refuses_what_is_no_integer(pipeline: WaltPipeline, wrong: Any) -> None:
    for name in ("num", "seed", "steps", "batch"):
        with pytest.raises(WaltError, match=f"{name}: got .*; expected an int"):
            pipeline.generate(**{**QUICK, name: wrong})
    with pytest.raises(WaltError, match=r"chunks: got .*; expected an int"):
        pipeline.extend(video(9), wrong, **QUICK)
    if wrong is not None:  # all stages; no class
        with pytest.raises(WaltError, match=r"stages: got .*; expected an int"):
            pipeline.upscale(video(9), stages=wrong, **QUICK)
    if wrong not in (None, "1"):  # numbers may come as text
        with pytest.raises(WaltError, match="unknown class"):
            pipeline.generate(wrong, **QUICK)


def test_a_number_is_no_sentence(pipeline: WaltPipeline) -> None:
    for wrong in (5, np.int64(5), True, 1.5):
        with pytest.raises(WaltError, match=r"text: got .*; expected a sentence, or one for each sample"):
            pipeline.generate(text=wrong, **QUICK)


def test_files_take_numbers_of_numpy(tmp_path: Any) -> None:
    write_json(tmp_path / "index.json", {"frames": np.int64(5), "sizes": np.array([1, 2]), "fps": np.float32(0.5)})
    assert read_json(tmp_path / "index.json") == {"frames": 5, "sizes": [1, 2], "fps": 0.5}
