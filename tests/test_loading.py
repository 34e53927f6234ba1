"""Batches as a function of seed, step and sample, and making them ready ahead without a trace in the run."""

from __future__ import annotations

import threading

import pytest
import torch
from on_ranks import BATCH, STEPS, Net, adversaries, regression, source, trainer_of

from walt.data.loading import Loader, make_batch, map_tensors
from walt.errors import WaltError
from walt.settings import TrainingConfig
from walt.train.objective import Objective
from walt.train.trainer import Trainer


def numbers(shared, samples):
    """What a batch shares, what a sample has of its own, and its number."""
    own = torch.stack([torch.rand(2, generator=generator) for generator in samples.values()])
    return {"shared": float(torch.rand((), generator=shared)), "own": own, "number": torch.tensor([*samples])}


def test_a_batch_depends_on_seed_step_and_sample_alone():
    state = torch.get_rng_state()
    whole = make_batch(numbers, 3, 7, range(6))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    for samples in ([4], [5, 0], range(1, 6, 2)):
        part = make_batch(numbers, 3, 7, samples)
        assert part["shared"] == whole["shared"]
        assert torch.equal(part["own"], whole["own"][[*samples]])
    drawn = [(make_batch(numbers, seed, step, range(6))) for seed in (3, 4) for step in (7, 8)]
    rows = torch.cat([batch["own"] for batch in drawn])
    assert len(rows.unique(dim=0)) == 4 * 6
    assert len({batch["shared"] for batch in drawn} | {float(x) for x in rows[:, 0]}) == 4 + 4 * 6


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_loader_gives_step_after_step(accumulate, workers):
    with Loader(numbers, 4, 5, step=2, accumulate=accumulate, workers=workers) as loader:
        for step in range(2, 7):
            whole = make_batch(numbers, 5, step, range(4))
            taken = loader.take()
            assert [batch["number"].tolist() for batch in taken] == [
                [*range(i, 4, accumulate)] for i in range(accumulate)
            ]
            for i, batch in enumerate(taken):
                assert torch.equal(batch["own"], whole["own"][i::accumulate])
                assert batch["shared"] == whole["shared"]


def test_each_rank_makes_its_own_samples_only(monkeypatch):
    asked = []

    def source(shared, samples):
        asked.append([*samples])
        return numbers(shared, samples)

    monkeypatch.setattr("walt.data.loading.world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr("walt.data.loading.rank", lambda rank=rank: rank)
        with Loader(source, 12, 0, accumulate=3) as loader:
            parts += [batch["number"].tolist() for batch in loader.take()]
    assert parts == [[i, i + 6] for i in range(6)]
    assert all(samples in parts for samples in asked)


@pytest.mark.parametrize(("batch", "accumulate"), [(5, 2), (0, 1), (1, 2)])
def test_batches_that_cannot_be_divided(batch, accumulate):
    message = rf"batch: got {batch}; expected a multiple of {accumulate} \(ranks x microbatches\)"
    with pytest.raises(ValueError, match=message):
        Loader(numbers, batch, 0, accumulate=accumulate)


def test_loader_is_one_batch_ahead_in_a_thread():
    threads, second = [], threading.Event()

    def source(shared, samples):
        threads.append(threading.current_thread())
        if len(threads) == 2:
            second.set()
        return numbers(shared, samples)

    with Loader(source, 4, 0) as loader:
        loader.take()
        assert second.wait(10)
    assert len(threads) == 2
    assert threading.main_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_workers_make_batches_at_the_same_time():
    both = threading.Barrier(2, timeout=10)

    def source(shared, samples):
        both.wait()  # for the other one
        return numbers(shared, samples)

    with Loader(source, 4, 0, workers=2, accumulate=2) as loader:
        assert len(loader.take()) == 2


def test_loader_raises_in_turn():
    def source(shared, samples):
        batch = numbers(shared, samples)
        if torch.equal(batch["own"], make_batch(numbers, 0, 1, range(4))["own"]):
            raise WaltError("batch 2 is broken")
        return batch

    with Loader(source, 4, 0) as loader:
        loader.take()
        with pytest.raises(WaltError, match="batch 2 is broken"):
            loader.take()


def test_tensors_within_a_batch():
    batch = {"x": torch.ones(2), "name": "bars", "randoms": {"time": torch.ones(3), "n": 4}}
    doubled = map_tensors(lambda tensor: 2 * tensor, batch)
    assert (doubled["x"].tolist(), doubled["name"]) == ([2, 2], "bars")
    assert (doubled["randoms"]["time"].tolist(), doubled["randoms"]["n"]) == ([2, 2, 2], 4)


def test_pinned_memory(monkeypatch):
    """All tensors of a batch, in the thread that makes it; and copies that the host does not wait for."""
    pinned, copies = [], []

    def pin(tensor):
        pinned.append(threading.current_thread())
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    with Loader(numbers, 4, 0, pin=True) as loader:
        loader.take()
    assert len(pinned) >= 2
    assert threading.main_thread() not in pinned

    class Copied:
        def to(self, device, *, non_blocking):
            copies.append((device, non_blocking))

    trainer = adversaries("unused")
    trainer._to_device(Copied())
    assert copies == [(trainer.device, True)]


def looking_up(folder, *, inside: bool, **settings) -> Trainer:
    """Samples are indices; what they stand for is computed by the loss, or ahead of it."""
    torch.manual_seed(1)
    table = make_batch(source, 9, 0, range(8))

    def index(shared, samples):
        return {"index": torch.stack([torch.randint(8, (), generator=own) for own in samples.values()])}

    def load(batch):
        return {**table, "x": table["x"][batch["index"]], "y": table["y"][batch["index"]]}

    def loss(model, batch):
        return regression(model, load(batch) if inside else batch)

    config = TrainingConfig(STEPS, **{"lr": 0.05, "save_every": 2, "keep": 2, **settings})
    made = index if inside else lambda shared, samples: load(index(shared, samples))
    objective = Objective(Net(dropout=0.5), loss, config, average=True)
    return Trainer([objective], made, folder, batch=4, kind="net", description={})


def same_bits(one: Trainer, other: Trainer) -> bool:
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loading_ahead_changes_no_bit(tmp_path, accumulate):
    inside = looking_up(tmp_path / "inside", inside=True, accumulate=accumulate)
    inside.run()
    ahead = looking_up(tmp_path / "ahead", inside=False, accumulate=accumulate, workers=3)
    ahead.run()
    assert same_bits(inside, ahead)

    resumed = looking_up(tmp_path / "ahead.step000000002", inside=False, accumulate=accumulate)
    assert resumed.resume()
    assert resumed.step == 2
    torch.manual_seed(99)  # dropout goes by seed, step and rank
    resumed.run()
    assert same_bits(inside, resumed)


def test_objectives_share_what_is_made(tmp_path):
    made = []

    def watched(shared, samples):
        made.append(len(samples))
        return source(shared, samples)

    trainer = adversaries(tmp_path / "a", steps=2, accumulate=2)
    trainer.source = watched
    trainer.run()
    assert made[:4] == [BATCH // 2] * 4  # 2 steps of 2 microbatches, whatever the number of objectives
    assert len(made) <= 6  # and perhaps one batch ahead


def test_a_trainer_refuses_batches_that_cannot_be_divided(tmp_path):
    objective = Objective(Net(), regression, TrainingConfig(1, accumulate=3))
    with pytest.raises(ValueError, match="batch: got 8; expected a multiple of 3"):
        trainer_of([objective], tmp_path / "a").run()
