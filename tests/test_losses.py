"""The losses of the first stage, and a few steps with all of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_tokenizer import SMALL, draw, make
from small_tokenizer import one_thread as one_thread
from torch import Tensor, nn

from walt.model.tokenizer import Tokenizer
from walt.settings import TokenizerLossConfig
from walt.train.discriminator import Discriminator
from walt.train.losses import (
    AdversarialTerm,
    DecorrelationTerm,
    DiscriminatorLoss,
    LeCam,
    PerceptualTerm,
    Reconstruction,
    ReconstructionTerm,
    TokenizerLoss,
    discriminator_loss,
    generator_loss,
    r1_penalty,
)
from walt.train.perceptual import PerceptualLoss


class Mean(nn.Module):
    """logit = weight * sum of the video + the sum of its squares / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, video: Tensor) -> Tensor:
        return self.weight * video.flatten(1).sum(1) + video.flatten(1).square().sum(1) / 2


class Colours(nn.Module):
    """One map of the frames themselves."""

    def forward(self, frames: Tensor) -> list[Tensor]:
        return [frames]


def terms(absolute: float = 0.1, perceptual: PerceptualLoss | None = None, discriminator: nn.Module | None = None):
    wanted = [ReconstructionTerm(absolute), DecorrelationTerm()]
    wanted += [] if perceptual is None else [PerceptualTerm(perceptual)]
    return wanted + ([] if discriminator is None else [AdversarialTerm(discriminator)])


class Given(nn.Module):
    """A tokenizer of one latent and one output."""

    def __init__(self, latent: Tensor, output: Tensor) -> None:
        super().__init__()
        self.latent, self.output = latent, output

    def encode(self, _video: Tensor) -> Tensor:
        return self.latent

    def decode(self, _latent: Tensor) -> Tensor:
        return self.output


# Terms


def made(output: Tensor, video: Tensor, latent: Tensor | None = None) -> Reconstruction:
    return Reconstruction(video, torch.zeros(1) if latent is None else latent, output)


def test_decorrelation() -> None:
    def term(latent: Tensor) -> float:
        return DecorrelationTerm()(made(latent, latent, latent)).item()

    one, other = torch.randn(2, 3, 1, 4, 4, 4)
    apart = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]]).view(1, 2, 1, 1, 4)
    assert term(apart) == pytest.approx(0, abs=1e-6)
    assert term(torch.cat([one, -3 * one + 5], 1)) == pytest.approx(1, abs=1e-3)
    correlation = torch.corrcoef(torch.cat([one, other], 1).transpose(0, 1).flatten(1))[0, 1].item()
    assert term(torch.cat([one, other], 1)) == pytest.approx(correlation**2, abs=1e-3)


def test_reconstruction() -> None:
    target = torch.zeros(1, 3, 1, 2, 2)
    assert ReconstructionTerm(0.2)(made(target + 0.5, target)).item() == pytest.approx(0.25 + 0.2 * 0.5)
    with pytest.raises(ValueError, match=r"output has shape \[1, 3, 1, 2, 2\], expected that of video, \[1\]"):
        ReconstructionTerm()(made(target, torch.zeros(1)))


