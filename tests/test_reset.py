"""Modules that were made under torch.device("meta"): after to_empty and reset_parameters they are as if made anew.

Uninitialised memory is NaN while tests run (conftest.py), so what a reset leaves out shows.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import small_tokenizer
import torch
from torch import nn
from transformer_cases import EVERYTHING, FEATURES, SMALL

import walt
import walt_kernels
from walt.evaluate.i3d import I3D
from walt.model.config import TokenizerConfig, TransformerConfig
from walt.model.diffusion import Diffusion, noise_schedule
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.sample.replay import Replayed
from walt.train.discriminator import Discriminator
from walt.train.losses import LeCam
from walt.train.objective import LossModule
from walt.train.perceptual import EfficientNetFeatures, PerceptualLoss
from walt_kernels.nn import AdaLNLoRA, CausalConv3d, WindowAttention, reset_children


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._depthwise_conv = nn.Conv2d(4, 4, 3, stride=2)


def efficientnet() -> SimpleNamespace:
    """The parts of an EfficientNet that are looked at."""
    stem, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    return SimpleNamespace(_conv_stem=stem, _bn0=norm, _swish=nn.SiLU(), _blocks=nn.ModuleList([Block()]))


# Together they hold every module class of both packages; a test says so.
EXAMPLES: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: CausalConv3d(4, 6, 3, groups=2),
    "attention": lambda: WindowAttention(32, 2, (2, 3, 4), context_width=8),
    "plain attention": lambda: WindowAttention(32, 2, (2, 3, 4), qk_norm=False, bias_table=False),
    "adaln": lambda: AdaLNLoRA(16, layers=3, rank=2),
    "transformer": lambda: Transformer(SMALL),
    "transformer with features": lambda: Transformer(FEATURES),
    "transformer with everything": lambda: Transformer(EVERYTHING),
    "transformer with separate modulations": lambda: Transformer(TransformerConfig(**FIELDS, adaln="separate")),
    "tokenizer": lambda: Tokenizer(small_tokenizer.SMALL),
    "image tokenizer": lambda: Tokenizer(TokenizerConfig(channels=8, blocks=1, groups=4, kind="image")),
    "discriminator": lambda: Discriminator(4, (2, 2)),
    "lecam": LeCam,
    "perceptual": lambda: PerceptualLoss(EfficientNetFeatures(efficientnet())),
    "i3d": I3D,
    "replayed": lambda: Replayed(Transformer(SMALL)),
    "wrapped": lambda: LossModule(LeCam(), lambda network, batch: None, "float32"),
}
FIELDS = {"layers": 2, "width": 32, "heads": 2, "latent_channels": 4, "latent_size": (3, 4, 4), "time_features": 16}


def module_classes() -> Iterator[type[nn.Module]]:
    for package in (walt, walt_kernels):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if info.name.endswith("__main__") or ".triton_" in info.name:
                continue
            for _, found in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
                if issubclass(found, nn.Module) and found.__module__ == info.name:
                    yield found


def test_there_is_an_example_of_every_module() -> None:
    with torch.device("meta"):
        held = {type(module) for make in EXAMPLES.values() for module in make().modules()}
    found = set(module_classes())
    assert len(found) > 20
    assert not {f"{kind.__module__}.{kind.__qualname__}" for kind in found - held}


def emptied(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        module = make()
    assert all(tensor.is_meta for tensor in module.state_dict().values())
    return module.to_empty(device="cpu")


def reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
    else:
        reset_children(module)


def check_equal(actual: nn.Module, expected: nn.Module) -> None:
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize("name", sorted({*EXAMPLES} - {"i3d"}))  # whose weights are always read, in whatever order
def test_a_reset_gives_the_bits_of_the_constructor(name: str) -> None:
    module = emptied(EXAMPLES[name])
    torch.manual_seed(7)
    reset(module)
    torch.manual_seed(7)
    check_equal(module, EXAMPLES[name]())


@pytest.mark.parametrize("name", EXAMPLES)
def test_so_does_a_reset_of_every_module_from_within(name: str) -> None:
    """As `Module.apply` and torch's own modules have it: each for its own parameters, the innermost first."""
    module = emptied(EXAMPLES[name])
    used = EXAMPLES[name]()
    for tensor in used.state_dict().values():
        tensor.fill_(3)
    for each in (module, used):
        torch.manual_seed(7)
        each.apply(lambda part: part.reset_parameters() if hasattr(part, "reset_parameters") else None)
    check_equal(module, used)


@pytest.mark.parametrize("kind", sorted(set(module_classes()), key=lambda kind: kind.__name__))
def test_a_part_alone(kind: type[nn.Module]) -> None:
    """Any module of a larger one, reset by itself, is finite and does not depend on what it held."""
    for make in EXAMPLES.values():
        for part, used in zip(emptied(make).modules(), make().modules(), strict=True):
            if type(part) is not kind:
                continue
            own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
            assert not own or hasattr(part, "reset_parameters")
            for each in (part, used):
                torch.manual_seed(7)
                reset(each)
            check_equal(part, used)
            assert all(tensor.isfinite().all() for tensor in part.state_dict().values())


@pytest.mark.parametrize("name", ["tokenizer", "discriminator", "attention", "adaln"])
def test_the_order_of_modules_does_not_matter(name: str) -> None:
    """Outermost first, as `for module in model.modules()` has it: other random numbers, but no other distributions."""
    module, expected = emptied(EXAMPLES[name]), EXAMPLES[name]().state_dict()
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    for key, tensor in module.state_dict().items():
        assert tensor.isfinite().all(), key
        if tensor.numel() > 1 and expected[key].unique().numel() == 1:
            assert torch.equal(tensor, expected[key]), key
        elif tensor.numel() > 500:
            assert tensor.mean().abs() < 0.2 * expected[key].std(), key
            assert 0.7 < tensor.std() / expected[key].std() < 1.4, key


def test_a_schedule_is_not_on_the_device_of_the_models() -> None:
    with torch.device("meta"):
        diffusion = Diffusion()
    assert torch.equal(diffusion.alpha_bar, noise_schedule(diffusion.config))
    x = torch.ones(1, 2)
    assert diffusion.add_noise(x, x, torch.tensor([5])).isfinite().all()
