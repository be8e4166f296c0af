"""Time several ways of doing one thing against each other: interleaved, warmed up, medians and ratios."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Settings:
    """How much to measure. `batch` is in pairs for training, in images otherwise; `steps` are sampling steps."""

    device: torch.device
    repeats: int = 15
    warmup: int = 3
    batch: int = 16
    steps: int = 25

    @classmethod
    def quick(cls, device: torch.device) -> Settings:
        """Enough to see that it works, in seconds; too little to quote."""
        return cls(device, repeats=3, warmup=1, batch=4, steps=5)


@dataclass
class Report:
    """What one benchmark found; `skipped` says why there is nothing.

    `seconds` holds every side's times in the order of the rounds, `ratios` which side is divided by which, `images`
    how many images one call handles, `facts` what else the reader should know, such as by how much results differ.
    """

    title: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, tuple[str, str]] = field(default_factory=dict)
    images: int = 1
    facts: dict[str, str] = field(default_factory=dict)
    skipped: str = ""

    def median(self, side: str) -> float:
        """Return a side's median time in seconds."""
        return statistics.median(self.seconds[side])

    def ratio(self, name: str) -> tuple[float, float, float]:
        """Return median, lower and upper quartile of the ratios of the rounds.

        Each round's own ratio is taken, so that what slows a whole round down cancels out.
        """
        above, below = self.ratios[name]
        rounds = [a / b for a, b in zip(self.seconds[above], self.seconds[below], strict=True)]
        if len(rounds) == 1:
            return rounds[0], rounds[0], rounds[0]
        low, middle, high = statistics.quantiles(rounds, n=4, method="inclusive")
        return middle, low, high

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return headings and rows to print."""
        rows = []
        for side in self.seconds:
            seconds = self.median(side)
            rows.append([side, f"{1000 * seconds:.1f}", f"{self.images / seconds:.1f}"])
        return ["side", "median ms", "images/s"], rows

    def notes(self) -> list[str]:
        """Return lines to print below the table: the ratios with their quartiles, and the facts."""
        lines = []
        for ratio in self.ratios:
            middle, low, high = self.ratio(ratio)
            lines.append(f"{ratio}: {middle:.2f} (quartiles {low:.2f} to {high:.2f})")
        return lines + [f"{fact}: {value}" for fact, value in self.facts.items()]

    def as_json(self) -> dict[str, Any]:
        """Return everything, the single times included, as plain values."""
        return {
            "title": self.title,
            "skipped": self.skipped,
            "images": self.images,
            "sides": {side: {"median_s": self.median(side), "seconds": s} for side, s in self.seconds.items()},
            "ratios": {
                name: dict(zip(("median", "low", "high"), self.ratio(name), strict=True)) for name in self.ratios
            },
            "facts": self.facts,
        }


def interleave(sides: Mapping[str, Callable[[], object]], settings: Settings) -> dict[str, list[float]]:
    """Call the sides in turn, A B A B, and return the seconds of each call after the warm-up.

    The garbage collector is off meanwhile, and a CUDA device is waited for before and after every call.
    """
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    gc.collect()
    gc.disable()
    try:
        for number in range(settings.warmup + settings.repeats):
            for side, call in sides.items():
                _wait(settings.device)
                started = time.perf_counter()
                call()
                _wait(settings.device)
                if number >= settings.warmup:
                    seconds[side].append(time.perf_counter() - started)
    finally:
        gc.enable()
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
