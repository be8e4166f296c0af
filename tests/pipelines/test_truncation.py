from __future__ import annotations

import math
from collections import Counter
from statistics import NormalDist
from typing import Any

import pytest
import torch

from pipelines import PipelineError, Truncation
from pipelines.truncation import MODES


def draws(steps: int, count: int, **options: Any) -> list[tuple[int, ...]]:
    truncation, rng = Truncation(**options), torch.Generator().manual_seed(0)
    return [truncation.draw(steps, rng) for _ in range(count)]


def assert_distributed(found: Counter[Any], expected: dict[Any, float]) -> None:
    """Every outcome is as frequent as expected, to 4.5 standard deviations, and there is no other."""
    count = sum(found.values())
    assert set(found) <= set(expected) and sum(expected.values()) == pytest.approx(1.0)
    for outcome, chance in expected.items():
        assert abs(found[outcome] - count * chance) < 4.5 * math.sqrt(count * chance * (1 - chance)) + 1, outcome


def test_modes_without_chance() -> None:
    assert draws(5, 2, mode="full") == [(0, 1, 2, 3, 4)] * 2
    assert draws(5, 1, mode="last-k") == draws(5, 1, mode="low-variance") == [(4,)]
    assert draws(5, 1, mode="last-k", k=3) == [(2, 3, 4)]
    assert draws(5, 1, mode="last-k", k=5) == draws(5, 1, mode="full")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_a_draw_depends_on_the_seed_alone_and_trains_something(mode: str, steps: int) -> None:
    torch.manual_seed(1)
    once = draws(steps, 20, mode=mode)
    torch.manual_seed(2)
    assert draws(steps, 20, mode=mode) == once
    assert all(kept and list(kept) == sorted(set(kept)) and set(kept) <= set(range(steps)) for kept in once)


def test_uniform_is_one_k_from_one_to_all() -> None:
    found = Counter(draws(6, 6000, mode="uniform"))
    assert_distributed(found, {tuple(range(6 - k, 6)): 1 / 6 for k in range(1, 7)})


@pytest.mark.parametrize("steps", [50, 10])
def test_gaussian_is_a_normal_cut_between_the_second_step_and_the_last(steps: int) -> None:
    """N(42, 5) of 50, truncated to whole numbers in 1..49; the same fractions for fewer steps."""
    normal = NormalDist(0.84 * steps, 0.1 * steps)
    inside = normal.cdf(steps) - normal.cdf(1)
    expected = {cut: (normal.cdf(cut + 1) - normal.cdf(cut)) / inside for cut in range(1, steps)}
    kept = draws(steps, 6000, mode="gaussian")
    assert all(steps_kept == tuple(range(steps_kept[0], steps)) for steps_kept in kept)
    assert_distributed(Counter(steps_kept[0] for steps_kept in kept), expected)
    narrow = draws(steps, 50, mode="gaussian", mean=0.55, std=1e-3)
    assert {steps_kept[0] for steps_kept in narrow} == {math.floor(0.55 * steps)}


def test_bernoulli_keeps_each_of_fifty_steps_by_its_own_chance() -> None:
    count = 4000
    kept = draws(50, count, mode="bernoulli")
    frequency = Counter(step for steps_kept in kept for step in steps_kept)
    square = 0.0
    for step in range(50):
        chance = (step + 1) / 51
        deviation = math.sqrt(count * chance * (1 - chance))
        assert abs(frequency[step] - count * chance) < 4.5 * deviation
        square += ((frequency[step] - count * chance) / deviation) ** 2
    # A sum of 50 squares of standard normals: 50 +- 10.
    assert 15 < square < 105
    # The number kept: mean sum_i p_i = 25, and variance sum_i p_i (1 - p_i) = 50 * 52 / (6 * 51) if independent.
    sizes = torch.tensor([float(len(steps_kept)) for steps_kept in kept])
    variance = 50 * 52 / (6 * 51)
    assert abs(sizes.mean().item() - 25) < 4.5 * math.sqrt(variance / count)
    assert sizes.var().item() == pytest.approx(variance, rel=0.12)


def test_bernoulli_never_keeps_nothing() -> None:
    """Of two steps 2/9 of the draws would keep none; the others keep their proportions 1 : 4 : 2."""
    assert_distributed(Counter(draws(2, 4000, mode="bernoulli")), {(0,): 1 / 7, (1,): 4 / 7, (0, 1): 2 / 7})


def test_refl_is_one_late_step() -> None:
    assert_distributed(Counter(draws(40, 4000, mode="refl")), {(step,): 1 / 10 for step in range(30, 40)})
    assert {step for (step,) in draws(100, 300, mode="refl", low=0.29, high=0.31)} == {29, 30}
    assert {step for (step,) in draws(3, 50, mode="refl")} == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "last_k"}, "truncation 'last_k' is unknown.*Did you mean 'last-k'"),
        ({"mode": "last-k", "k": 0}, "k of a truncation must be at least 1, got 0"),
        ({"mode": "last-k", "k": 9}, "keeps 9 steps of 8; lower k"),
        ({"mode": "low-variance", "repeats": 0}, "repeats of a truncation must be at least 1"),
        ({"mode": "gaussian", "std": 0.0}, "std > 0"),
        ({"mode": "gaussian", "mean": -5.0, "std": 0.01}, "never cuts within 8 steps"),
        ({"mode": "refl", "low": 0.9, "high": 0.9}, "0 <= low < high <= 1"),
        ({"mode": "refl", "high": 1.5}, "0 <= low < high <= 1"),
    ],
)
def test_wrong_options_are_one_clear_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message) as caught:
        draws(8, 1, **options)
    assert "\n" not in str(caught.value)
