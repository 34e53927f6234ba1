"""The flash backend of window_attention: its layout and its choice, with a plain function in flash-attn's place.

The kernels of flash-attn itself run on GPUs only: tests marked ``gpu`` call them where they are installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_window_attention import make
from torch import Tensor

from walt_kernels import explain, use_backend, window_attention
from walt_kernels.testing import check_op
from walt_kernels.window_attention import flash, reference

CASES: dict[str, dict[str, Any]] = {
    "spatiotemporal": {},
    "frames": {"T": 3, "H": 4, "W": 6, "window": (1, 4, 6)},
    "odd edges": {"T": 4, "H": 7, "W": 11, "window": (3, 5, 4)},
    "edges of one axis": {"T": 2, "H": 4, "W": 7, "window": (2, 4, 3)},
    "window wider than the video": {"T": 2, "H": 3, "W": 5, "window": (4, 4, 8)},
    "one token": {"T": 1, "H": 1, "W": 1, "window": (1, 1, 1)},
    "dim 72": {"T": 2, "dim": 72, "window": (2, 4, 4)},
    "own scale": {"T": 2, "window": (2, 4, 4), "scale_factor": 0.3},
    "sliced": {"T": 2, "window": (2, 5, 4), "layout": "sliced"},
}


def sample(case: str = "spatiotemporal", **more: Any) -> dict[str, Any]:
    options = {"dtype": torch.bfloat16, **CASES[case], **more}
    factor = options.pop("scale_factor", None)
    inputs = make(table=False, norm=False, **options)
    return inputs if factor is None else {**inputs, "scale": factor}


def attend(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, scale: float) -> Tensor:
    """The truth of the variable-length call, one sequence after the other."""
    outs = []
    for first, end in zip(begin[:-1].tolist(), begin[1:].tolist(), strict=True):
        qs, ks, vs = (x[first:end].transpose(0, 1).float() for x in (q, k, v))
        outs.append(torch.softmax(qs @ ks.mT * scale, -1).to(v.dtype).float() @ vs)
    return torch.cat(outs, 1).transpose(0, 1).to(q.dtype)


@torch.library.custom_op("walt_tests::varlen", mutates_args=())
def varlen(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, scale: float) -> Tensor:
    return attend(q, k, v, begin, scale).contiguous()


@varlen.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, scale: float) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@torch.library.custom_op("walt_tests::varlen_backward", mutates_args=())
def varlen_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, begin: Tensor, scale: float) -> list[Tensor]:
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
    for first, end in zip(begin[:-1].tolist(), begin[1:].tolist(), strict=True):
        gs, qs, ks, vs = (x[first:end].transpose(0, 1).float() for x in (grad, q, k, v))
        p = torch.softmax(qs @ ks.mT * scale, -1)
        dp = gs @ vs.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        for total, part in zip(grads, (ds @ ks, ds.mT @ qs, p.mT @ gs), strict=True):
            total[first:end] = part.transpose(0, 1)
    return grads


@varlen_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, begin: Tensor, scale: float) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.scale = inputs[4]


varlen.register_autograd(
    lambda ctx, grad: (*varlen_backward(grad, *ctx.saved_tensors, ctx.scale), None, None), setup_context=_setup
)


class StandIn:
    """Of flash-attn's signature; a torch op, as generations 2 and 3 are. Keeps what it was given."""

    def __init__(self, tuples: bool = False) -> None:
        self.tuples = tuples
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        deterministic: bool = False,
    ) -> Any:
        assert not causal
        assert deterministic
        if not torch.compiler.is_compiling():
            self.calls.append({"q": q, "begin": cu_seqlens_q, "longest": max_seqlen_q, "same": max_seqlen_k})
        out = varlen(q, k, v, cu_seqlens_q, softmax_scale)
        return (out, torch.zeros(())) if self.tuples else out


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """flash-attn seems to be installed and to run on CPU tensors."""
    function = StandIn()
    monkeypatch.setitem(flash.functions, "flash_attn", function)
    found = torch.compiler.assume_constant_result(lambda device, tracing: ("flash_attn", ""))
    monkeypatch.setattr(flash, "find", found)
    return function


