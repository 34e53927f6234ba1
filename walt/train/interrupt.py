"""Signals that end a run after its step: Ctrl-C, and SIGTERM, which clusters send before they take a machine away."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

STOPS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    number = 0  # of the signal that came; 0: none


@contextlib.contextmanager
def stop_signal() -> Iterator[Stop]:
    """Notes the first of STOPS, so that the running step can be finished; a Ctrl-C after it stops at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield stop
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.number:
            raise KeyboardInterrupt
        stop.number = stop.number or number

    before = {number: signal.signal(number, handle) for number in STOPS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
