"""accelerate and restore: what of a model stays as it is, on the causal convolutions of Wan's tokenizer."""

from __future__ import annotations

import copy
import io
import linecache
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import walt_kernels
from walt_kernels.integrations import accelerate, restore
from walt_kernels.integrations.adapter import fingerprint

wan = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan", reason="diffusers is not installed")


class Subclass(wan.WanCausalConv3d):
    pass


class LikeWanCausalConv3d(nn.Conv3d):
    """Of the family by its name, and known to nobody."""


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(wan.WanCausalConv3d(4, 8, 3, padding=1), nn.SiLU(), wan.WanCausalConv3d(8, 4, 3, padding=1))


def video(*, grad: bool = False) -> Tensor:
    return torch.randn(1, 4, 5, 6, 7, generator=torch.Generator().manual_seed(1)).requires_grad_(grad)


def calls(module: nn.Module, *inputs: Any) -> int:
    """How often a forward pass calls our op."""
    with torch.profiler.profile() as profile:
        module(*inputs)
    return sum(event.count for event in profile.key_averages() if event.key == "walt_kernels::causal_conv3d")


def test_ours_runs_and_the_original_again_bit_for_bit() -> None:
    net, x = model(), video()
    kinds = [type(module) for module in net]
    before = net(x)
    assert calls(net, x) == 0
    accelerate(net)
    assert calls(net, x) == 2
    torch.testing.assert_close(net(x), before)
    restore(net)
    assert [type(module) for module in net] == kinds
    assert calls(net, x) == 0
    assert torch.equal(net(x), before)


