"""Conditions in the loss and in sampling: dropping, known frames, noise on low resolution, guidance, split batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformer_cases import EVERYTHING, FEATURES, SHAPE, SMALL, close, draw, inputs, make

from walt.model.config import DiffusionConfig, TransformerConfig
from walt.model.diffusion import Diffusion, model_config

FRAMES = replace(SMALL, frame_condition=True)


class Recorder(nn.Module):
    """Keeps what it is called with; answers with zeros."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.config, self.calls = config, []

    def forward(self, z_t: Tensor, time: Tensor, **given: Tensor) -> Tensor:
        self.calls.append({"z_t": z_t, "time": time, **given})
        return self.scale * z_t


def conditions(batch: int, config: TransformerConfig) -> dict[str, Tensor]:
    """What `Diffusion.loss` takes of a model's inputs."""
    names = ("label", "text", "text_mask", "low_resolution")
    return {name: tensor for name, tensor in inputs(batch, config).items() if name in names}


def randoms(diffusion: Diffusion, shape: tuple[int, ...], seed: int = 0, low: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return diffusion.randoms(shape[1:], [generator] * shape[0], low_resolution=low)


# The loss


def test_randoms_lead_with_the_batch_and_follow_their_distribution() -> None:
    diffusion = Diffusion(DiffusionConfig(low_resolution_noise=0.2))
    drawn = randoms(diffusion, (4000, 2, 3, 2, 2))
    assert all(tensor.shape[0] == 4000 for tensor in drawn.values())
    assert drawn["noise"].shape == (4000, 2, 3, 2, 2)
    assert drawn["low_noise"].shape == (4000, 2, 3, 1, 1)
    assert not {"low_time", "low_noise"} & randoms(diffusion, (1, 2, 3, 2, 2), low=False).keys()
    assert drawn["time"].min() < 5
    assert drawn["time"].max() > 994
    assert 190 < drawn["low_time"].max() < 200
    # Four standard deviations of a mean of 4000 draws.
    for name, mean in (("self_conditioned", 0.9), ("dropped", 0.1)):
        assert abs(drawn[name].double().mean() - mean) < 0.02
    shares = torch.bincount(drawn["known"], minlength=3) / 4000
    assert (shares - torch.tensor([0.1, 0.45, 0.45])).abs().max() < 0.032
    shares = torch.bincount(drawn["alone"], minlength=3) / 4000
    assert (shares - torch.tensor([0.5, 0.25, 0.25])).abs().max() < 0.032


@pytest.mark.parametrize("config", [SMALL, EVERYTHING, FEATURES], ids=["small", "everything", "features"])
def test_a_split_batch_has_the_loss_of_the_whole(config: TransformerConfig) -> None:
    diffusion, model = Diffusion(DiffusionConfig(self_condition_probability=0.5, drop_probability=0.5)), make(config)
    x0, given = draw(4, *SHAPE[1:]), conditions(4, config)
    image = torch.tensor([False, True, False, False])
    drawn = randoms(diffusion, x0.shape, low=config.low_resolution)
    whole = diffusion.loss(model, x0, drawn, image=image, **given)
    close(diffusion.loss(model, x0, generator=torch.Generator().manual_seed(0), image=image, **given), whole)
    for sizes in ([2, 2], [1, 3]):
        parts = []
        for part in torch.arange(4).split(sizes):
            sliced, few = ({name: t[part] for name, t in tensors.items()} for tensors in (drawn, given))
            parts.append(len(part) / 4 * diffusion.loss(model, x0[part], sliced, image=image[part], **few))
        close(sum(parts), whole)


def test_the_first_pass_runs_whatever_is_self_conditioned() -> None:
    """Its collectives must meet on all processes, also where none of a process's samples see the estimate."""
    diffusion, model = Diffusion(), Recorder(SMALL)
    drawn = {**randoms(diffusion, SHAPE), "self_conditioned": torch.zeros(2, dtype=torch.bool)}
    diffusion.loss(model, draw(*SHAPE), drawn)
    assert len(model.calls) == 2
    assert not model.calls[1]["self_condition"].any()


def test_dropping_takes_label_text_and_frames_together() -> None:
    config = replace(FEATURES, frame_condition=True)
    diffusion, model = Diffusion(DiffusionConfig(self_condition_probability=0)), Recorder(config)
    x0, given = draw(4, *SHAPE[1:]), conditions(4, config)
    given["text_mask"].fill_(True)
    dropped = torch.tensor([False, True, True, False])
    drawn = {**randoms(diffusion, x0.shape), "dropped": dropped, "known": torch.tensor([1, 2, 1, 2])}
    drawn["alone"] = torch.zeros(4, dtype=torch.int64)
    for labels in (given["label"], given["label"][:, None].expand(4, 3)):
        diffusion.loss(model, x0, drawn, **{**given, "label": labels})
        called = model.calls[-1]
        assert torch.equal(called["label"][~dropped], labels[~dropped])
        assert (called["label"][dropped] == config.classes).all()
        assert torch.equal(called["text_mask"], ~dropped[:, None].expand(4, config.text_length))
        assert torch.equal(called["text"], given["text"])
        assert called["known"].tolist() == [1, 0, 0, 2]
        assert called["frames"] is x0
    del given["text_mask"]
    diffusion.loss(model, x0, drawn, **given)
    assert torch.equal(model.calls[-1]["text_mask"], ~dropped[:, None].expand(4, config.text_length))


def test_a_model_with_label_and_text_also_learns_from_either_alone() -> None:
    """Else what is sampled from a class without a sentence would be a guess."""
    diffusion, model = Diffusion(DiffusionConfig(self_condition_probability=0)), Recorder(FEATURES)
    x0, given = draw(4, *SHAPE[1:]), conditions(4, FEATURES)
    given["text_mask"].fill_(True)
    dropped = torch.tensor([False, False, False, True])
    drawn = {**randoms(diffusion, x0.shape), "dropped": dropped, "alone": torch.tensor([0, 1, 2, 0])}
    diffusion.loss(model, x0, drawn, **given)
    called = model.calls[-1]
    assert (called["label"] == given["label"]).tolist() == [True, True, False, False]
    assert (called["label"][2:] == FEATURES.classes).all()
    assert called["text_mask"].all(dim=1).tolist() == [True, False, True, False]
    for name in ("label", "text"):  # one that is alone anyway is not dropped more often
        kept = {key: value for key, value in given.items() if key.startswith(name)}
        diffusion.loss(model, x0, drawn, **kept)
        seen = model.calls[-1]["label"] != FEATURES.classes if name == "label" else model.calls[-1]["text_mask"][:, 0]
        assert seen.tolist() == [True, True, True, False]


def test_known_frames_leave_one_to_predict_and_stay_out_of_images() -> None:
    diffusion = Diffusion(DiffusionConfig(drop_probability=0, self_condition_probability=0))
    model = Recorder(FRAMES)
    for frames, expected in ((3, [1, 2, 0]), (2, [1, 1, 0]), (1, [0, 0, 0])):
        x0 = draw(3, 4, frames, 4, 6)
        drawn = {**randoms(diffusion, x0.shape), "known": torch.tensor([1, 2, 2])}
        diffusion.loss(model, x0, drawn, image=torch.tensor([False, False, True]))
        assert model.calls[-1]["known"].tolist() == expected


def test_low_resolution_is_noised_to_the_level_that_is_told() -> None:
    config = replace(SMALL, low_resolution=True)
    diffusion, model = Diffusion(DiffusionConfig(self_condition_probability=0)), Recorder(config)
    given, drawn = conditions(2, config), randoms(diffusion, SHAPE)
    diffusion.loss(model, draw(*SHAPE), drawn, **given)
    called = model.calls[-1]
    assert torch.equal(called["noise_level"], drawn["low_time"])
    expected = diffusion.add_noise(given["low_resolution"], drawn["low_noise"].double(), drawn["low_time"])
    assert torch.equal(called["low_resolution"], expected)


def test_gradients_reach_every_parameter_through_the_loss() -> None:
    """Also those for what is absent: the null text and the class table's last row."""
    model = make(EVERYTHING).requires_grad_(True)
    diffusion = Diffusion(DiffusionConfig(drop_probability=0.5))
    drawn = {**randoms(diffusion, (4, *SHAPE[1:])), "dropped": torch.tensor([True, False, True, False])}
    diffusion.loss(model, draw(4, *SHAPE[1:]), drawn, **conditions(4, EVERYTHING)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert model.embed_class.table.grad[-1].any()


def test_a_wrapped_model_is_still_known() -> None:
    assert model_config(AveragedModel(make())) == SMALL
    assert model_config(torch.compile(make(), backend="eager")) == SMALL


def test_randoms_of_another_batch() -> None:
    diffusion = Diffusion()
    with pytest.raises(ValueError, match=r"randoms\['time'\]: got 3 samples; expected 2, as x0 has"):
        diffusion.loss(make(), draw(*SHAPE), randoms(diffusion, (3, *SHAPE[1:])))
    with pytest.raises(TypeError, match="model: got a Linear without a TransformerConfig"):
        diffusion.loss(nn.Linear(2, 2), draw(*SHAPE))


# Guidance


def test_guidance_schedules() -> None:
    diffusion = Diffusion()
    assert diffusion.guidance_weight(3.0, None, 500) == 3.0
    assert diffusion.guidance_weight(3.0, 2.0, 999) == 1.0  # pure noise
    assert diffusion.guidance_weight(3.0, 1.0, 499) == pytest.approx(2.0)  # 1 - t/T = 1/2: the cosine is 0
    weights = [diffusion.guidance_weight(3.0, 2.0, time) for time in range(999, -1, -1)]
    assert weights == sorted(weights)
    assert weights[-1] == pytest.approx(3.0, abs=1e-4)
    assert diffusion.guidance_weight(3.0, 4.0, 499) < diffusion.guidance_weight(3.0, 1.0, 499)


@pytest.mark.parametrize("power", [None, 1.5])
def test_guided_velocity_is_extrapolated_from_nothing(power: float | None) -> None:
    """One step at a time against two calls of the model, whose known parts are label, text and frames."""
    config = replace(EVERYTHING, self_condition=False)
    model, diffusion = make(config), Diffusion()
    noise, given = draw(*SHAPE, seed=9), inputs(2, config)
    for name in ("z_t", "time"):
        del given[name]
    null = {
        **given,
        "label": torch.full((2,), config.classes),
        "text_mask": torch.zeros_like(given["text_mask"]),
        "known": torch.zeros(2, dtype=torch.int64),
    }
    sample = diffusion.sample(model, noise, steps=3, guidance=2.5, guidance_power=power, **given)
    x, times = noise, diffusion.timesteps(3)
    for i, time in enumerate(times):
        step = torch.full((2,), time)
        v, v_null = model(x, step, **given), model(x, step, **null)
        weight = diffusion.guidance_weight(2.5, power, time)
        x, _ = diffusion.ddim_step(x, v_null + weight * (v - v_null), time, times[i + 1] if i < 2 else None)
    for b, known in enumerate(given["known"]):
        close(sample[b, :, known:], x[b, :, known:])
        assert torch.equal(sample[b, :, :known], given["frames"][b, :, :known])


def test_guidance_of_a_model_that_ignores_its_conditions_changes_nothing() -> None:
    model, diffusion = make(), Diffusion()
    with torch.no_grad():
        model.embed_class.table.zero_()
    label = torch.tensor([1, 2])
    plain = diffusion.sample(model, draw(*SHAPE), steps=3, label=label)
    close(diffusion.sample(model, draw(*SHAPE), steps=3, label=label, guidance=4.0), plain)
    with torch.no_grad():
        model.embed_class.table[1:3] += 1
    other = diffusion.sample(model, draw(*SHAPE), steps=3, label=label)
    assert (diffusion.sample(model, draw(*SHAPE), steps=3, label=label, guidance=4.0) - other).abs().max() > 1e-3
    zero = diffusion.sample(model, draw(*SHAPE), steps=3, label=label, guidance=0.0)
    close(zero, diffusion.sample(model, draw(*SHAPE), steps=3))


def test_samples_do_not_depend_on_their_batch() -> None:
    model, diffusion = make(EVERYTHING), Diffusion()
    given = {name: t for name, t in inputs(3, EVERYTHING).items() if name not in ("z_t", "time", "self_condition")}
    noise = draw(3, *SHAPE[1:])
    together = diffusion.sample(model, noise, steps=4, guidance=2.0, **given)
    for part in torch.arange(3).split([1, 2]):
        few = {name: tensor[part] for name, tensor in given.items()}
        close(diffusion.sample(model, noise[part], steps=4, guidance=2.0, **few), together[part])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 2.0}, "guidance: got 2.0; expected 1 without label, text and known frames"),
        ({"guidance": -1.0}, "guidance: got -1.0; expected a number >= 0"),
        ({"guidance": float("nan")}, "guidance: got nan"),
        ({"guidance_power": 0.0}, "guidance_power: got 0.0; expected a number > 0"),
    ],
)
def test_bad_guidance(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Diffusion().sample(make(), draw(*SHAPE), steps=2, **options)
