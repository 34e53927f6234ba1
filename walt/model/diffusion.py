"""Gaussian diffusion: schedule with zero terminal SNR, v-prediction, self-conditioning, DDIM, guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from walt.model.conditioning import frame_mask
from walt.model.config import DiffusionConfig, TransformerConfig, as_int

__all__ = ["Diffusion"]

ALONE = 0.5  # share of the samples with a label and a text that see only one of them, either equally often; ours

ONLY = {"text_mask": 1, "label": 2}  # what a sample is without whose `alone` is this

Preview = Callable[[int, int, Tensor], None]


class Diffusion:
    """x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise, with alpha_bar from 1 (clean) to 0 (noise alone).

    The model predicts v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0, the standard form. (The one printed in the
    W.A.L.T paper has sqrt(alpha_bar) before x0; with it x0 could not be recovered where alpha_bar = 0.)
    """

    def __init__(self, config: DiffusionConfig | None = None) -> None:
        self.config = config if config is not None else DiffusionConfig()
        self.alpha_bar = noise_schedule(self.config)  # float64 [steps], on the CPU
        self._copies: dict[torch.device, Tensor] = {}  # of alpha_bar, on other devices

    def add_noise(self, x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t for integer steps `time` [B]."""
        signal, sigma = self._roots(x0, time)
        return signal * x0 + sigma * noise

    def velocity(self, x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0: the training target."""
        signal, sigma = self._roots(x0, time)
        return signal * noise - sigma * x0

    def x0_from_velocity(self, x_t: Tensor, v: Tensor, time: Tensor) -> Tensor:
        """x0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v: defined at every step."""
        signal, sigma = self._roots(x_t, time)
        return signal * x_t - sigma * v

    def noise_from_velocity(self, x_t: Tensor, v: Tensor, time: Tensor) -> Tensor:
        """noise = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) x_t."""
        signal, sigma = self._roots(x_t, time)
        return signal * v + sigma * x_t

    def _roots(self, like: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) of each sample, shaped to multiply `like`, in its dtype."""
        alpha_bar = self._alpha_bar_on(like.device)[time.to(like.device)]
        alpha_bar = alpha_bar.reshape(-1, *[1] * (like.ndim - 1))
        return alpha_bar.sqrt().to(like.dtype), (1 - alpha_bar).sqrt().to(like.dtype)

    def _alpha_bar_on(self, device: torch.device) -> Tensor:
        """alpha_bar on the device, copied once: a copy in every call would make the host wait."""
        if device == self.alpha_bar.device:
            return self.alpha_bar
        if device not in self._copies:
            self._copies[device] = self.alpha_bar.to(device)
        return self._copies[device]

    def randoms(
        self, shape: Sequence[int], generators: Sequence[torch.Generator], *, low_resolution: bool = False
    ) -> dict[str, Tensor]:
        """All random numbers of `loss` for a latent of `shape` [c, T, h, w] from each of B generators.

        A sample's numbers come from its own generator, so a batch gives the same losses however it is split. They are
        on the generators' device and, but for `low_resolution`, the same for every model.

        Returns:
            time: int64 [B], uniform over the steps. noise: [B, c, T, h, w].
            self_conditioned: bool [B], with self-conditioning. dropped: bool [B], without label, text and known frames.
            known: int64 [B], 0, 1 or 2 known frames. alone: int64 [B], of label and text both (0), the label (1) or the
            text (2), so that a model with both can sample from either.
            With low_resolution also low_time: int64 [B] and low_noise [B, c, T, h/2, w/2], the noise on a
            low-resolution latent: its level is uniform up to `low_resolution_noise` of the steps.
        """
        samples = [self._sample_randoms(shape, generator, low_resolution) for generator in generators]
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def _sample_randoms(
        self, shape: Sequence[int], generator: torch.Generator, low_resolution: bool
    ) -> dict[str, Tensor]:
        config, where = self.config, generator.device

        def probable(probability: float) -> Tensor:
            return torch.rand((), generator=generator, device=where) < probability

        def below(limit: int) -> Tensor:
            return torch.randint(limit, (), generator=generator, device=where)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=where)

        numbers = {
            "time": below(config.steps),
            "noise": normal(*shape),
            "self_conditioned": probable(config.self_condition_probability),
            "dropped": probable(config.drop_probability),
            "known": probable(config.frame_probability) * (1 + below(2)),
        }
        if low_resolution:
            numbers["low_time"] = below(max(1, round(config.low_resolution_noise * config.steps)))
            numbers["low_noise"] = normal(*shape[:2], shape[2] // 2, shape[3] // 2)
        numbers["alone"] = probable(ALONE) * (1 + below(2))
        return numbers

    def loss(
        self,
        model: nn.Module,
        x0: Tensor,
        randoms: Mapping[str, Tensor] | None = None,
        *,
        generator: torch.Generator | None = None,
        label: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        image: Tensor | None = None,
        low_resolution: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error on v over the batch x0 [B, c, T, h, w]; a scalar.

        A model with self-conditioning first estimates x0 from nothing, without gradient, and for the `self_conditioned`
        samples sees that estimate in the pass that is trained. A model with frame_condition sees first frames of x0,
        but never all, and none of a stack of images. A super-resolution model sees `low_resolution`
        [B, c, T, h/2, w/2], which is clean here and noised inside.

        randoms: what `randoms` returns for the samples; None: from `generator`, one sample after another.
        The conditions are those of `Transformer.forward`.
        """
        config = model_config(model)
        if randoms is None:
            generator = generator if generator is not None else torch.default_generator
            randoms = self.randoms(x0.shape[1:], [generator] * len(x0), low_resolution=low_resolution is not None)
        for name, tensor in randoms.items():
            if tensor.shape[:1] != x0.shape[:1]:
                raise ValueError(f"randoms[{name!r}]: got {len(tensor)} samples; expected {len(x0)}, as x0 has")
        randoms = {name: tensor.to(x0.device) for name, tensor in randoms.items()}
        time, noise = randoms["time"], randoms["noise"].to(x0)

        conditions = present(label=label, text=text, text_mask=text_mask, image=image)
        if config.frame_condition:
            known = randoms["known"].clamp_max(x0.shape[2] - 1)
            conditions |= {"frames": x0, "known": known if image is None else known.masked_fill(image, 0)}
        null = null_conditions(conditions, config)
        both = {"label", "text_mask"} <= null.keys()
        for name, value in null.items():
            dropped = randoms["dropped"]
            if both and name in ONLY:
                dropped = dropped | (randoms["alone"] == ONLY[name])
            conditions[name] = torch.where(dropped.reshape(-1, *[1] * (value.ndim - 1)), value, conditions[name])
        if low_resolution is not None:
            low_time = randoms["low_time"]
            low = self.add_noise(low_resolution, randoms["low_noise"].to(low_resolution), low_time)
            conditions |= {"low_resolution": low, "noise_level": low_time}

        x_t = self.add_noise(x0, noise, time)
        if config.self_condition and self.config.self_condition_probability > 0:
            with torch.no_grad():
                first = model(x_t, time, **conditions).to(x_t.dtype)
                conditioned = randoms["self_conditioned"].reshape(-1, *[1] * (x0.ndim - 1))
                conditions["self_condition"] = torch.where(conditioned, self.x0_from_velocity(x_t, first, time), 0)
            # The weights that autocast has cast here serve the pass below, but before PyTorch 2.11 without a gradient.
            if torch.__version__ < "2.11":
                torch.clear_autocast_cache()
        v = model(x_t, time, **conditions)
        return F.mse_loss(v.to(x0.dtype), self.velocity(x0, noise, time))

    def timesteps(self, steps: int) -> list[int]:
        """The training steps that DDIM visits, noisiest first: "trailing" spacing, which begins at the last one."""
        total, steps = self.config.steps, as_int("steps", steps)
        if not 1 <= steps <= total:
            raise ValueError(f"steps: got {steps}; expected 1 to {total}, the number of training steps")
        return [round(total - i * total / steps) - 1 for i in range(steps)]

    def ddim_step(self, x_t: Tensor, v: Tensor, time: int, following: int | None) -> tuple[Tensor, Tensor]:
        """From step `time` to the less noisy step `following` (None: clean). Returns (x_following, estimate of x0)."""
        steps = torch.full(x_t.shape[:1], time, device=x_t.device)
        x0 = self.x0_from_velocity(x_t, v, steps)
        if following is None:
            return x0, x0
        noise = self.noise_from_velocity(x_t, v, steps)
        return self.add_noise(x0, noise, torch.full_like(steps, following)), x0

    def guidance_weight(self, guidance: float, power: float | None, time: int) -> float:
        """w at a step; with a power s, MDT's power-cosine schedule from 1 in pure noise to `guidance` at the end.

        w_t = 1 + (w - 1)(1 - cos(pi (1 - t/T)^s)) / 2, where t = 1 .. T counts the steps.
        """
        if power is None:
            return guidance
        remaining = 1 - (time + 1) / self.config.steps
        return 1 + (guidance - 1) * (1 - math.cos(math.pi * remaining**power)) / 2

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        noise: Tensor,
        *,
        steps: int = 50,
        guidance: float = 1.0,
        guidance_power: float | None = None,
        label: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        image: Tensor | None = None,
        frames: Tensor | None = None,
        known: Tensor | None = None,
        low_resolution: Tensor | None = None,
        noise_level: Tensor | None = None,
        preview: Preview | None = None,
    ) -> Tensor:
        """Deterministic DDIM from `noise` [B, c, T, h, w] to x0; everything is moved to the model's device.

        A model with self-conditioning sees its last estimate of x0. With guidance w other than 1,
        v = v_null + w_t (v - v_null), where v_null is without label, text and known frames; both come from one
        call (`guidance_power`: see `guidance_weight`). Known frames come back as they were given.
        `preview(done, steps, estimate of x0)` is called after each step. The conditions are those of
        `Transformer.forward`.
        """
        config = model_config(model)
        if not (math.isfinite(guidance) and guidance >= 0):
            raise ValueError(f"guidance: got {guidance}; expected a number >= 0")
        if guidance_power is not None and not (math.isfinite(guidance_power) and guidance_power > 0):
            raise ValueError(f"guidance_power: got {guidance_power}; expected a number > 0, or None")
        parameter = next(model.parameters())
        conditions = present(
            label=label,
            text=text,
            text_mask=text_mask,
            image=image,
            frames=frames,
            known=known,
            low_resolution=low_resolution,
            noise_level=noise_level,
        )
        conditions = {name: tensor.to(parameter.device) for name, tensor in conditions.items()}
        if guidance != 1:
            null = null_conditions(conditions, config)
            if not null:
                raise ValueError(f"guidance: got {guidance}; expected 1 without label, text and known frames")
            conditions = {name: torch.cat([tensor, null.get(name, tensor)]) for name, tensor in conditions.items()}

        # float32 between steps, whatever the model's dtype (float64 for a float64 model).
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        x = noise.to(parameter.device, dtype)
        copies = 1 if guidance == 1 else 2
        times = self.timesteps(steps)
        for i, time in enumerate(times):
            step = torch.full((copies * len(x),), time, device=x.device)
            v = model(x.to(parameter.dtype).repeat(copies, 1, 1, 1, 1), step, **conditions).to(dtype)
            if copies == 2:
                v, v_null = v.chunk(2)
                v = torch.lerp(v_null, v, self.guidance_weight(guidance, guidance_power, time))
            x, x0 = self.ddim_step(x, v, time, times[i + 1] if i + 1 < steps else None)
            if config.self_condition:
                conditions["self_condition"] = x0.to(parameter.dtype).repeat(copies, 1, 1, 1, 1)
            if preview is not None:
                preview(i + 1, steps, x0)
        if frames is not None and known is not None:
            x = torch.where(frame_mask(known.to(x.device), x.shape[2]), frames.to(x), x)
        return x


def noise_schedule(config: DiffusionConfig) -> Tensor:
    """alpha_bar_t = prod(1 - beta), float64 [steps], betas linear; with zero terminal SNR, the last one is exactly 0.

    Zero terminal SNR (Lin et al. 2023): sqrt(alpha_bar) is shifted so that its last value is 0 and scaled so that its
    first is what it was.
    """
    # On the CPU even under `torch.device("meta")`, where the values would be lost.
    betas = torch.linspace(config.beta_start, config.beta_end, config.steps, dtype=torch.float64, device="cpu")
    alpha_bar = (1 - betas).cumprod(0)
    if config.zero_terminal_snr:
        root = alpha_bar.sqrt()
        first, last = root[0].clone(), root[-1].clone()
        alpha_bar = ((root - last) * first / (first - last)) ** 2
    return alpha_bar


def model_config(model: nn.Module) -> TransformerConfig:
    """The configuration of a Transformer, perhaps wrapped for compilation or several devices."""
    for attribute in ("module", "_orig_mod"):
        model = getattr(model, attribute, model)
    config = getattr(model, "config", None)
    if not isinstance(config, TransformerConfig):
        raise TypeError(f"model: got a {type(model).__name__} without a TransformerConfig as its config")
    return config


def present(**tensors: Tensor | None) -> dict[str, Tensor]:
    """The conditions that are not None; a text without a mask gets one that is all True."""
    conditions = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if "text" in conditions and "text_mask" not in conditions:
        text = conditions["text"]
        conditions["text_mask"] = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    return conditions


def null_conditions(conditions: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """The values for "no label", "no text" and "no known frames", for those of them that `conditions` has."""
    null = {}
    if "label" in conditions:
        null["label"] = torch.full_like(conditions["label"], config.classes)
    if "text" in conditions:
        null["text_mask"] = torch.zeros_like(conditions["text_mask"])
    if "known" in conditions:
        null["known"] = torch.zeros_like(conditions["known"])
    return null
