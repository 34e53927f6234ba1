"""Batches: their parts, and making them ready one step ahead without a trace in the run."""

from __future__ import annotations

import threading

import pytest
import torch
from on_ranks import STEPS, Net, adversaries, draw, regression

from walt.data.loading import Loader, part_of
from walt.errors import WaltError
from walt.settings import TrainingConfig
from walt.train.objective import Phase
from walt.train.trainer import Trainer


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(generator):
    return {"x": torch.rand(4, 2, generator=generator), "name": "bars"}


def test_parts_of_a_batch():
    batch = {"x": torch.arange(12).view(6, 2), "image": torch.arange(6) >= 4, "start": 3, "name": "bars"}
    parts = [part_of(batch, i, 2) for i in range(2)]
    assert [part["x"][:, 0].tolist() for part in parts] == [[0, 4, 8], [2, 6, 10]]
    assert [int(part["image"].sum()) for part in parts] == [1, 1]  # dealt out evenly
    assert all(part["start"] == 3 and part["name"] == "bars" for part in parts)
    for bad in ({"x": torch.zeros(6, 2), "y": torch.zeros(4)}, {"x": torch.zeros(5)}, {"x": torch.zeros(0)}, {"n": 1}):
        with pytest.raises(ValueError, match=r"batch: got tensors of .* rows; expected the same multiple of 2"):
            part_of(bad, 0, 2)


@pytest.mark.parametrize("parts", [1, 2])
def test_loader_gives_what_is_drawn_in_turn(parts):
    plain, generator = seeded(), seeded()
    with Loader(numbers, lambda part: {**part, "x": -part["x"]}, parts) as loader:
        for _ in range(3):
            taken, batch = loader.take(generator), numbers(plain)
            assert torch.equal(generator.get_state(), plain.get_state())  # nothing of what is made ready
            assert [part["name"] for part in taken] == ["bars"] * parts
            for i, part in enumerate(taken):
                assert torch.equal(part["x"], -batch["x"][i::parts])


def test_loader_drops_what_is_ready_for_another_state():
    generator = seeded()
    with Loader(numbers, None, 1) as loader:
        state = generator.get_state()
        first = loader.take(generator)[0]["x"]
        generator.set_state(state)
        assert torch.equal(loader.take(generator)[0]["x"], first)
        generator.manual_seed(6)
        assert torch.equal(loader.take(generator)[0]["x"], numbers(seeded(6))["x"])


def test_loader_is_one_batch_ahead_in_a_thread():
    threads, second = [], threading.Event()

    def load(part):
        threads.append(threading.current_thread())
        if len(threads) == 2:
            second.set()
        return part

    with Loader(numbers, load, 1) as loader:
        loader.take(seeded())
        assert second.wait(10)
    assert len(threads) == 2
    assert threading.main_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_loader_raises_in_turn():
    drawn = []

    def load(part):
        drawn.append(part)
        if len(drawn) == 2:
            raise WaltError("batch 2 is broken")
        return part

    generator = seeded()
    with Loader(numbers, load, 1) as loader:
        loader.take(generator)
        state = generator.get_state()
        with pytest.raises(WaltError, match="batch 2 is broken"):
            loader.take(generator)
        assert torch.equal(generator.get_state(), state)


def loading(folder, *, inside: bool, **settings) -> Trainer:
    """Rows are indices; what they stand for is computed by the loss, or by `load`."""
    torch.manual_seed(1)
    table = draw(seeded(9))

    def rows_of(generator):
        return {"index": torch.randint(8, (4,), generator=generator), "exponent": 2}

    def load(rows):
        return {"x": table["x"][rows["index"]], "y": table["y"][rows["index"]], "exponent": rows["exponent"]}

    def loss(model, rows):
        return regression(model, load(rows) if inside else rows)

    config = TrainingConfig(STEPS, **{"lr": 0.05, "save_every": 2, "keep": 2, **settings})
    phases = [Phase("model", Net(dropout=0.5), loss)]
    return Trainer(phases, rows_of, config, folder, kind="net", description={}, load=None if inside else load)


def same_bits(one: Trainer, other: Trainer) -> bool:
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and torch.equal(
        one.random.generator.get_state(), other.random.generator.get_state()
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loading_ahead_changes_no_bit(tmp_path, accumulate):
    inside = loading(tmp_path / "inside", inside=True, accumulate=accumulate)
    inside.run()
    ahead = loading(tmp_path / "ahead", inside=False, accumulate=accumulate)
    ahead.run()
    assert same_bits(inside, ahead)

    resumed = loading(tmp_path / "ahead.step000000002", inside=False, accumulate=accumulate)
    assert resumed.resume()
    assert resumed.step == 2
    resumed.run()
    assert same_bits(inside, resumed)


def test_phases_share_what_is_loaded(tmp_path):
    loaded = []

    def load(part):
        loaded.append(len(part["x"]))
        return part

    trainer = adversaries(tmp_path / "a", steps=2, accumulate=2)
    trainer.load = load
    trainer.run()
    assert loaded[:4] == [4] * 4  # 2 steps of 2 parts, whatever the number of phases
    assert len(loaded) <= 6  # and perhaps one batch ahead
