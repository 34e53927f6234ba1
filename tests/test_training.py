"""walt.train.trainer: it learns, resumes to the bit, averages, stops in time, and stops before broken weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from on_ranks import BATCH, adversaries, fit, regression, source, step_two, trainer_of
from torch import nn

from walt.checkpoint import read_tensors
from walt.data.loading import make_batch
from walt.errors import WaltError
from walt.settings import TrainingConfig
from walt.train.log import read_log
from walt.train.objective import Objective
from walt.train.optimizers import learning_rate
from walt.train.trainer import Trainer


def line_fit(folder: Path, steps: int, crash_at: int | None = None, **settings) -> Trainer:
    """A small regression that draws from its samples' generators and from torch's own, and may crash."""
    torch.manual_seed(0)
    slope = torch.tensor([[1.0, -2.0, 0.5]])

    def loss(model, batch):
        if trainer.step == crash_at:
            raise RuntimeError("the power went out")
        return (model(batch["x"]) - batch["x"] @ slope.T + 0.01 * torch.randn(8, 1)).square().mean(), {}

    config = TrainingConfig(steps, **{"lr": 0.05, "warmup": 3, "log_every": 1, "save_every": 5, **settings})
    objective = Objective(nn.Linear(3, 1), loss, config, average=True)
    trainer = trainer_of([objective], folder, kind="line", description={"config": {"inputs": 3}})
    return trainer


def same(first: Path, second: Path) -> bool:
    names = sorted(path.name for path in first.glob("*.safetensors"))
    assert names == sorted(path.name for path in second.glob("*.safetensors"))
    pairs = [[read_tensors(folder / name) for folder in (first, second)] for name in names]
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


def test_learns(tmp_path):
    trainer = line_fit(tmp_path / "a", 120, save_every=60)
    trainer.run()
    rows = read_log(tmp_path / "a.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 121))
    assert rows[-1]["loss"] < 0.01 * rows[0]["loss"]
    assert trainer.finished


def test_resume_after_a_crash_equals_no_crash(tmp_path):
    line_fit(tmp_path / "whole", 23).run()
    crashed = line_fit(tmp_path / "parts", 23, crash_at=13)
    with pytest.raises(RuntimeError, match="power"):
        crashed.run()
    resumed = line_fit(tmp_path / "parts", 23)
    assert resumed.resume()
    assert resumed.step == 10
    torch.manual_seed(999)  # whatever happens between the two runs must not matter
    resumed.resume()
    resumed.run()
    assert same(tmp_path / "whole", tmp_path / "parts")
    losses = [[row["loss"] for row in read_log(tmp_path / f"{name}.jsonl")] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_every_objective_resumes_to_the_bit(tmp_path, optimizer):
    settings = {"optimizer": optimizer, "save_every": 2, "keep": 2, "accumulate": 2, "weight_decay": 0.01}
    adversaries(tmp_path / "whole", **settings).run()
    shutil.copytree(step_two(tmp_path / "whole"), tmp_path / "parts")
    resumed = adversaries(tmp_path / "parts", **settings)
    assert resumed.resume()
    assert resumed.step == 2
    resumed.run()
    names = {path.stem for path in (tmp_path / "whole").glob("*.safetensors")}
    assert names == {"model", "judge", "running", "ema", "optimizer", "optimizer-judge"}
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert not same(tmp_path / "whole", step_two(tmp_path / "whole"))


def test_objectives_are_simultaneous_and_train_only_their_own(tmp_path):
    """One step equals the gradients of both losses at the weights before it."""
    trainer = adversaries(tmp_path / "a", 1, clip_norm=0.0)
    expected = adversaries(tmp_path / "b", 1)
    batch = make_batch(source, expected.config.seed, 0, range(BATCH))
    trainer.run()
    for objective, trained in zip(expected.objectives, trainer.objectives, strict=True):
        loss, _ = objective.forward(batch)
        gradients = torch.autograd.grad(loss, list(objective.network.parameters()), allow_unused=True)
        for gradient, parameter in zip(gradients, trained.network.parameters(), strict=True):
            moment = trained.optimizer.state[parameter].get("exp_avg")
            torch.testing.assert_close(moment, None if gradient is None else 0.1 * gradient)


def test_a_new_run_does_not_resume(tmp_path):
    assert not line_fit(tmp_path / "a", 5).resume()


def test_a_finished_run_stays_finished(tmp_path):
    line_fit(tmp_path / "a", 7).run()
    seconds = json.loads((tmp_path / "a" / "state.json").read_text())["elapsed"]
    again = line_fit(tmp_path / "a", 7)
    assert again.resume()
    assert again.finished
    assert again.elapsed == seconds > 0
    again.run()
    assert again.step == 7


def test_time_limit_ends_with_a_small_rate(tmp_path):
    trainer = line_fit(tmp_path / "a", 10**9, save_every=10**9)
    trainer.run(seconds=0.5)
    assert trainer.finished
    assert 0.5 <= trainer.elapsed < 5
    assert read_log(tmp_path / "a.jsonl")[-1]["lr"] < 0.1 * 0.05


def test_learning_rate():
    config = TrainingConfig(100, lr=2.0, warmup=10)
    assert learning_rate(config, 0, 0.0) == pytest.approx(0.2)
    assert learning_rate(config, 9, 0.0) == pytest.approx(2.0)
    assert learning_rate(config, 50, 0.5) == pytest.approx(2.0 * 0.51)
    assert learning_rate(config, 99, 1.0) == pytest.approx(0.04)
    constant = TrainingConfig(100, lr=2.0, warmup=10, schedule="constant")
    assert learning_rate(constant, 4, 0.04) == pytest.approx(1.0)
    assert learning_rate(constant, 99, 1.0) == 2.0


def test_ema_is_the_warmed_up_average(tmp_path):
    trainer = line_fit(tmp_path / "a", 30, ema_decay=0.6)
    weights: list[torch.Tensor] = []
    optimizer = trainer.objectives[0].optimizer
    optimizer.register_step_post_hook(lambda *_: weights.append(trainer.model.weight.detach().double()))
    trainer.run()
    expected = weights[0]
    for n, weight in enumerate(weights[1:], start=1):
        decay = min(0.6, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
    assert torch.allclose(trainer.averaged.weight.double(), expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(trainer.averaged.weight, trainer.model.weight, rtol=1e-3, atol=1e-4)


def test_averages_are_in_float32(tmp_path):
    def loss(model, batch):
        return model(batch["x"].to(torch.bfloat16)).float().square().mean(), {}

    model = nn.Linear(3, 1).to(torch.bfloat16)
    trainer_of([Objective(model, loss, TrainingConfig(3), average=True)], tmp_path / "a").run()
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "a" / "ema.safetensors").values()} == {torch.float32}
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "a" / "model.safetensors").values()} == {torch.bfloat16}


def test_no_average(tmp_path):
    trainer = line_fit(tmp_path / "a", 6, ema_decay=0.0)
    trainer.run()
    assert trainer.averaged is trainer.model
    assert not (tmp_path / "a" / "ema.safetensors").exists()
    again = line_fit(tmp_path / "a", 6, ema_decay=0.0)
    assert again.resume()


def test_other_settings_are_refused(tmp_path):
    line_fit(tmp_path / "a", 7).run()
    with pytest.raises(WaltError, match=r"training.steps is 7 there, 8 here\); give the same ones, or another --out"):
        line_fit(tmp_path / "a", 8).resume()
    spread = {"accumulate": 2, "strategy": "fsdp", "save_every": 3, "log_every": 2, "keep": 4, "tensorboard": False}
    spread |= {"workers": 2, "profile": 1, "peak_tflops": 2.0}
    assert line_fit(tmp_path / "a", 7, **spread).resume()
    longer = line_fit(tmp_path / "a", 9)
    assert longer.resume(new_settings=True)
    assert (longer.step, longer.finished) == (7, False)
    longer.run()
    assert longer.step == 9
    longer.description = {"config": {"inputs": 4}}
    with pytest.raises(WaltError, match=r"config.inputs is 3 there, 4 here"):
        longer.resume(new_settings=True)


def breaking(at: int, what: str):
    """A regression whose loss, or only whose gradient, breaks at a step."""

    def loss(model, batch):
        value, values = regression(model, batch)
        if runs[-1].step == at:
            if what == "loss":
                return value * float("nan"), values
            value = value + (model.first.weight.sum() - model.first.weight.sum().detach()).clamp(min=0).sqrt()
        return value, values

    return loss


runs: list[Trainer] = []


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
def test_a_diverged_run_stops_at_the_last_good_step(tmp_path, what):
    runs.append(fit(tmp_path / "a", 6, loss=breaking(4, what)))
    with pytest.raises(WaltError) as error:
        runs[-1].run()
    last = read_log(tmp_path / "a.jsonl")[-1]
    assert last["step"] == 4
    pattern = (
        rf"the {what} of the net, objective 'model', became (nan|inf) at step 5 "
        rf"\(its last finite loss was {re.escape(format(last['loss'], '.6g'))}, at step 4\); "
        r".*/a holds step 4, to go on from with a lower learning rate"
    )
    assert re.fullmatch(pattern, str(error.value)), error.value
    # What was saved is what a run without the fault has after step 4: it goes on to the same weights.
    fit(tmp_path / "whole", 6).run()
    resumed = fit(tmp_path / "a", 6)
    assert resumed.resume()
    assert resumed.step == 4
    resumed.run()
    assert same(tmp_path / "whole", tmp_path / "a")


def test_a_second_objective_that_breaks_leaves_the_first_one_alone(tmp_path):
    trainer = adversaries(tmp_path / "a", 5, save_every=3)
    judge = trainer.objectives[1].forward.loss
    trainer.objectives[1].forward.loss = lambda network, batch: (
        judge(network, batch)[0] * (float("inf") if trainer.step == 3 else 1.0),
        judge(network, batch)[1],
    )
    with pytest.raises(WaltError, match=r"objective 'judge', became inf at step 4"):
        trainer.run()
    adversaries(tmp_path / "whole", 5, save_every=3, keep=2).run()
    assert same(tmp_path / "whole.step000000003", tmp_path / "a")


def test_a_run_that_breaks_at_once_saves_nothing(tmp_path):
    runs.append(fit(tmp_path / "a", 6, loss=breaking(0, "loss")))
    before = {name: tensor.clone() for name, tensor in runs[-1].model.state_dict().items()}
    with pytest.raises(WaltError, match=r"became nan at step 1; lower the learning rate"):
        runs[-1].run()
    assert all(torch.equal(before[name], tensor) for name, tensor in runs[-1].model.state_dict().items())
    assert not (tmp_path / "a").exists()


def test_state_is_plain_json(tmp_path):
    fit(tmp_path / "a", 2).run()
    state = json.loads((tmp_path / "a" / "state.json").read_text())
    assert TrainingConfig.from_dict(state["training"]) == fit(tmp_path / "b", 2).config
    assert state["ema_updates"] == state["step"] == 2
