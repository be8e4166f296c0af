"""Draw each system's rewards against what its training cost: `python -m benchmarks.curves COMPARISON --out DIR`.

COMPARISON is the output folder of a finished `mmalign compare` whose systems were trained there. For every trained
system DIR gets `<system>.svg` with one panel a reward: the mean over training seeds of evaluations on held-out prompts
while training, the span of the seeds as a band, and the start as a dotted line. The panels of one reward have one
scale in all files, so that they compare.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from mmalign.compare.report.charts import Axis, tick_text
from mmalign.compare.systems.facts import EVALUATION, read_evaluations
from mmalign.core.errors import UserError
from mmalign.core.files import write_atomically
from mmalign.training.tracking import read_metrics

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 250, 170, 48, 12, 26, 34
COST = "images_seen"
Curve = list[tuple[float, float, float, float]]
"""Points: images seen; above the start: mean over training seeds, least, largest."""


def read_curves(comparison: Path) -> dict[str, dict[str, Curve]]:
    """Return system -> reward -> curve, for the systems of a comparison that were trained and evaluated.

    Raises:
        UserError: there is no finished comparison, or none of its trainings left evaluations.
    """
    results = comparison / "results.json"
    if not results.is_file():
        raise UserError(f"{comparison}: holds no results.json; give the output folder of a finished `mmalign compare`")
    curves = {}
    for name, system in json.loads(results.read_text("utf-8"))["systems"].items():
        replicas = system.get("training_seeds") or {"": system}
        found = [read_evaluations(read_metrics(Path(one["model"]))) for one in replicas.values()]
        if any(found):
            curves[name] = _average([evaluations for evaluations in found if evaluations])
    if not curves:
        raise UserError(f"{comparison}: no training logged evaluations (`evaluate` in its config) with costs")
    return curves


def _average(runs: Sequence[list[dict[str, float]]]) -> dict[str, Curve]:
    """Average the n-th evaluations of several seeds, each minus its first."""
    curves: dict[str, Curve] = defaultdict(list)
    for evaluations in zip(*runs, strict=False):
        for name in evaluations[0]:
            if name.startswith(EVALUATION) and all(name in evaluation for evaluation in evaluations):
                values = [evaluation[name] - run[0][name] for evaluation, run in zip(evaluations, runs, strict=True)]
                cost = sum(evaluation[COST] for evaluation in evaluations) / len(evaluations)
                mean = sum(values) / len(values)
                curves[name.removeprefix(EVALUATION)].append((cost, mean, min(values), max(values)))
    return dict(curves)


def draw(title: str, curves: dict[str, Curve], axes: dict[str, Axis], cost: Axis) -> str:
    """Return one system's panels as an SVG document."""
    width = WIDTH * len(curves)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="10"><title>{escape(title)}</title>'
        '<rect width="100%" height="100%" fill="#fff"/>'
    ]
    for index, (reward, curve) in enumerate(curves.items()):
        parts.append(f'<g transform="translate({index * WIDTH} 0)">{_panel(reward, curve, axes[reward], cost)}</g>')
    return "".join(parts) + "</svg>\n"


def _panel(reward: str, curve: Curve, axis: Axis, cost: Axis) -> str:
    def place(x: float, y: float) -> str:
        across = LEFT + cost.percent(x) / 100 * (WIDTH - LEFT - RIGHT)
        return f"{across:.1f},{HEIGHT - BOTTOM - axis.percent(y) / 100 * (HEIGHT - TOP - BOTTOM):.1f}"

    def line(points: Iterable[str], style: str) -> str:
        return f'<polyline points="{" ".join(points)}" fill="none" {style}/>'

    grid = [line([place(cost.low, tick), place(cost.high, tick)], 'stroke="#ddd"') for tick in axis.ticks]
    for tick in axis.ticks:
        _, down = place(cost.low, tick).split(",")
        text = tick_text(tick, axis.digits)
        grid.append(f'<text x="{LEFT - 5}" y="{float(down) + 3:.1f}" text-anchor="end" fill="#555">{text}</text>')
    for tick in cost.ticks:
        across, _ = place(tick, axis.low).split(",")
        grid.append(f'<text x="{across}" y="{HEIGHT - 20}" text-anchor="middle" fill="#555">{tick / 1000:g}k</text>')
    band = [place(x, low) for x, _, low, _ in curve] + [place(x, high) for x, _, _, high in reversed(curve)]
    return "".join(
        [
            f'<text x="{LEFT}" y="16" font-weight="bold">{escape(reward)}, change</text>',
            *grid,
            f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end" fill="#555">images seen</text>',
            f'<polygon points="{" ".join(band)}" fill="#2b6cb0" opacity="0.18"/>',
            line([place(cost.low, 0), place(cost.high, 0)], 'stroke="#888" stroke-dasharray="2 3"'),
            line([place(x, mean) for x, mean, _, _ in curve], 'stroke="#2b6cb0" stroke-width="2"'),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Draw all systems of a comparison; 2 means that the arguments are wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__)
    parser.add_argument("comparison", type=Path, metavar="COMPARISON")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    try:
        curves = read_curves(options.comparison)
    except UserError as error:
        parser.error(str(error))
    rewards = dict.fromkeys(reward for one in curves.values() for reward in one)
    axes = {
        reward: Axis.over(
            [end for one in curves.values() for _, _, low, high in one.get(reward, []) for end in (low, high)]
        )
        for reward in rewards
    }
    costs = [x for one in curves.values() for curve in one.values() for x, *_ in curve]
    cost = Axis.over(costs, padding=0.02)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, one in curves.items():
        write_atomically(options.out / f"{name}.svg", draw(name, one, axes, cost))
    print(f"{len(curves)} systems: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