def by_flash(**inputs: Any) -> Tensor:
    with use_backend("flash"):
        return window_attention(**inputs)


# ---- layout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", flash.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case: str, dtype: torch.dtype, stand_in: StandIn) -> None:
    inputs = sample(case, dtype=dtype)
    check_op(by_flash, reference.window_attention, inputs)
    assert len(stand_in.calls) == 1  # all windows, whatever their sizes, in one call
    assert by_flash(**inputs).is_contiguous()


def test_every_window_begins_where_the_call_is_told(stand_in: StandIn) -> None:
    inputs = sample("odd edges")
    by_flash(**inputs)
    (call,) = stand_in.calls
    lengths = call["begin"].diff().tolist()
    per_axis = ([3, 1], [5, 2], [4, 4, 3])
    assert sorted(lengths) == sorted(2 * [t * h * w for t in per_axis[0] for h in per_axis[1] for w in per_axis[2]])
    assert call["begin"].dtype == torch.int32
    assert (call["begin"][0], call["begin"][-1]) == (0, inputs["q"].shape[:4].numel())
    assert call["longest"] == call["same"] == max(lengths)


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_back(case: str) -> None:
    x = sample(case)["q"].detach()
    parts = flash.parts_of(x, CASES[case].get("window", (5, 4, 4)))
    assert torch.equal(flash.from_tokens(flash.to_tokens(x, parts), parts, x.shape[0]), x)


def test_frames_are_not_copied(stand_in: StandIn) -> None:
    inputs = sample("frames")
    by_flash(**inputs)
    assert stand_in.calls[0]["q"].data_ptr() == inputs["q"].data_ptr()
    assert not stand_in.calls[0]["q"].is_contiguous()  # still a view of the packed projection


def test_empty_batch(stand_in: StandIn) -> None:
    inputs = sample(B=0)
    out = by_flash(**inputs)
    assert out.shape == inputs["q"].shape
    grads = torch.autograd.grad(out.sum(), [inputs[name] for name in "qkv"])
    assert all(grad.shape == out.shape for grad in grads)
    assert stand_in.calls == []


def test_an_output_with_its_log_sum_exp(stand_in: StandIn) -> None:
    alone = by_flash(**sample())
    stand_in.tuples = True
    assert torch.equal(by_flash(**sample()), alone)


def test_compiles_without_a_break(stand_in: StandIn) -> None:
    inputs = sample("odd edges")
    wanted = [inputs[name] for name in "qkv"]
    torch._dynamo.reset()
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    with use_backend("flash"):
        outs = [function(**inputs) for function in (window_attention, compiled)]
    assert len(stand_in.calls) == 1  # the second call ran what was traced
    assert torch.equal(*outs)
    grad = torch.randn_like(outs[0])
    for a, b in zip(*(torch.autograd.grad(out, wanted, grad) for out in outs), strict=True):
        assert torch.equal(a, b)


# ---- choice ---------------------------------------------------------------------------------------------------------


def test_only_where_it_is_forced(stand_in: StandIn) -> None:
    inputs = sample()
    assert explain("window_attention", **inputs)["flash"] == flash.OPT_IN
    window_attention(**inputs)
    assert stand_in.calls == []


