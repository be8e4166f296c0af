"""The geometry of the report's plots: numbers to positions. The template draws them as inline SVG.

Plots that sit in a row of text (forest plots, bars) use percent of the width, so that they fit any screen while their
text keeps its size; curves use a fixed view box of `WIDTH` x `HEIGHT`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 320, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 26
_CHARACTER = 6.5  # width of a digit of the ticks
_MAX_POINTS = 240


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high` with round ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    digits: int

    @classmethod
    def over(
        cls, values: Iterable[float], *, zero: bool = False, bars: bool = False, padding: float = 0.06, count: int = 4
    ) -> Axis:
        """Return an axis that holds all values (and zero, if asked for) with about `count` ticks.

        For `bars` an axis of positive values starts at zero itself, as a bar's length must.
        """
        held = [value for value in values if math.isfinite(value)] + ([0.0] if zero or bars else [])
        low, high = min(held, default=0.0), max(held, default=1.0)
        if low == high:
            low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
        span = high - low
        low = low if bars and low == 0 else low - padding * span
        high = high if bars and high == 0 else high + padding * span
        step = _round_step((high - low) / count)
        if math.floor(high / step) - math.ceil(low / step) < 1:  # a single tick shows no scale
            step = _round_step((high - low) / (2 * count))
        first = math.ceil(low / step - 1e-9)
        ticks = tuple(index * step for index in range(first, math.floor(high / step + 1e-9) + 1))
        return cls(low, high, ticks, max(0, -math.floor(math.log10(step) + 1e-9)))

    def percent(self, value: float) -> float:
        """Return the position of a value in percent of the width."""
        return round(100 * (value - self.low) / (self.high - self.low), 3)

    def labels(self) -> list[dict[str, Any]]:
        """Return the ticks as position and text."""
        return [{"at": self.percent(tick), "text": tick_text(tick, self.digits)} for tick in self.ticks]


def tick_text(value: float, digits: int) -> str:
    """Write a tick's value with a true minus and no negative zero."""
    text = f"{abs(value):,.{digits}f}"
    return text if value >= 0 or float(text.replace(",", "")) == 0 else "\N{MINUS SIGN}" + text


def interval_mark(axis: Axis, value: float, interval: Sequence[float] | None) -> dict[str, float | None]:
    """Return a point and the ends of its interval in percent."""
    return {
        "at": axis.percent(value),
        "low": axis.percent(interval[0]) if interval else None,
        "high": axis.percent(interval[1]) if interval else None,
    }


def bar_mark(axis: Axis, value: float) -> dict[str, float]:
    """Return a bar from zero to a value in percent."""
    zero, end = axis.percent(0.0), axis.percent(value)
    return {"start": min(zero, end), "width": abs(end - zero), "end": end}


def line_chart(
    series: dict[str, list[tuple[float, float]]],
    whiskers: dict[str, list[Any]] | None = None,
    bands: dict[str, list[tuple[float, float, float]]] | None = None,
) -> dict[str, Any]:
    """Lay out lines over a common pair of axes.

    Args:
        series: name -> points (x, y).
        whiskers: name -> an interval (low, high) or None for each point of the series of that name.
        bands: name -> (x, low, high) along the series of that name.
    """
    whiskers, bands = whiskers or {}, bands or {}
    ends = [end for intervals in whiskers.values() for interval in intervals if interval for end in interval]
    ends += [end for edges in bands.values() for _, *both in edges for end in both]
    x_axis = Axis.over((x for points in series.values() for x, _ in points), padding=0.02)
    y_axis = Axis.over([*(y for points in series.values() for _, y in points), *ends])

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x_axis.percent(x) / 100 * (WIDTH - _LEFT - _RIGHT)
        down = HEIGHT - _BOTTOM - y_axis.percent(y) / 100 * (HEIGHT - _TOP - _BOTTOM)
        return round(across, 1), round(down, 1)

    lines = []
    for name, points in series.items():
        placed = [place(x, y) for x, y in thin_out(points)]
        bars = [
            {"x": place(x, 0)[0], "low": place(x, interval[0])[1], "high": place(x, interval[1])[1]}
            for (x, _), interval in zip(points, whiskers.get(name, []), strict=False)
            if interval
        ]
        edges = bands.get(name, [])
        outline = [place(x, low) for x, low, _ in edges] + [place(x, high) for x, _, high in reversed(edges)]
        lines.append({"name": name, "points": placed, "path": _path(placed), "bars": bars, "band": _path(outline)})
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": _LEFT,
        "right": WIDTH - _RIGHT,
        "bottom": HEIGHT - _BOTTOM,
        "x_ticks": [_x_tick(place(tick, 0)[0], tick_text(tick, x_axis.digits)) for tick in x_axis.ticks],
        "y_ticks": [{"at": place(0, tick)[1], "text": tick_text(tick, y_axis.digits)} for tick in y_axis.ticks],
        "lines": lines,
    }


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def _x_tick(at: float, text: str) -> dict[str, Any]:
    """Return a tick of the x axis; a label that would leave the chart ends at its edge."""
    beyond = at + len(text) * _CHARACTER / 2 > WIDTH
    return {"at": WIDTH if beyond else at, "anchor": "end" if beyond else "middle", "text": text}


def thin_out(points: Sequence[tuple[float, float]], most: int = _MAX_POINTS) -> list[tuple[float, float]]:
    """Average neighbouring points so that at most `most` remain; short series are returned as they are."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _round_step(raw: float) -> float:
    """Return the next larger one of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
