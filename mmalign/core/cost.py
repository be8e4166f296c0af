"""Cost of a training: images through the network, images sampled, reward calls, seconds; the basis of budgets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

COUNTERS = ("images_seen", "images_sampled", "reward_calls")


class Cost:
    """Counts one process's work while training; what happens inside `paused()` (evaluation, saving) is left out.

    images_seen
        Images that went through the denoiser, forward or backward: each direction counts one, a guided call two for
        each image. For a vision-language model: answers that it scored, forward or backward. What gradient
        checkpointing and `two_pass` compute again does not count, because it depends on memory and not on the method.
    images_sampled, reward_calls
        Images sampled, and images scored (an image scored by two rewards counts two).
    seconds
        Wall time.
    """

    def __init__(self) -> None:
        """Start at zero, with the clock stopped."""
        self.images_seen = self.images_sampled = self.reward_calls = 0
        self._seconds = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds counted so far."""
        return self._seconds + (0.0 if self._since is None else time.monotonic() - self._since)

    def start(self) -> None:
        """Start the clock and the counters."""
        self._since = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside the context."""
        running = self._since is not None
        self._seconds, self._since = self.seconds, None
        try:
            yield
        finally:
            self._since = time.monotonic() if running else None

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Count no images inside the context, which computes again what was counted; the clock runs."""
        before = self.counts()
        try:
            yield
        finally:
            for name in COUNTERS:
                setattr(self, name, int(before[name]))

    def watch(self, network: nn.Module) -> None:
        """Count the images that go through a network from now on."""
        network.register_forward_hook(self._on_forward)

    def add(self, **counts: int) -> None:
        """Add to counters by name, unless paused."""
        if self._since is not None:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def counts(self) -> dict[str, float]:
        """Return the counters and the seconds of this process."""
        return {**{name: float(getattr(self, name)) for name in COUNTERS}, "seconds": self.seconds}

    def load(self, totals: dict[str, float], rank: int = 0, processes: int = 1) -> None:
        """Continue from the totals of a run, divided among its processes."""
        for name in COUNTERS:
            share, rest = divmod(int(totals[name]), processes)
            setattr(self, name, share + (rank < rest))
        self._seconds = totals["seconds"]

    def _on_forward(self, network: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        first: Any = output if isinstance(output, Tensor) else output[0]
        images = len(first)
        self.add(images_seen=images)
        one: Tensor = first if isinstance(first, Tensor) else first[0]  # some networks give a list, one an image
        if one.requires_grad:
            one.register_hook(lambda gradient: self.add(images_seen=images))
