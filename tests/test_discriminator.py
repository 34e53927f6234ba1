"""The discriminator: its blur against SciPy, sizes, independence of samples, gradients of two orders."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from small_tokenizer import draw
from small_tokenizer import one_thread as one_thread
from torch import Tensor

from walt.train.discriminator import Discriminator, DownBlock, blur_pool


def small(dtype: torch.dtype = torch.float32) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(4, (2, 3)).to(dtype)


@pytest.mark.parametrize("shape", [(4, 6, 8), (5, 7, 3), (2, 2, 3), (17, 4, 4)])
def test_blur_is_the_outer_product(shape: tuple[int, int, int]) -> None:
    ndimage = pytest.importorskip("scipy.ndimage", reason="SciPy is the oracle and is not installed")
    x = draw(2, 3, *shape, dtype=torch.float64)
    taps = np.array([1, 3, 3, 1]) / 8
    kernel = taps[:, None, None] * taps[None, :, None] * taps[None, None, :]
    expected = np.stack(
        [
            # SciPy centres four taps on the third; ours reach from one place before to two after.
            ndimage.correlate(volume, kernel, mode="nearest", origin=-1)[::2, ::2, ::2]
            for volume in x.flatten(0, 1).numpy()
        ]
    )
    y = blur_pool(x)
    assert y.shape[2:] == tuple(-(-n // 2) for n in shape)
    np.testing.assert_allclose(y.flatten(0, 1).numpy(), expected, rtol=0, atol=1e-12)


def test_blur_leaves_axes_of_length_one_alone() -> None:
    x = draw(1, 2, 1, 6, 1, dtype=torch.float64)
    y = blur_pool(x)
    assert y.shape == (1, 2, 1, 3, 1)
    column = torch.cat([x[..., :1, :], x, x[..., -1:, :]], dim=3).flatten(2)
    expected = (column[..., :-3] + 3 * column[..., 1:-2] + 3 * column[..., 2:-1] + column[..., 3:])[..., ::2] / 8
    torch.testing.assert_close(y.flatten(2), expected)
    pixel = draw(2, 3, 1, 1, 1)
    assert torch.equal(blur_pool(pixel), pixel)


@pytest.mark.parametrize("shape", [(1, 8, 8), (5, 6, 7), (2, 3, 3)])
def test_a_constant_stays_constant(shape: tuple[int, int, int]) -> None:
    y = blur_pool(torch.full((1, 2, *shape), 0.7, dtype=torch.float64))
    torch.testing.assert_close(y, torch.full_like(y, 0.7))


def test_the_blur_takes_out_the_highest_frequency() -> None:
    stripes = torch.tensor([1.0, -1.0]).repeat(8).expand(1, 1, 1, 4, 16)
    inside = blur_pool(stripes)[..., 1:-1]
    assert inside.abs().max() < 1e-6
    assert stripes[..., ::2].abs().min() == 1  # what sub-sampling alone would keep


@pytest.mark.parametrize(
    "shape", [(1, 3, 1, 16, 16), (2, 3, 17, 32, 32), (3, 3, 5, 8, 24), (2, 3, 1, 1, 1), (1, 3, 2, 3, 5)]
)
def test_images_and_videos_of_any_size(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    logits = Discriminator(2)(draw(*shape))
    assert logits.shape == shape[:1]
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


def test_widths_are_those_of_magvit() -> None:
    with torch.device("meta"):
        discriminator = Discriminator()
    blocks = [block for block in discriminator.blocks if isinstance(block, DownBlock)]
    widths = [blocks[0].conv1.in_channels, *(block.conv2.out_channels for block in blocks)]
    assert widths == [128, 256, 512, 512, 512, 512]
    for block, (before, after) in zip(blocks, pairwise(widths), strict=True):
        assert block.shortcut.weight.shape[:2] == (after, before)


def test_samples_do_not_meet() -> None:
    discriminator = small(torch.float64)
    video = draw(3, 3, 5, 8, 8, dtype=torch.float64)
    alone = torch.cat([discriminator(sample[None]) for sample in video])
    torch.testing.assert_close(discriminator(video), alone, rtol=0, atol=1e-12)


def test_activations_keep_their_scale() -> None:
    """A new discriminator neither saturates nor goes deaf, however deep."""
    torch.manual_seed(0)
    discriminator = Discriminator(8)
    spread = []
    for block in discriminator.blocks:
        block.register_forward_hook(lambda module, inputs, output: spread.append(output.std().item()))
    discriminator(draw(2, 3, 9, 32, 32))
    assert len(spread) == 5
    assert all(0.05 < value < 2 for value in spread)


def test_every_frame_and_pixel_counts() -> None:
    video = draw(1, 3, 5, 8, 8, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(small(torch.float64)(video).sum(), video)
    assert (gradient.abs().amax(1) > 0).all()


@pytest.mark.parametrize("shape", [(1, 3, 3, 4, 2), (2, 3, 1, 4, 4)])
def test_gradients_of_two_orders(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(1, (2,)).double()
    video = draw(*shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(discriminator, (video,))
    weight = discriminator.first.weight

    def gradient(video: Tensor, weight: Tensor) -> Tensor:
        logits = torch.func.functional_call(discriminator, {"first.weight": weight}, (video,))
        return torch.autograd.grad(logits.sum(), video, create_graph=True)[0]

    assert torch.autograd.gradcheck(gradient, (video, weight))


def test_autocast_changes_nothing_on_a_cpu() -> None:
    """PyTorch's bfloat16 gradients of these weights hold what memory held: often nothing, sometimes infinity."""
    for seed in range(6):
        torch.manual_seed(seed)
        discriminator, video = Discriminator(8), draw(4, 3, 5, 64, 64)
        gradients = []
        for enabled in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                logits = discriminator(video.bfloat16() if enabled else video.bfloat16().float())
            assert logits.dtype == torch.float32
            gradients.append(torch.autograd.grad(logits.mean(), [*discriminator.parameters()]))
        for half, full in zip(*gradients, strict=True):
            torch.testing.assert_close(half, full)


def test_bad_arguments() -> None:
    for shape in ((3, 5, 8, 8), (1, 4, 5, 8, 8)):
        with pytest.raises(ValueError, match=r"video: got torch.float32 .*; expected floating point \[B, 3, T, H, W\]"):
            small()(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"video: got torch.uint8"):
        small()(torch.zeros(1, 3, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"channels: got \[0\]; expected integers of at least 1"):
        Discriminator(0)
    with pytest.raises(ValueError, match=r"multipliers: got \(\)"):
        Discriminator(4, ())


def test_a_block_halves_the_sum_of_two_variances() -> None:
    """(shortcut + convolutions) / sqrt 2: with the convolutions switched off, the shortcut of the blurred input."""
    block, x = DownBlock(2, 3).double(), draw(1, 2, 1, 4, 4, dtype=torch.float64)
    for parameter in block.conv2.parameters():
        torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(block(x) * 2**0.5, block.shortcut(blur_pool(x)))