def test_the_adversarial_losses_are_cross_entropies() -> None:
    real, fake = draw(6, dtype=torch.float64), draw(6, seed=1, dtype=torch.float64)
    entropy = nn.functional.binary_cross_entropy_with_logits
    ones, zeros = torch.ones(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    torch.testing.assert_close(generator_loss(fake), entropy(fake, ones))
    torch.testing.assert_close(discriminator_loss(real, fake), entropy(real, ones) + entropy(fake, zeros))


def test_the_generator_learns_most_where_it_is_found_out() -> None:
    """Non-saturating: the gradient is -1 for fakes that are surely known, 0 for those that pass."""
    logits = torch.tensor([-20.0, 0.0, 20.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(3 * generator_loss(logits), logits)
    torch.testing.assert_close(gradient, torch.tensor([-1.0, -0.5, 0.0]), rtol=0, atol=1e-6)


def test_r1_is_half_the_squared_gradient() -> None:
    """The gradient of Mean is weight + video, so R1 and its slope along the weight are known."""
    critic, video = Mean(), draw(3, 3, 2, 4, 4, dtype=torch.float64)
    penalty = r1_penalty(critic, video)
    expected = (0.5 + video).square().sum() / 3 / 2
    torch.testing.assert_close(penalty, expected)
    (slope,) = torch.autograd.grad(penalty, critic.weight)
    torch.testing.assert_close(slope, (0.5 + video).sum() / 3)
    assert not video.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(r1_penalty(critic, video), expected)


def test_r1_is_exact_under_autocast() -> None:
    torch.manual_seed(0)
    critic, video = Discriminator(2, (2,)), draw(1, 3, 1, 4, 4)
    (gradient,) = torch.autograd.grad(critic(video.requires_grad_()).sum(), video)
    with torch.autocast("cpu", torch.bfloat16):
        penalty = r1_penalty(critic, video)
    torch.testing.assert_close(penalty, gradient.square().sum() / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("frames", [1, 3])
def test_r1_reaches_the_discriminator(frames: int) -> None:
    torch.manual_seed(0)
    critic = Discriminator(2, (2, 2)).double()
    video = draw(2, 3, frames, 4, 6, dtype=torch.float64)
    r1_penalty(critic, video).backward()
    weight, step = critic.blocks[0].conv1.weight, 1e-6
    direction = draw(*weight.shape, seed=1, dtype=torch.float64)
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        ends.append(r1_penalty(critic, video).item())
        with torch.no_grad():
            weight -= sign * step * direction
    assert (weight.grad * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4)


def test_lecam() -> None:
    lecam = LeCam(decay=0.9)
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.5])
    assert lecam(real, fake).item() == pytest.approx((1 + 9) / 2 + (1 + 0) / 2)
    lecam.update(real.mean(), fake.mean())
    assert lecam.anchor_real.item() == pytest.approx(0.2)
    assert lecam.anchor_fake.item() == pytest.approx(-0.025)
    expected = ((1 + 0.025) ** 2 + (3 + 0.025) ** 2) / 2 + ((0.2 + 1) ** 2 + 0) / 2
    assert lecam(real, fake).item() == pytest.approx(expected)
    other = LeCam(decay=0.9)
    other.load_state_dict(lecam.state_dict())
    assert other(real, fake).item() == pytest.approx(expected)


def test_lecam_anchors_come_to_the_means() -> None:
    lecam = LeCam()
    for _ in range(5000):
        lecam.update(2.0, -4.0)
    assert lecam.anchor_real.item() == pytest.approx(2 * (1 - 0.999**5000), rel=1e-3)
    assert lecam.anchor_fake.item() == pytest.approx(-4 * (1 - 0.999**5000), rel=1e-3)


# Sums of them


@pytest.mark.parametrize("frames", [1, 5])
def test_the_tokenizers_loss_is_the_weighted_sum(frames: int) -> None:
    tokenizer = make(dtype=torch.float64).requires_grad_(True)
    video = draw(2, 3, frames, 16, 16, dtype=torch.float64)
    critic = Mean()
    config = TokenizerLossConfig(2.0, 0.3, 0.7, 1, 0.01, 0.05)
    batch = {"video": video}
    loss, logs = TokenizerLoss(config, terms(0.3, PerceptualLoss(Colours()), critic))(tokenizer, batch)
    latent = tokenizer.encode(video)
    output = tokenizer.decode(latent)
    torch.testing.assert_close(batch["reconstruction"], output.detach())
    expected = {
        "reconstruction": ReconstructionTerm(0.3)(made(output, video)),
        "decorrelation": DecorrelationTerm()(made(output, video, latent)),
        "perceptual": PerceptualLoss(Colours())(output, video),
        "adversarial": generator_loss(critic(output)),
    }
    assert set(logs) == set(expected)
    for name, term in expected.items():
        torch.testing.assert_close(logs[name], term.detach())
    weights = {"reconstruction": 2.0, "perceptual": 0.7, "adversarial": 0.01, "decorrelation": 0.05}
    torch.testing.assert_close(loss, sum(weights[name] * expected[name] for name in expected))
    assert not any(value.requires_grad or value.ndim for value in logs.values())


@pytest.mark.parametrize("step", [2, 3, 4])
def test_terms_count_from_their_start(step: int) -> None:
    tokenizer = make(dtype=torch.float64).requires_grad_(True)
    config = TokenizerLossConfig(2.0, 0.3, 0.7, 1, 0.01, 0.05, perceptual_start=3, adversarial_start=4)
    critic, batch = Mean(), {"video": draw(2, 3, 5, 16, 16, dtype=torch.float64), "step": step, "penalise": True}
    loss, logs = TokenizerLoss(config, terms(0.3, PerceptualLoss(Colours()), critic))(tokenizer, batch)
    weights = {"reconstruction": 2.0, "decorrelation": 0.05}
    weights |= {"perceptual": 0.7} if step >= 3 else {}
    weights |= {"adversarial": 0.01} if step >= 4 else {}
    assert logs.keys() == weights.keys()
    torch.testing.assert_close(loss.detach(), sum(weights[name] * logs[name] for name in weights))

    lecam = LeCam()
    judge = DiscriminatorLoss(config, lecam)
    loss, values = judge(critic, batch)
    loss.backward()
    judge.after_step({name: float(value) for name, value in values.items()})
    assert bool(values) == bool(loss) == bool(critic.weight.grad) == bool(lecam.anchor_real) == (step >= 4)


def test_terms_can_be_left_out() -> None:
    video = draw(1, 3, 1, 8, 8)
    network = Given(draw(1, 4, 1, 2, 2), video + 0.1)
    _, logs = TokenizerLoss(TokenizerLossConfig(), terms())(network, {"video": video})
    assert set(logs) == {"reconstruction", "decorrelation"}


def test_the_tokenizers_loss_teaches_the_tokenizer_alone() -> None:
    torch.manual_seed(0)
    tokenizer, critic = make().requires_grad_(True), Discriminator(2, (2,))
    critic.logit.bias.requires_grad_(False)
    loss, _ = TokenizerLoss(TokenizerLossConfig(), terms(discriminator=critic))(
        tokenizer, {"video": draw(1, 3, 5, 16, 16)}
    )
    loss.backward()
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())
    assert all(parameter.grad is None for parameter in critic.parameters())
    trained = {name for name, parameter in critic.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in critic.named_parameters()} - {"logit.bias"}  # as it was before


def test_the_perceptual_loss_sees_the_frames_that_are_named() -> None:
    video, frames = draw(2, 3, 9, 8, 8), torch.tensor([[0, 4], [8, 2]])
    batch = {"video": video, "perceptual_frames": torch.tensor([[0.0, 0.5], [0.99, 0.25]])}
    output, perceptual = video + 0.1 * draw(2, 3, 9, 8, 8, seed=9), PerceptualLoss(Colours())
    loss = TokenizerLoss(TokenizerLossConfig(), terms(perceptual=perceptual))
    _, logs = loss(Given(draw(1, 4, 1, 2, 2), output), batch)
    assert logs["perceptual"] == perceptual(output, video, frames=frames) != perceptual(output, video)


@pytest.mark.parametrize("penalise", [False, True])
def test_the_discriminators_loss_is_the_weighted_sum(penalise: bool) -> None:
    critic, lecam = Mean(), LeCam(0.9).double()
    lecam.update(0.3, -0.2)
    real, fake = (0.1 * draw(2, 3, 2, 4, 4, seed=seed, dtype=torch.float64) for seed in (0, 1))
    fake.requires_grad_()
    config = TokenizerLossConfig(r1=3.0, r1_every=5, lecam=0.25)
    judge = DiscriminatorLoss(config, lecam)
    loss, logs = judge(critic, {"video": real, "reconstruction": fake, "penalise": penalise})
    real_logits, fake_logits = critic(real), critic(fake)
    expected = discriminator_loss(real_logits, fake_logits) + 0.25 * lecam(real_logits, fake_logits)
    if penalise:
        expected = expected + 15 * r1_penalty(critic, real)
    torch.testing.assert_close(loss, expected)
    assert set(logs) == {"real_logit", "fake_logit", "lecam"} | ({"r1"} if penalise else set())
    assert not any(value.requires_grad or value.ndim for value in logs.values())
    assert lecam.anchor_real.item() == pytest.approx(0.1 * 0.3)  # as it was, until the step is taken
    loss.backward()
    assert critic.weight.grad is not None
    assert fake.grad is None
    judge.after_step({"real_logit": 2.0, "fake_logit": -1.0})
    assert lecam.anchor_real.item() == pytest.approx(0.9 * 0.1 * 0.3 + 0.1 * 2.0)
    assert lecam.anchor_fake.item() == pytest.approx(0.9 * 0.1 * -0.2 - 0.1 * 1.0)


def test_half_precision_is_summed_in_full() -> None:
    torch.manual_seed(0)
    tokenizer, critic, video = make().requires_grad_(True), Discriminator(2, (2,)), draw(1, 3, 5, 16, 16)
    config = TokenizerLossConfig()
    generate = TokenizerLoss(config, terms(perceptual=PerceptualLoss(Colours()), discriminator=critic))
    batch = {"video": video, "penalise": True}
    with torch.autocast("cpu", torch.bfloat16):
        loss, logs = generate(tokenizer, batch)
        critic_loss, critic_logs = DiscriminatorLoss(config, LeCam())(critic, batch)
    assert batch["reconstruction"].dtype == torch.float32
    assert {value.dtype for value in (*logs.values(), *critic_logs.values())} == {torch.float32}
    (loss + critic_loss).backward()
    expected, _ = generate(tokenizer, batch)
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)