def test_refuses_what_flash_attn_would_answer_with_zero(stand_in: StandIn) -> None:
    inputs = sample()
    reason = "flash-attn has a backward pass only"
    with pytest.raises(RuntimeError, match=reason):
        torch.func.jvp(lambda q: by_flash(**{**inputs, "q": q}), (inputs["q"],), (inputs["q"],))
    with pytest.raises(RuntimeError, match=reason):
        torch.func.grad(lambda q: by_flash(**{**inputs, "q": q}).sum())(inputs["q"])
    assert stand_in.calls == []


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"bias_table": torch.zeros(2, 9, 7, 7)}, "knows no bias_table"),
        ({"image": torch.zeros(2, dtype=torch.bool)}, "knows no image"),
        ({"q_norm": torch.ones(64)}, "knows no q_norm"),
        ({"k_norm": torch.ones(64)}, "knows no k_norm"),
        ({"context_k": torch.zeros(2, 3, 2, 64).bfloat16()}, "knows no context_k"),
    ],
)
def test_says_what_it_does_not_know(more: dict[str, Any], reason: str, stand_in: StandIn) -> None:
    if "context_k" in more:
        more = {**more, "context_v": more["context_k"]}
    inputs = sample() | more
    assert reason in str(explain("window_attention", **inputs)["flash"])
    with pytest.raises(RuntimeError, match=reason):
        by_flash(**inputs)
    assert stand_in.calls == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"dtype": torch.float32}, "q is torch.float32"), ({"dim": 12}, "a multiple of 8 as dim, got 12")],
)
def test_says_which_tokens_it_does_not_take(options: dict[str, Any], reason: str, stand_in: StandIn) -> None:
    assert reason in str(explain("window_attention", **sample(**options))["flash"])


def test_cpu_tensors_are_refused() -> None:
    assert "runs on GPUs; this tensor is on cpu" in str(explain("window_attention", **sample())["flash"])


@pytest.mark.parametrize(
    ("capability", "installed", "tracing", "module", "reason"),
    [
        ((9, 0), ("flash_attn_interface", "flash_attn.cute", "flash_attn"), False, "flash_attn_interface", ""),
        ((9, 0), ("flash_attn.cute", "flash_attn"), False, "flash_attn.cute", ""),
        ((9, 0), ("flash_attn.cute", "flash_attn"), True, "flash_attn", ""),
        ((10, 0), ("flash_attn_interface", "flash_attn.cute", "flash_attn"), False, "flash_attn.cute", ""),
        ((8, 0), ("flash_attn_interface", "flash_attn.cute", "flash_attn"), False, "flash_attn", ""),
        ((7, 5), ("flash_attn",), False, "", "flash_attn: not for compute capability 7.5"),
        ((10, 0), ("flash_attn.cute",), True, "", "flash_attn.cute: not under torch.compile"),
        ((9, 0), (), False, "", "flash_attn: not installed"),
    ],
)
def test_the_generation_that_fits_the_gpu(
    capability: tuple[int, int],
    installed: tuple[str, ...],
    tracing: bool,
    module: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(flash, "load", lambda name: None if name in installed else "not installed")
    found = flash.find(torch.device("cuda"), tracing)
    assert found[0] == module
    assert reason in found[1]


def test_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn_good.py").write_text("def flash_attn_varlen_func(): return 3")
    (tmp_path / "flash_attn_broken.py").write_text("raise ImportError('undefined symbol: _ZN3c104')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(flash, "functions", {})
    assert flash.load("flash_attn_good") is None
    assert flash.load("flash_attn_broken") == "ImportError: undefined symbol: _ZN3c104"
    assert flash.load("no_such_package.cute") == "not installed"
    assert flash.functions["flash_attn_good"]() == 3
    assert list(flash.functions) == ["flash_attn_good"]


# ---- the real one ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", flash.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_flash_attn_itself(case: str, dtype: torch.dtype) -> None:
    module, reason = flash.find(torch.device("cuda"), False)
    if not module:
        pytest.skip(reason)
    inputs = {
        name: value.detach().cuda().requires_grad_() if isinstance(value, Tensor) else value
        for name, value in sample(case, dtype=dtype).items()
    }
    check_op(by_flash, reference.window_attention, inputs)
    runs = []
    for _ in range(2):
        out = by_flash(**inputs)
        runs.append([out, *torch.autograd.grad(out, [inputs[name] for name in "qkv"], torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
