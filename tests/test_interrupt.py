"""Ctrl-C and SIGTERM end a run after its step, with a checkpoint from which it goes on to the same bits."""

from __future__ import annotations

import json
import os
import signal

import pytest
from on_ranks import fit, regression
from test_training import same

from walt.errors import Interrupted
from walt.train.interrupt import stop_signal


def struck(trainers, at: int, *numbers: int):
    """A regression during whose step these signals come."""

    def loss(model, batch):
        if trainers[-1].step == at:
            for number in numbers:
                os.kill(os.getpid(), number)
        return regression(model, batch)

    return loss


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step(tmp_path, number):
    trainers, before = [], signal.getsignal(number)
    trainers.append(fit(tmp_path / "a", 6, dropout=0.2, loss=struck(trainers, 2, number)))
    with pytest.raises(Interrupted, match=r"a holds a checkpoint at step 3 of 6") as stopped:
        trainers[-1].run()
    assert stopped.value.signal == number
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert signal.getsignal(number) is before
    assert json.loads((tmp_path / "a" / "state.json").read_text())["step"] == 3
    resumed = fit(tmp_path / "a", 6, dropout=0.2)
    assert resumed.resume()
    resumed.run()
    fit(tmp_path / "whole", 6, dropout=0.2).run()
    assert same(tmp_path / "whole", tmp_path / "a")


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    trainers = []
    trainers.append(fit(tmp_path / "a", 6, loss=struck(trainers, 2, signal.SIGINT, signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt) as stopped:
        trainers[-1].run()
    assert not isinstance(stopped.value, Interrupted)
    assert not (tmp_path / "a").exists()


def test_sigterm_after_ctrl_c_does_not_break_the_step(tmp_path):
    """torchrun sends it to its processes when it gets a Ctrl-C, as they do."""
    trainers = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGTERM)
    trainers.append(fit(tmp_path / "a", 6, loss=struck(trainers, 2, *numbers)))
    with pytest.raises(Interrupted, match="at step 3 of 6"):
        trainers[-1].run()


def test_a_signal_in_the_last_step_is_no_interruption(tmp_path):
    trainers = []
    trainers.append(fit(tmp_path / "a", 3, loss=struck(trainers, 2, signal.SIGTERM)))
    trainers[-1].run()
    assert trainers[-1].finished


def test_nothing_came():
    with stop_signal() as stop:
        assert stop.number == 0
