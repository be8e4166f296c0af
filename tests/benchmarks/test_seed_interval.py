"""The interval over seeds from published numbers is that from the scores."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.seed_interval import NORMAL, from_published, from_spread, main
from mmalign.compare.crossed import crossed_mean


def test_published_numbers_give_the_parts_of_the_scores() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.02, 0.1, (200, 1)) + rng.normal(0, 0.01, 3) + rng.normal(0, 0.08, (200, 3))
    direct = crossed_mean(values)
    half_width = NORMAL * values.mean(axis=1).std(ddof=1) / 200**0.5
    each = NORMAL * values.std(axis=0, ddof=1) / 200**0.5
    deltas = values.mean(axis=0)
    found = from_published(list(deltas), 200, half_width, list(each))
    assert (found.mean, found.of_seeds) == pytest.approx((direct.mean, direct.of_seeds))
    assert found.of_prompts == pytest.approx(direct.of_prompts)
    # Without the single seeds' widths their part of the variance stays in: not narrower.
    wider = from_published(list(deltas), 200, half_width)
    assert found.half_width() < wider.half_width() < 1.2 * found.half_width()
    spread = from_spread(direct.mean, deltas.std(ddof=1), 3, 200, half_width)
    assert spread.interval() == pytest.approx(wider.interval())
    with pytest.raises(ValueError, match="half_width, each, or both"):
        from_published([0.1, 0.2], 200)


def test_the_command_prints_the_interval(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--prompts", "200", "--half-width", "0.018", "--", "-0.033", "-0.032", "-0.080"])
    assert capsys.readouterr().out == "-0.0483 [-0.1164, +0.0197], p = 0.0973\n"
    with pytest.raises(SystemExit):
        main(["--prompts", "200", "--sd", "0.1", "--", "0.1"])
