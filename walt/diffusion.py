"""Gaussian diffusion: schedule with zero terminal SNR, v-prediction, self-conditioning, DDIM."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from walt.config import DiffusionConfig

__all__ = ["Diffusion"]


class Diffusion:
    """x_t = sqrt(gamma_t) x0 + sqrt(1 - gamma_t) noise, with gamma from 1 (clean) to 0 (noise alone).

    The model predicts v = sqrt(gamma) noise - sqrt(1 - gamma) x0, the standard form. (The formula printed in the
    W.A.L.T paper has sqrt(gamma) before x0; with it x0 could not be recovered where gamma = 0.)
    """

    def __init__(self, config: DiffusionConfig | None = None) -> None:
        self.config = config if config is not None else DiffusionConfig()
        self.gamma = noise_schedule(self.config)  # float64 [steps], on the CPU

    def add_noise(self, x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t for integer steps `time` [B]."""
        signal, sigma = self._roots(x0, time)
        return signal * x0 + sigma * noise

    def velocity(self, x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """v = sqrt(gamma) noise - sqrt(1 - gamma) x0: the training target."""
        signal, sigma = self._roots(x0, time)
        return signal * noise - sigma * x0

    def x0_from_velocity(self, x_t: Tensor, v: Tensor, time: Tensor) -> Tensor:
        """x0 = sqrt(gamma) x_t - sqrt(1 - gamma) v: defined at every step."""
        signal, sigma = self._roots(x_t, time)
        return signal * x_t - sigma * v

    def noise_from_velocity(self, x_t: Tensor, v: Tensor, time: Tensor) -> Tensor:
        """noise = sqrt(gamma) v + sqrt(1 - gamma) x_t."""
        signal, sigma = self._roots(x_t, time)
        return signal * v + sigma * x_t

    def _roots(self, like: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(gamma) and sqrt(1 - gamma) of each sample, shaped to multiply `like` [B, ...] and in its dtype."""
        gamma = self.gamma.to(like.device)[time.to(like.device)]
        gamma = gamma.reshape(-1, *[1] * (like.ndim - 1))
        return gamma.sqrt().to(like.dtype), (1 - gamma).sqrt().to(like.dtype)

    def loss(
        self,
        model: nn.Module,
        x0: Tensor,
        *,
        generator: torch.Generator | None = None,
        label: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error on v at steps drawn uniformly; a scalar.

        A model with self-conditioning first estimates x0 from nothing, without gradient, and for a fraction
        `self_condition_probability` of the samples sees that estimate in the pass that is trained.
        """
        batch = x0.shape[0]
        where = generator.device if generator is not None else x0.device
        time = torch.randint(self.config.steps, (batch,), generator=generator, device=where).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator, device=where).to(x0)
        chosen = torch.rand(batch, generator=generator, device=where) < self.config.self_condition_probability
        x_t = self.add_noise(x0, noise, time)
        estimate = None
        if _self_conditioned(model) and bool(chosen.any()):
            with torch.no_grad():
                first = model(x_t, time, label=label, image=image).to(x_t.dtype)
                mask = chosen.to(x0).reshape(-1, *[1] * (x0.ndim - 1))
                estimate = self.x0_from_velocity(x_t, first, time) * mask
        v = model(x_t, time, label=label, image=image, self_condition=estimate)
        return F.mse_loss(v.to(x0.dtype), self.velocity(x0, noise, time))

    def timesteps(self, steps: int) -> list[int]:
        """The training steps that DDIM visits, noisiest first: "trailing" spacing, which begins at the last one."""
        total = self.config.steps
        if not 1 <= steps <= total:
            raise ValueError(f"steps: got {steps}; expected 1 to {total}, the number of training steps")
        return [round(total - i * total / steps) - 1 for i in range(steps)]

    def ddim_step(self, x_t: Tensor, v: Tensor, time: int, following: int | None) -> tuple[Tensor, Tensor]:
        """From step `time` to the less noisy step `following` (None: clean). Returns (x_following, estimate of x0)."""
        steps = torch.full(x_t.shape[:1], time)
        x0 = self.x0_from_velocity(x_t, v, steps)
        if following is None:
            return x0, x0
        noise = self.noise_from_velocity(x_t, v, steps)
        return self.add_noise(x0, noise, torch.full_like(steps, following)), x0

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        shape: Sequence[int],
        *,
        steps: int = 50,
        generator: torch.Generator | None = None,
        label: Tensor | None = None,
        image: Tensor | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Deterministic DDIM from noise to x0 of `shape` [B, c, 1+t, h, w]; the same generator state, the same sample.

        A model with self-conditioning sees its last estimate of x0. `progress(done, steps)` is called after each step.
        """
        parameter = next(model.parameters())
        where = generator.device if generator is not None else parameter.device
        # float32 between steps, whatever the model's dtype (float64 for a float64 model).
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        x = torch.randn(tuple(shape), generator=generator, device=where, dtype=dtype).to(parameter.device)
        times = self.timesteps(steps)
        estimate = None
        for i, time in enumerate(times):
            step = torch.full(x.shape[:1], time, device=x.device)
            v = model(x.to(parameter.dtype), step, label=label, image=image, self_condition=estimate).to(dtype)
            x, x0 = self.ddim_step(x, v, time, times[i + 1] if i + 1 < steps else None)
            if _self_conditioned(model):
                estimate = x0.to(parameter.dtype)
            if progress is not None:
                progress(i + 1, steps)
        return x


def noise_schedule(config: DiffusionConfig) -> Tensor:
    """gamma_t = prod(1 - beta), float64 [steps], betas linear; with zero terminal SNR, the last one is exactly 0.

    Zero terminal SNR (Lin et al. 2023): sqrt(gamma) is shifted so that its last value is 0 and scaled so that its
    first is what it was.
    """
    betas = torch.linspace(config.beta_start, config.beta_end, config.steps, dtype=torch.float64)
    gamma = (1 - betas).cumprod(0)
    if config.zero_terminal_snr:
        root = gamma.sqrt()
        first, last = root[0].clone(), root[-1].clone()
        gamma = ((root - last) * first / (first - last)) ** 2
    return gamma


def _self_conditioned(model: nn.Module) -> bool:
    """Whether the model (perhaps wrapped for compilation or several devices) takes self-conditioning."""
    for attribute in ("module", "_orig_mod"):
        model = getattr(model, attribute, model)
    return bool(getattr(getattr(model, "config", None), "self_condition", False))
