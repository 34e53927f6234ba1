"""What a run may be told: precision, compilation, checkpointing, previews, logs; and settings that are refused."""

from __future__ import annotations

import functools
import itertools
import json
import sys
import time
import types
import warnings
from typing import ClassVar

import pytest
import torch
from on_ranks import Net, Running, adversaries, fit, regression, trainer_of
from torch import nn

import walt.train.run
from walt.checkpoint import read_tensors
from walt.errors import WaltError, WaltWarning
from walt.settings import TrainingConfig, load_settings
from walt.train.log import RunLog, read_log
from walt.train.objective import TIMES, Objective, compile_blocks
from walt.train.precision import LAYERS, bfloat16_speedup
from walt.train.run import Run, warn_of_slow_bfloat16


def losses(path) -> list[float]:
    return [row["loss"] for row in read_log(path.with_suffix(".jsonl"))]


def test_bfloat16(tmp_path):
    seen = []

    def loss(model, batch):
        out = model(batch["x"])
        seen.append((out.dtype, model.first.weight.dtype))
        return (out.float() - batch["y"]).square().mean(), {}

    for name, precision in (("wide", "float32"), ("narrow", "bfloat16")):
        fit(tmp_path / name, 12, loss=loss, precision=precision, accumulate=2).run()
    assert set(seen[:24]) == {(torch.float32, torch.float32)}
    assert set(seen[24:]) == {(torch.bfloat16, torch.float32)}
    wide, narrow = losses(tmp_path / "wide"), losses(tmp_path / "narrow")
    assert wide != narrow
    assert narrow == pytest.approx(wide, rel=0.1)
    for name in ("model", "ema", "optimizer"):
        tensors = read_tensors(tmp_path / "narrow" / f"{name}.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_bfloat16_speedup_is_that_of_forward_and_backward(monkeypatch):
    now = [0.0]

    class Layer(nn.Linear):
        def forward(self, x):
            now[0] += 1.0 if torch.is_autocast_enabled("cpu") else 3.0
            return super().forward(x)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setitem(LAYERS, "products", (lambda: Layer(2, 2), (3, 2)))
    assert bfloat16_speedup("products") == (3.0, 3.0)


@pytest.mark.parametrize(("stage", "kind"), [("tokenizer", "convolutions"), ("base", "products")])
def test_slow_bfloat16_is_told(monkeypatch, tmp_path, stage, kind):
    def tell(speedup, **settings):
        monkeypatch.setattr(walt.train.run, "bfloat16_speedup", lambda asked: speedup if asked == kind else None)
        overrides = {f"training.{name}": value for name, value in settings.items()}
        settings = load_settings(stage, preset="minimal", overrides=overrides)
        warn_of_slow_bfloat16(Run(stage, settings, None, tmp_path, torch.device("cpu")))

    with pytest.warns(
        WaltWarning, match=f"trains {kind} 0.7 to 0.9 times as fast as in float32; --training.precision float32"
    ):
        tell((0.72, 0.91), precision="bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tell((0.7, 1.3), precision="bfloat16")
        tell((0.72, 0.91), precision="float32")


def test_activation_checkpointing_changes_nothing(tmp_path):
    calls = []
    for name in ("off", "on"):
        trainer = fit(tmp_path / name, 4, checkpointing=name == "on", dropout=0.3)
        trainer.model.layers[0].mlp.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        trainer.run()
    assert losses(tmp_path / "off") == losses(tmp_path / "on")
    assert (calls.count("off"), calls.count("on")) == (4, 8)  # once more in the backward pass
    a, b = (read_tensors(tmp_path / name / "model.safetensors") for name in ("off", "on"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_checkpointing_of_modules_that_cannot(tmp_path):
    objective = Objective(nn.Linear(3, 1), regression, TrainingConfig(1, checkpointing=True))
    with pytest.raises(ValueError, match="checkpointing: got True; expected False"):
        trainer_of([objective], tmp_path)


def test_compiled_modules_keep_their_names(tmp_path, monkeypatch):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=backend))
    for name in ("eager", "compiled"):
        fit(tmp_path / name, 3, compile=name == "compiled").run()
    assert graphs
    a, b = (read_tensors(tmp_path / name / "model.safetensors") for name in ("eager", "compiled"))
    assert a.keys() == b.keys() == Net().state_dict().keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key])
    again = fit(tmp_path / "compiled", 3)
    assert again.resume()
    assert again.averaged(torch.zeros(1, 3)).shape == (1, 1)