# Training


@pytest.mark.parametrize("frames", [1, 5])
def test_a_few_steps_of_both(frames: int) -> None:
    """The reconstruction falls while the discriminator learns to tell fixed reals from fixed fakes."""
    torch.manual_seed(0)
    config = TokenizerLossConfig(r1=0.1, r1_every=4)
    small = replace(SMALL, multipliers=(1, 1, 1, 1), middle_blocks=0)
    tokenizer, critic, lecam = Tokenizer(small), Discriminator(4, (2, 2)), LeCam()
    adam = {"lr": 3e-3, "betas": (0.0, 0.99)}
    tokenizer_optimizer = torch.optim.Adam(tokenizer.parameters(), **adam)
    critic_optimizer = torch.optim.Adam(critic.parameters(), **adam)
    column = torch.linspace(-1, 1, 16)
    bars = torch.stack([torch.sin(4 * column + 0.5 * t) for t in range(frames)])
    video = (0.8 * bars[None, None, :, None, :]).expand(4, 3, -1, 16, -1).contiguous()
    video = video * torch.tensor([1.0, -1.0, 0.6, -0.6])[:, None, None, None, None]
    fake = 0.5 * draw(4, 3, frames, 16, 16)
    generate, judge = TokenizerLoss(config, terms(discriminator=critic)), DiscriminatorLoss(config, lecam)
    history = []
    for step in range(30):
        loss, logs = generate(tokenizer, {"video": video})
        tokenizer_optimizer.zero_grad()
        loss.backward()
        tokenizer_optimizer.step()
        batch = {"video": video, "reconstruction": fake, "penalise": step % config.r1_every == 0}
        loss, critic_logs = judge(critic, batch)
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()
        judge.after_step({name: value.item() for name, value in critic_logs.items()})
        history.append({**logs, **critic_logs})
        assert all(math.isfinite(value) for value in history[-1].values())
    assert history[-1]["reconstruction"] < 0.5 * history[0]["reconstruction"]
    margins = [row["real_logit"] - row["fake_logit"] for row in history]
    assert margins[-1] > max(margins[0] + 1, 1)
    with torch.no_grad():
        assert critic(video).min() > critic(fake).max()
