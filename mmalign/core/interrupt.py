"""Ctrl-C, or SIGTERM of a job scheduler, as a request to stop after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mmalign.core.progress import note


class StopRequest:
    """A flag that is set once the user or the scheduler has asked to stop."""

    requested = False


@contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """Turn the first signal inside the context into a stop request; a second signal stops the process at once.

    Python allows signal handlers only in the main thread; in other threads the request is never set.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        note("stopping after this step, with a checkpoint; interrupt again to stop at once")
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