def test_equal_blocks_are_compiled_once_and_others_each(monkeypatch):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    class Block(nn.Module):
        def __init__(self, *widths):
            super().__init__()
            self.linear = nn.Linear(*widths)

        def forward(self, x):
            return self.linear(x).tanh()

    class Stack(nn.Module):
        def __init__(self, widths):
            super().__init__()
            self.blocks = nn.ModuleList(Block(*pair) for pair in itertools.pairwise(widths))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=backend))
    for widths, expected in (([6] * 13, 1), (range(1, 14), 12)):
        torch._dynamo.reset()
        graphs.clear()
        network = Stack(widths)
        x = torch.randn(2, widths[0], requires_grad=True)  # as what the other blocks get
        y = network(x)
        with torch._dynamo.config.patch(recompile_limit=8):
            compile_blocks(network)
            assert torch.equal(network(x), y)
        assert len(graphs) == expected


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_blocks_are_compiled_in_the_mode_that_was_asked_for(monkeypatch, mode):
    modes = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: modes.append(options["mode"]))
    Objective(Net(), regression, TrainingConfig(3, compile=True, compile_mode=mode))
    assert set(modes) == {mode}


def test_previews_see_the_average_and_disturb_nothing(tmp_path):
    seen = []

    def preview(module, step):
        seen.append((step, module.training, module.first.weight.clone()))
        torch.rand(3)

    watched = fit(tmp_path / "a", 6, dropout=0.2, preview=preview, preview_every=2, save_every=2, keep=3)
    watched.run()
    fit(tmp_path / "b", 6, dropout=0.2).run()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert [(step, training) for step, training, _ in seen] == [(2, False), (4, False), (6, False)]
    saved = read_tensors(tmp_path / "a.step000000004" / "ema.safetensors")
    assert torch.equal(saved["first.weight"], seen[1][2])


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, [3, 5, 8, 10]), ({"preview_every": 4}, [4, 8]), ({"preview_every": 0}, [])]
)
def test_how_often_there_are_previews(tmp_path, settings, expected):
    """By default four times in a run, the last one of its last step."""
    seen: list[int] = []
    fit(tmp_path / "a", 10, preview=lambda _, step: seen.append(step), **settings).run()
    assert seen == expected


def test_rows_of_the_log(tmp_path):
    trainer = adversaries(tmp_path / "a", 7, log_every=3)
    trainer.run()
    rows = read_log(tmp_path / "a.jsonl")
    assert [row["step"] for row in rows] == [3, 6, 7]
    columns = ["step", "loss", "grad_norm", "made", "judge_loss", "judge_grad_norm", "judge_real"]
    times = [name for name in TIMES if name != "mfu"]  # what a step's FLOPs are is not known here
    assert all([*row] == [*columns, "lr", "frames_s", *times, "seconds"] for row in rows)
    assert rows[-1]["seconds"] >= rows[0]["seconds"] > 0


def test_the_norm_in_the_log_is_that_before_clipping(tmp_path):
    for name, limit, parts in (("free", 0.0, 1), ("clipped", 0.5, 1), ("parts", 0.0, 4)):
        fit(tmp_path / name, 1, clip_norm=limit, accumulate=parts).run()
    rows = [read_log(tmp_path / f"{name}.jsonl")[0] for name in ("free", "clipped", "parts")]
    assert rows[0]["grad_norm"] == rows[1]["grad_norm"] > 0.5
    for column in ("loss", "grad_norm", "error"):  # the parts' means
        assert rows[2][column] == pytest.approx(rows[0][column], rel=1e-5)
    state = read_tensors(tmp_path / "clipped" / "optimizer.safetensors")
    moments = [tensor for name, tensor in state.items() if name.endswith("exp_avg")]
    norm = torch.cat([moment.flatten() for moment in moments]).norm().item()
    assert norm == pytest.approx(0.1 * 0.5, rel=1e-4)  # 1 - beta of a gradient of the limit's norm


class Summary:
    """Stands in for tensorboard's writer."""

    made: ClassVar[list[Summary]] = []

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False
        self.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.closed = True


