"""Ctrl-C (and the SIGTERM of a job scheduler) as a wish to stop after the present step, not an accident."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mmalign.core.progress import note


class StopRequest:
    """Set once the user or the scheduler has asked to stop."""

    requested = False


@contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """Turn the first signal inside the context into a request; the second acts as it always does.

    Outside the main thread, where Python allows no signal handlers, the request is simply never set.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        note("stopping after this step, with a checkpoint; once more to stop at once")
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        restore()