def test_everything_of_a_module_stays() -> None:
    net, x = model(), video()
    seen = []
    net[0].register_forward_hook(lambda *_: seen.append("after"))
    net[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    net[2].weight.requires_grad_(False)
    state, parameters, modules = list(net.state_dict()), list(net.parameters()), list(net.modules())
    accelerate(net)
    assert list(net.state_dict()) == state
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
    assert not net[2].weight.requires_grad
    assert isinstance(net[0], wan.WanCausalConv3d)
    assert type(net[0]).__name__ == "WanCausalConv3d"
    assert str(net) == str(model())
    net(x).sum().backward()
    assert seen == ["before", "after"]
    assert net[0].weight.grad is not None
    assert net[2].weight.grad is None


@pytest.mark.parametrize("first", ["to", "accelerate"])
def test_before_and_after_to(first: str) -> None:
    net, x = model(), video().double()
    if first == "to":
        net.double()
    accelerate(net)
    net.double()
    assert calls(net, x) == 2
    torch.testing.assert_close(net(x), model().double()(x))


def test_twice_is_once() -> None:
    net = model()
    first = accelerate(net)
    kinds = [type(module) for module in net]
    second = accelerate(net)
    assert [type(module) for module in net] == kinds
    assert second == first
    restore(net)
    restore(net)
    assert type(net[0]) is wan.WanCausalConv3d


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_accelerated_too(how: str) -> None:
    net, x = model(), video()
    accelerate(net)
    net[0].weight.requires_grad_(False)
    if how == "deepcopy":
        other = copy.deepcopy(net)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        file = io.BytesIO()
        torch.save(net, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert type(other[0]) is type(net[0])
    assert calls(other, x) == 2
    assert torch.equal(other(x), net(x))
    assert other[0].weight.data_ptr() != net[0].weight.data_ptr()
    assert not other[0].weight.requires_grad
    restore(other)
    assert type(other[0]) is wan.WanCausalConv3d
    assert type(net[0]) is not wan.WanCausalConv3d


def test_a_copy_of_a_release_that_is_not_known_is_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = model(), video()
    accelerate(net)
    pickled = pickle.dumps(net)

    def forward(self: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        return x

    monkeypatch.setattr(wan.WanCausalConv3d, "forward", forward)
    other = pickle.loads(pickled)
    assert type(other[0]) is wan.WanCausalConv3d
    assert torch.equal(other[0](x), x)


def test_compiled_whole() -> None:
    net, x = model(), video(grad=True)
    accelerate(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), net(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)))


def test_accelerate_after_compile_is_seen() -> None:
    net, x = model(), video()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    accelerate(compiled)
    torch.testing.assert_close(compiled(x), before)
    assert calls(compiled, x) == 2


def test_checkpointing() -> None:
    net = model()
    accelerate(net)
    grads = []
    for use_reentrant in (None, True, False):
        x = video(grad=True)
        y = net(x) if use_reentrant is None else checkpoint(net, x, use_reentrant=use_reentrant)
        y.square().sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_the_report() -> None:
    net = nn.Sequential(model(), nn.Linear(2, 2), Subclass(4, 4, 3, padding=1), LikeWanCausalConv3d(2, 2, 3))
    report = accelerate(net)
    assert [tuple(row) for row in report.replaced] == [
        ("0.0", "WanCausalConv3d", "causal_conv3d"),
        ("0.2", "WanCausalConv3d", "causal_conv3d"),
    ]
    assert [(row.name, row.kind) for row in report.left] == [("2", "Subclass"), ("3", "LikeWanCausalConv3d")]
    assert report.left[0].what == "a subclass of WanCausalConv3d, which may compute something else"
    lines = str(report).splitlines()
    assert lines[0].split() == ["0.0", "WanCausalConv3d", "causal_conv3d"]
    assert lines[3].split(maxsplit=2) == ["3", "LikeWanCausalConv3d", "left: no adapter for this class"]
    assert lines[-1] == "2 replaced, 2 left"
    assert type(net[2]) is Subclass


def test_a_module_itself_and_modules_of_ours() -> None:
    conv = wan.WanCausalConv3d(4, 8, 3, padding=1)
    assert str(accelerate(conv)).splitlines()[0].startswith("(model)")
    assert calls(conv, video()) == 1
    assert str(accelerate(walt_kernels.nn.CausalConv3d(4, 8, 3))) == "0 replaced, 0 left"


def test_another_release_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        return x + 1

    monkeypatch.setattr(wan.WanCausalConv3d, "forward", forward)
    net = model()
    report = accelerate(net)
    assert not report.replaced
    assert "of a release that was not checked" in report.left[0].what
    assert type(net[0]) is wan.WanCausalConv3d


def test_a_source_that_cannot_be_read_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    exec("def forward(self, x, cache_x=None): return x", names)
    monkeypatch.setattr(wan.WanCausalConv3d, "forward", names["forward"])
    assert "cannot be read" in accelerate(model()).left[0].what


def test_a_forward_of_its_own_is_left_and_stops_restore() -> None:
    net = model()
    net[0].forward = net[0].forward  # as libraries do that offload
    report = accelerate(net)
    assert [row.name for row in report.left] == ["0"]
    assert "replaced by another library" in report.left[0].what
    net[2].forward = net[2].forward
    with pytest.raises(ValueError, match="'2' was wrapped by another library"):
        restore(net)
    del net[2].forward
    restore(net)
    assert type(net[2]) is wan.WanCausalConv3d


def test_what_is_no_module_is_refused() -> None:
    for function in (accelerate, restore):
        with pytest.raises(TypeError, match=r"model is a dict, expected an nn\.Module"):
            function({})  # type: ignore[arg-type]


def test_fingerprints_see_code_not_comments() -> None:
    code = "def f(x):\n    {}return '#1'{}\n"
    assert fingerprint_of(code.format("", "")) == fingerprint_of(code.format("# why\n\n    ", "  # why '#2'"))
    assert fingerprint_of(code.format("", "")) != fingerprint_of(code.format("", "").replace("#1", "#2"))


def fingerprint_of(source: str) -> str | None:
    name = f"<{source}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names: dict[str, Any] = {}
    exec(compile(source, name, "exec"), names)
    return fingerprint(names["f"])
