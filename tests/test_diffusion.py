"""Schedule, v-prediction and DDIM against diffusers, closed forms and perfect denoisers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from walt.model.config import DiffusionConfig, TransformerConfig
from walt.model.diffusion import Diffusion, noise_schedule
from walt.model.randoms import keyed_generator, sample_noise
from walt.model.transformer import Transformer

SHAPE = (2, 4, 3, 6, 5)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Recorder(nn.Module):
    """A denoiser that keeps what it was called with and answers with `predict(z_t, time)`."""

    def __init__(self, predict, **fields) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.predict, self.calls = predict, []
        self.config = TransformerConfig(**fields)

    def forward(self, z_t, time, **given):
        self.calls.append({"z_t": z_t, "time": time, **given, "grad": torch.is_grad_enabled()})
        return self.scale * self.predict(z_t, time)


def knows(diffusion: Diffusion, x0: Tensor):
    """The velocity that leads to x0, from wherever x_t is: (sqrt(alpha_bar) x_t - x0) / sqrt(1 - alpha_bar)."""

    def predict(x_t: Tensor, time: Tensor) -> Tensor:
        alpha_bar = diffusion.alpha_bar[time].reshape(-1, 1, 1, 1, 1)
        return (alpha_bar.sqrt() * x_t - x0) / (1 - alpha_bar).sqrt()

    return predict


def test_schedule_starts_where_it_did_and_ends_in_noise() -> None:
    alpha_bar = noise_schedule(DiffusionConfig())
    plain = noise_schedule(DiffusionConfig(zero_terminal_snr=False))
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(plain, torch.cumprod(1 - betas, 0), rtol=1e-15, atol=0)
    assert alpha_bar.dtype == torch.float64
    assert alpha_bar[-1] == 0
    assert plain[-1] > 1e-5
    torch.testing.assert_close(alpha_bar[0], plain[0], rtol=1e-15, atol=0)
    assert (alpha_bar.diff() < 0).all()


@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_ddim_agrees_with_diffusers(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle and is not installed")
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    diffusion = Diffusion()
    # The scheduler keeps its tables in float32: near enough for a look, not for 1e-6 over 50 steps.
    torch.testing.assert_close(diffusion.alpha_bar, scheduler.alphas_cumprod.double(), rtol=0, atol=1e-5)
    betas = scheduling.rescale_zero_terminal_snr(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(diffusion.alpha_bar, scheduler.alphas_cumprod, rtol=0, atol=1e-12)

    scheduler.set_timesteps(steps)
    times = diffusion.timesteps(steps)
    assert times == scheduler.timesteps.tolist()
    theirs = ours = draw(*SHAPE)
    weight = draw(4, 4, seed=1) / 2
    for i, time in enumerate(times):
        v = torch.einsum("bcthw,cd->bdthw", theirs, weight).sin()
        result = scheduler.step(v, time, theirs)
        following = times[i + 1] if i + 1 < steps else None
        ours, x0 = diffusion.ddim_step(ours, torch.einsum("bcthw,cd->bdthw", ours, weight).sin(), time, following)
        theirs = result.prev_sample
        torch.testing.assert_close(x0, result.pred_original_sample, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [3, 7, 30, 999])
def test_trailing_spacing_agrees_with_diffusers(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle and is not installed")
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert Diffusion().timesteps(steps) == scheduler.timesteps.tolist()


def test_velocity_agrees_with_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle and is not installed")
    scheduler = diffusers.DDIMScheduler()
    diffusion = Diffusion()
    scheduler.alphas_cumprod = diffusion.alpha_bar
    x0, noise, time = draw(*SHAPE), draw(*SHAPE, seed=1), torch.tensor([17, 999])
    theirs = scheduler.get_velocity(x0, noise, time)
    torch.testing.assert_close(diffusion.velocity(x0, noise, time), theirs, rtol=0, atol=1e-12)
    theirs = scheduler.add_noise(x0, noise, time)
    torch.testing.assert_close(diffusion.add_noise(x0, noise, time), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", [0, 1, 500, 998, 999])
def test_x0_and_noise_come_back_at_every_step(step: int) -> None:
    diffusion = Diffusion()
    x0, noise, time = draw(*SHAPE), draw(*SHAPE, seed=1), torch.full((2,), step)
    x_t, v = diffusion.add_noise(x0, noise, time), diffusion.velocity(x0, noise, time)
    torch.testing.assert_close(diffusion.x0_from_velocity(x_t, v, time), x0, rtol=0, atol=1e-14)
    torch.testing.assert_close(diffusion.noise_from_velocity(x_t, v, time), noise, rtol=0, atol=1e-14)


def test_at_the_last_step_the_input_is_noise_and_the_target_is_minus_x0() -> None:
    diffusion = Diffusion()
    x0, noise, time = draw(*SHAPE), draw(*SHAPE, seed=1), torch.full((2,), 999)
    assert torch.equal(diffusion.add_noise(x0, noise, time), noise)
    assert torch.equal(diffusion.velocity(x0, noise, time), -x0)


def test_a_perfect_model_has_no_loss_and_samples_its_target() -> None:
    diffusion = Diffusion()
    x0 = draw(*SHAPE)
    model = Recorder(knows(diffusion, x0))
    assert diffusion.loss(model, x0, generator=torch.Generator().manual_seed(0)) < 1e-20
    for steps in (1, 3, 50):
        sample = diffusion.sample(model, draw(*SHAPE, seed=1), steps=steps)
        torch.testing.assert_close(sample, x0, rtol=0, atol=1e-10)


def test_the_best_model_of_a_gaussian_samples_that_gaussian() -> None:
    """For x0 ~ N(mean, std^2) the mean of v given x_t is known; DDIM must carry N(0, 1) over to N(mean, std^2)."""
    diffusion, mean, std = Diffusion(), 1.5, 0.3

    def predict(x_t: Tensor, time: Tensor) -> Tensor:
        alpha_bar = diffusion.alpha_bar[time].reshape(-1, 1, 1, 1, 1)
        variance = alpha_bar * std**2 + 1 - alpha_bar
        x0 = mean + alpha_bar.sqrt() * std**2 / variance * (x_t - alpha_bar.sqrt() * mean)
        return (alpha_bar.sqrt() * x_t - x0) / (1 - alpha_bar).sqrt()

    sample = diffusion.sample(Recorder(predict), draw(1, 8, 5, 32, 32), steps=50)
    # 40960 draws: the sampling error of mean and deviation is 0.3 / sqrt(40960) = 0.0015.
    assert abs(sample.mean().item() - mean) < 0.01
    assert abs(sample.std().item() - std) < 0.03


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_self_conditioning_in_the_loss(probability: float) -> None:
    diffusion = Diffusion(DiffusionConfig(self_condition_probability=probability, drop_probability=0))
    model = Recorder(lambda z_t, time: z_t.sin(), classes=16)
    x0 = draw(16, 4, 1, 2, 2)
    label, image = torch.arange(16), torch.zeros(16, dtype=torch.bool)
    loss = diffusion.loss(model, x0, generator=torch.Generator().manual_seed(0), label=label, image=image)
    loss.backward()
    assert model.scale.grad is not None
    trained = model.calls[-1]
    assert trained["grad"]
    assert torch.equal(trained["label"], label)
    assert torch.equal(trained["image"], image)
    if probability == 0:
        assert len(model.calls) == 1
        assert "self_condition" not in trained
        return
    first, second = model.calls
    assert not first["grad"]
    assert "self_condition" not in first
    assert torch.equal(first["z_t"], second["z_t"])
    estimate = second["self_condition"]
    assert not estimate.requires_grad
    expected = diffusion.x0_from_velocity(first["z_t"], first["z_t"].sin(), first["time"])
    given = estimate.flatten(1).any(1)
    assert torch.equal(estimate[given], expected[given])
    assert not estimate[~given].any()
    assert bool(given.all()) == (probability == 1)
    assert bool(given.any())


def test_the_pass_without_gradient_takes_none_from_the_other_under_autocast() -> None:
    """Autocast keeps narrow copies of weights: those of the pass without gradient serve the trained one with theirs."""
    config = TransformerConfig(
        layers=2, width=16, heads=2, latent_channels=4, latent_size=(3, 6, 5), classes=2, spatial_window=(1, 6, 5)
    )
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    diffusion = Diffusion(DiffusionConfig(self_condition_probability=1.0))
    weight, casts = model.layers[0].mlp[0].weight, []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0] is weight:
                casts.append(func)
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Casts():
        loss = diffusion.loss(model, draw(*SHAPE).float(), label=torch.tensor([0, 1]))
    assert len(casts) == (2 if torch.__version__ < "2.11" else 1)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_loss_covers_all_steps_and_is_reproducible() -> None:
    diffusion = Diffusion()
    model = Recorder(lambda z_t, time: z_t, self_condition=False)
    x0 = draw(5000, 1, 1, 1, 1)
    losses = [diffusion.loss(model, x0, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert len(model.calls) == 3  # a model without self-conditioning is called once
    time = model.calls[0]["time"]
    assert time.min() < 5
    assert time.max() > 994
    assert abs(time.double().mean().item() - 499.5) < 15


def test_sampling_feeds_the_last_estimate_back() -> None:
    diffusion = Diffusion()
    model = Recorder(lambda z_t, time: z_t.cos())
    label, image = torch.tensor([0, 1]), torch.tensor([True, False])
    shown: list[tuple[int, int, Tensor]] = []
    noise = draw(*SHAPE)
    sample = diffusion.sample(
        model, noise, steps=4, label=label, image=image, preview=lambda *state: shown.append(state)
    )
    assert [state[:2] for state in shown] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.equal(shown[-1][2], sample)
    assert [call["time"].tolist() for call in model.calls] == [[999] * 2, [749] * 2, [499] * 2, [249] * 2]
    assert torch.equal(model.calls[0]["z_t"], noise)
    assert "self_condition" not in model.calls[0]
    for before, after, state in zip(model.calls, model.calls[1:], shown, strict=False):
        assert torch.equal(after["label"], label)
        assert torch.equal(after["image"], image)
        x0 = diffusion.x0_from_velocity(before["z_t"], before["z_t"].cos(), before["time"])
        assert torch.equal(after["self_condition"], x0)
        assert torch.equal(state[2], x0)
    assert not sample.requires_grad


def test_noise_of_a_sample_is_its_own() -> None:
    shape = (2, 3, 4)
    noise = sample_noise(5, [(i,) for i in range(6)], shape)
    assert noise.shape == (6, *shape)
    assert torch.equal(noise[4:], sample_noise(5, [(4,), (5,)], shape))
    everything = [
        noise,
        sample_noise(6, [(i,) for i in range(6)], shape),
        sample_noise(5, [(0, 1, 0), (0, 1, 1)], shape),
    ]
    flat = torch.cat(everything).flatten(1)
    assert len(flat.unique(dim=0)) == len(flat)
    with pytest.raises(ValueError, match="seed: got -1"):
        sample_noise(-1, [(0,)], shape)


def test_randoms_of_a_sample_are_its_own() -> None:
    diffusion = Diffusion()

    def numbers(samples):
        return diffusion.randoms((2, 3, 2, 2), [keyed_generator(5, 7, i) for i in samples], low_resolution=True)

    whole, part = numbers(range(6)), numbers([4, 1])
    assert whole["noise"].shape == (6, 2, 3, 2, 2)
    assert all(torch.equal(part[name], tensor[[4, 1]]) for name, tensor in whole.items())
    assert len(whole["noise"].flatten(1).unique(dim=0)) == 6


def test_the_schedule_is_copied_to_a_device_once() -> None:
    diffusion, there = Diffusion(), torch.device("meta")
    assert diffusion._alpha_bar_on(torch.device("cpu")) is diffusion.alpha_bar
    assert diffusion._alpha_bar_on(there) is diffusion._alpha_bar_on(there)
    assert diffusion._alpha_bar_on(there).device == there
    assert diffusion.alpha_bar.device.type == "cpu"


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_bad_number_of_steps(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps: got {steps}; expected 1 to 1000"):
        Diffusion().timesteps(steps)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 1),
        ("beta_start", 0.0),
        ("beta_end", 1.0),
        ("self_condition_probability", 1.1),
        ("drop_probability", -0.1),
        ("frame_probability", 2),
        ("low_resolution_noise", 1.5),
    ],
)
def test_bad_configuration(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}: got {value}"):
        DiffusionConfig(**{field: value})


def test_configuration_round_trip() -> None:
    config = DiffusionConfig(steps=77, zero_terminal_snr=False)
    assert DiffusionConfig.from_dict(config.to_dict()) == config