def test_tensorboard(tmp_path, monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Summary
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Summary.made.clear()
    fit(tmp_path / "a", 2).run()
    again = fit(tmp_path / "a", 3)
    again.resume(new_settings=True)
    again.run()
    assert [writer.purge_step for writer in Summary.made] == [1, 3]
    assert all(writer.closed and writer.folder == str(tmp_path / "a.tensorboard") for writer in Summary.made)
    rows = read_log(tmp_path / "a.jsonl")
    assert [value for name, value, _ in Summary.made[0].scalars if name == "loss"] == [row["loss"] for row in rows[:2]]
    assert {step for _, _, step in Summary.made[1].scalars} == {3}
    fit(tmp_path / "b", 1, tensorboard=False).run()
    assert len(Summary.made) == 2


def test_tensorboard_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    fit(tmp_path / "a", 1).run()
    with pytest.raises(WaltError, match="tensorboard is not installed"):
        fit(tmp_path / "a", 1, tensorboard=True)


def test_a_log_is_rewound(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in (2, 4, 6)) + '{"step": 8, "lo')
    RunLog(path, False).rewind(4)
    assert [row["step"] for row in read_log(path)] == [2, 4]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 0, "an int >= 1"),
        ("steps", 2.0, "an int >= 1"),
        ("accumulate", True, "an int >= 1"),
        ("lr", 0, "a number > 0"),
        ("lr", float("nan"), "a number > 0"),
        ("weight_decay", -1, "a number >= 0"),
        ("clip_norm", "1", "a number >= 0"),
        ("ema_decay", 1, r"a number in \[0, 1\)"),
        ("betas", (0.9,), r"two numbers in \[0, 1\)"),
        ("schedule", "linear", "cosine or constant"),
        ("optimizer", "sgd", "adamw or adafactor"),
        ("precision", "float16", "float32 or bfloat16"),
        ("strategy", "none", "ddp or fsdp"),
        ("compile", 1, "true or false"),
        ("compile_mode", "fast", "default or reduce-overhead"),
        ("compile_mode", "reduce-overhead", "default without compile"),
        ("keep", 0, "an int >= 1"),
        ("seed", None, "an int >= 0"),
        ("workers", 0, "an int >= 1"),
        ("profile", -1, "an int >= 0"),
        ("peak_tflops", -1.0, "a number >= 0"),
    ],
)
def test_settings_that_are_refused(name, value, expected):
    with pytest.raises(ValueError, match=rf"{name}: got .*; expected {expected}"):
        TrainingConfig(**{"steps": 5, name: value})


def test_an_objective_trains_its_own_network_only(tmp_path):
    """The second one's loss would have a gradient for the first one's network."""

    def judged(detached: bool):
        torch.manual_seed(1)
        judge = nn.Linear(1, 1)

        def loss(network, batch):
            made = model(batch["x"])
            return network(made.detach() if detached else made).square().mean(), {}

        model, config = Net(), TrainingConfig(3)
        objectives = [Objective(model, regression, config), Objective(judge, loss, config, name="judge")]
        trainer_of(objectives, tmp_path / str(detached)).run()
        return {**model.state_dict(), **judge.state_dict()}

    a, b = judged(True), judged(False)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_graphs_of_a_step_live_until_the_next(tmp_path, monkeypatch, mode):
    """The first objective's gradients wait while the second one's are computed."""
    marks = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: None)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(trainer.step))
    config = TrainingConfig(3, compile=True, compile_mode=mode)
    trainer = trainer_of([Objective(Net(), regression, config, name=name) for name in "ab"], tmp_path / mode)
    trainer.run()
    assert marks == ([0, 1, 2] if mode == "reduce-overhead" else [])


def test_objectives_that_are_refused(tmp_path):
    def objective(name="model", **settings):
        return Objective(Net(), regression, TrainingConfig(2, **settings), name=name)

    with pytest.raises(ValueError, match=r"objectives: got \[\].*expected one or more"):
        trainer_of([], tmp_path)
    with pytest.raises(ValueError, match="of different names"):
        trainer_of([objective("a"), objective("a")], tmp_path)
    with pytest.raises(ValueError, match="got the name 'ema'"):
        trainer_of([objective(), objective("ema")], tmp_path)
    with pytest.raises(ValueError, match=r"got the name '\.\./x'"):
        trainer_of([objective()], tmp_path, extra_modules={"../x": Running()})
    with pytest.raises(ValueError, match="strategy: got 'fsdp' with 2 objectives; expected 'ddp'"):
        trainer_of([objective(strategy="fsdp"), objective("judge", strategy="fsdp")], tmp_path)


def test_values_that_are_refused(tmp_path):
    def loss(model, batch):
        return regression(model, batch)[0], {"lr": torch.tensor(1.0)}

    with pytest.raises(ValueError, match=r"values of objective 'model': got \['lr'\]; expected other names"):
        trainer_of([Objective(Net(), loss, TrainingConfig(2))], tmp_path / "a").run()
