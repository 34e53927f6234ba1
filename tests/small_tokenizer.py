"""A tokenizer small enough for tests, and what several of them do with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from walt.model.config import TokenizerConfig
from walt.model.tokenizer import Tokenizer
from walt_kernels import explain

SMALL = TokenizerConfig(channels=8, multipliers=(1, 2, 2, 3), blocks=1, middle_blocks=1, latent_channels=4, groups=4)

PIXEL = torch.zeros(1, 1, 1, 1, 1)
NO_NATIVE = explain("causal_conv3d", PIXEL, PIXEL).get("cpu", "not built")
# PyTorch's own convolutions choose algorithm and layout by the sizes; the native one promises not to.
native = pytest.mark.skipif(NO_NATIVE is not None, reason=f"native causal_conv3d: {NO_NATIVE}")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(config: TokenizerConfig = SMALL, dtype: torch.dtype = torch.float32) -> Tokenizer:
    """A tokenizer whose every parameter and statistic is away from its initial value."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    channels = torch.arange(config.latent_channels, dtype=dtype)
    tokenizer.set_latent_statistics(0.1 * channels - 0.1, 0.5 + 0.25 * channels)
    return tokenizer.requires_grad_(False)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that PyTorch held at a time of what it allocated during `work`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on two threads, much slower where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
