"""causal_conv3d on PyTorch's own convolution: right for every option, and chosen where it is ahead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_causal_conv3d import OPTIONS, SHAPES, reference, sample, terms

from walt_kernels import _dispatch, causal_conv3d, explain, use_backend
from walt_kernels.causal_conv3d import onednn
from walt_kernels.testing import check_op

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")

DTYPES = [torch.float32, torch.bfloat16]


def on_a_processor(flags: frozenset[str], monkeypatch: pytest.MonkeyPatch) -> None:
    at = _dispatch.op("causal_conv3d")
    replaced = tuple(b if b.name != "onednn" else onednn.backend(flags, ["amx"], {}) for b in at.backends)
    monkeypatch.setitem(_dispatch._ops, "causal_conv3d", at._replace(backends=replaced))


def on_a_processor_with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_processor(frozenset({"amx_tile", "amx_bf16"}), monkeypatch)


def forced(**inputs: Any) -> torch.Tensor:
    with use_backend("onednn"):
        return causal_conv3d(**inputs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_matches_the_truth_for_every_option(option: str, dtype: torch.dtype, layout: str) -> None:
    inputs = sample(dtype=dtype, layout=layout, **OPTIONS[option])
    check_op(forced, reference, inputs, rows=terms(inputs))
    with use_backend("cpu"):
        assert forced(**inputs).stride() == causal_conv3d(**inputs).stride()


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_truth_in_every_shape(shape: str) -> None:
    inputs = sample(dtype=torch.bfloat16, layout="channels_last", **SHAPES[shape])
    check_op(forced, reference, inputs, rows=terms(inputs))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("channels", [(3, 65), (5, 17), (17, 5), (65, 3)], ids=str)
def test_matches_the_truth_for_odd_channels(
    channels: tuple[int, int], kernel: tuple[int, int, int], layout: str
) -> None:
    """oneDNN once gave garbage for a gradient of the weights in channels_last."""
    options = {"channels": channels[0], "out_channels": channels[1], "kernel": kernel, "size": (12, 11)}
    inputs = sample(dtype=torch.bfloat16, layout=layout, **options)
    check_op(forced, reference, inputs, rows=terms(inputs))


@pytest.mark.parametrize("space_padding", ["zeros", "replicate", "reflect"])
def test_an_empty_batch(space_padding: str) -> None:
    inputs = sample(batch=0, space_padding=space_padding)
    y = forced(**inputs)
    assert y.shape == (0, 20, 4, 7, 9)
    y.sum().backward()
    assert not inputs["weight"].grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_dtypes_that_onednn_has_not_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match=f"backend 'onednn' was forced and cannot run: no convolution for {dtype}"):
        forced(**sample(dtype=dtype))


def test_transforms_run_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_processor_with_amx(monkeypatch)
    weight = torch.randn(64, 64, 3, 3, 3).bfloat16()
    x = torch.randn(2, 1, 64, 3, 8, 8).bfloat16()
    y = torch.vmap(causal_conv3d, (0, None))(x, weight)
    torch.testing.assert_close(y[1], causal_conv3d(x[1], weight))
    grads = torch.vmap(torch.func.grad(lambda w, one: causal_conv3d(one, w).sum()), (None, 0))(weight, x)
    assert grads.shape == (2, *weight.shape)
    with pytest.raises(RuntimeError, match=r"cannot run: does not run in forward mode and under torch\.func"):
        torch.vmap(lambda one: forced(x=one, weight=weight))(x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_as_the_default(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_processor_with_amx(monkeypatch)
    inputs = sample(channels=64, out_channels=64, dtype=torch.bfloat16, layout=layout)
    compiled = torch.compile(causal_conv3d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), causal_conv3d(**inputs))


# ---- where it is chosen ---------------------------------------------------------------------------------------------


def test_without_amx_it_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_processor(frozenset(), monkeypatch)
    reason = explain("causal_conv3d", **sample(channels=64, out_channels=64, dtype=torch.bfloat16))["onednn"]
    assert reason is not None
    assert "AMX" in reason


@pytest.mark.parametrize("channels", [1, 3, 64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_amx_it_is_chosen_in_bfloat16(dtype: torch.dtype, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_processor_with_amx(monkeypatch)
    inputs = sample(channels=channels, out_channels=2, dtype=dtype)
    assert explain("causal_conv3d", **inputs)["onednn"] == (
        None if dtype == torch.bfloat16 else "AMX does not multiply torch.float32"
    )
    chosen = _dispatch.select("causal_conv3d", _dispatch.prepare("causal_conv3d", **inputs))
    assert (chosen == "onednn") == (dtype == torch.bfloat16)


def test_it_is_left_where_onednn_may_not_use_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_processor_with_amx(monkeypatch)
    inputs = sample(channels=64, out_channels=64, dtype=torch.bfloat16)
    with torch.backends.mkldnn.flags(enabled=False):
        assert explain("causal_conv3d", **inputs)["onednn"] == "torch.backends.mkldnn.enabled is False"
    flags = frozenset({"amx_tile", "amx_bf16"})
    for name, value, words in [
        ("ONEDNN_MAX_CPU_ISA", "AVX2", "ONEDNN_MAX_CPU_ISA=AVX2 keeps it from AMX"),
        ("DNNL_MAX_CPU_ISA", "avx512_core", "DNNL_MAX_CPU_ISA=avx512_core keeps it from AMX"),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", None),
        ("ONEDNN_MAX_CPU_ISA", "ALL", None),
    ]:
        opt_in = onednn.backend(flags, ["amx"], {name: value}).opt_in
        assert opt_in is None if words is None else words in (opt_in or "")
    assert "does not let this process use AMX" in (onednn.backend(flags, ["avx2"], {}).opt_in or "")


def test_gradients_of_a_depthwise_convolution_are_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_processor_with_amx(monkeypatch)
    inputs = sample(channels=8, out_channels=8, groups=8, dtype=torch.bfloat16)
    assert "depthwise" in (explain("causal_conv3d", **inputs)["onednn"] or "")
    with torch.no_grad():
        assert explain("causal_conv3d", **inputs)["onednn"] is None


@pytest.mark.parametrize("batch", [1, 3])
def test_a_contiguous_video_comes_back_contiguous(batch: int) -> None:
    y = forced(**sample(batch=batch, dtype=torch.bfloat16))
    assert y.is_contiguous()
    torch.testing.assert_close(y, forced(**sample(batch=batch, dtype=torch.bfloat16, layout="channels_last")))
