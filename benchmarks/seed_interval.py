"""The interval over training seeds of a published difference, from numbers that stand in its table.

    python -m benchmarks.seed_interval --prompts 200 --half-width 0.015 --each 0.016,0.0175,0.0185 -- 0.023 0.022 0.013

The last numbers are the differences of the training seeds. `--half-width` is half the width of their mean's interval
over prompts, `--each` are those of the single seeds. The parts of the variance follow (`mmalign.compare.crossed`):
the spread of the differences gives that of seeds, the half-widths over 1.96 those of prompts; what the prompts of one
training vary by themselves is the difference between the seeds' and the mean's. Without `--each` that part is left in
(the interval is slightly too wide), without `--half-width` the single seeds' widths stand for the mean's (the same).
With `--sd` in place of the differences: their published mean, and standard deviation over `--seeds` seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from mmalign.compare.crossed import CrossedMean

NORMAL = 1.959964


def from_published(
    deltas: Sequence[float], prompts: int, half_width: float | None = None, each: Sequence[float] = ()
) -> CrossedMean:
    """Return the mean with the parts of its variance.

    Args:
        deltas: the difference of each training seed, at least two.
        prompts: the number of prompts, or of families of questions.
        half_width: half the width of the 95 % interval over prompts of the mean difference.
        each: the same of every training seed.

    Raises:
        ValueError: neither half_width nor each.
    """
    seeds = len(deltas)
    single = float(np.mean(np.square(each))) / NORMAL**2 if len(each) else None
    if half_width is None and single is None:
        raise ValueError("give half_width, each, or both")
    mean = single if half_width is None else (half_width / NORMAL) ** 2
    assert mean is not None
    rest = 0.0 if single is None else max(single - mean, 0.0) / (seeds - 1)
    of_seeds = float(np.var(deltas, ddof=1)) / seeds
    return CrossedMean(float(np.mean(deltas)), of_seeds, float(max(mean - rest, 0.0)), seeds, prompts)


def from_spread(mean: float, sd: float, seeds: int, prompts: int, half_width: float) -> CrossedMean:
    """Return the same from the mean difference and its standard deviation over the seeds."""
    return CrossedMean(mean, sd**2 / seeds, (half_width / NORMAL) ** 2, seeds, prompts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the mean, its interval and its p-value."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("deltas", type=float, nargs="+", help="the differences of the seeds; with --sd their mean")
    parser.add_argument("--prompts", type=int, required=True, help="prompts, or families of questions")
    parser.add_argument("--half-width", type=float, help="half the interval of the mean over prompts")
    parser.add_argument("--each", type=lambda text: [float(part) for part in text.split(",")], default=[])
    parser.add_argument("--sd", type=float, help="standard deviation over the training seeds")
    parser.add_argument("--seeds", type=int, default=3, help="number of training seeds behind --sd")
    given = parser.parse_args(arguments)
    if given.sd is not None:
        if given.half_width is None or len(given.deltas) != 1:
            parser.error("--sd takes one mean difference and --half-width")
        estimate = from_spread(given.deltas[0], given.sd, given.seeds, given.prompts, given.half_width)
    elif len(given.deltas) < 2 or (given.half_width is None and not given.each):
        parser.error("give at least two differences, and --half-width, --each or both")
    else:
        estimate = from_published(given.deltas, given.prompts, given.half_width, given.each)
    low, high = estimate.interval()
    print(f"{estimate.mean:+.4f} [{low:+.4f}, {high:+.4f}], p = {estimate.p_value():.4f}")


if __name__ == "__main__":
    main()
