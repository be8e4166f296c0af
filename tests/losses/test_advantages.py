"""Advantages by hand and against NumPy: when a prompt's own rewards are used, which are forgotten, what gives 0."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.losses.advantages import (
    PromptStatistics,
    Spread,
    each_group_advantages,
    favour_novelty,
    group_advantages,
    novelty,
    win_rates,
)


def rewards_of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


TINY = Spread(epsilon=1e-8, floor=0.0)
"""So that the deviation alone matters, to the digits compared."""


def by_numpy(values: list[float], pool: list[float]) -> list[float]:
    return [(value - np.mean(pool)) / (np.std(pool) + 1e-4) for value in values]


def test_a_hand_written_sequence_with_minimum_and_eviction() -> None:
    statistics = PromptStatistics(buffer_size=4, min_count=3, clip=None, spread=TINY)
    # Two rewards each are too few: both prompts are judged by the batch, mean 3, variance (4 + 1 + 0 + 9) / 4.
    first = statistics.advantages(["cat", "dog", "cat", "dog"], rewards_of(1.0, 2.0, 3.0, 6.0))
    assert first.tolist() == pytest.approx([value / math.sqrt(3.5) for value in (-2, -1, 0, 3)], rel=1e-7)
    # The cat's third and fourth reward count already: 1, 3, 5, 7 have mean 4 and variance 5. The dog holds 2, 6 and
    # 10: mean 6, variance 32/3. A prompt never met is judged by the batch 5, 7, 10, 2: mean 6, variance 8.5.
    second = statistics.advantages(["cat", "cat", "dog", "fox"], rewards_of(5.0, 7.0, 10.0, 2.0))
    expected = [1 / math.sqrt(5), 3 / math.sqrt(5), 4 / math.sqrt(32 / 3), -4 / math.sqrt(8.5)]
    assert second.tolist() == pytest.approx(expected, rel=1e-7)
    # The cat's 1 is forgotten: 3, 5, 7, 17 have mean 8 and variance (25 + 9 + 1 + 81) / 4 = 29.
    third = statistics.advantages(["cat"], rewards_of(17.0))
    assert third.tolist() == pytest.approx([9 / math.sqrt(29)], rel=1e-7)


def test_the_defaults_are_ddpo_s_sixteen_clipped_at_five() -> None:
    statistics = PromptStatistics()
    values = np.random.default_rng(0).normal(size=16).tolist()
    others = np.random.default_rng(1).normal(loc=3.0, size=8).tolist()
    batch = values[:15] + others
    early = statistics.advantages(["cat"] * 15 + ["dog"] * 8, rewards_of(*batch))
    assert early.tolist() == pytest.approx(by_numpy(batch, batch), rel=1e-10)
    sixteenth = statistics.advantages(["cat", "dog"], rewards_of(values[15], 0.5))
    expected = by_numpy(values[15:], values) + by_numpy([0.5], [values[15], 0.5])
    assert sixteenth.tolist() == pytest.approx(expected, rel=1e-10)
    # The eldest goes. One of 16 lies sqrt(15) = 3.87 deviations away at most: the clip at 5 does not bite here.
    outlier = statistics.advantages(["cat"], rewards_of(100.0))
    assert outlier.tolist() == pytest.approx(by_numpy([100.0], values[1:] + [100.0]), rel=1e-10)


def test_the_clip_holds_on_both_sides_and_none_switches_it_off() -> None:
    # One reward away from 63 equal ones: (64 - 1) / sqrt(64 - 1) deviations.
    values = [1.0] + [0.0] * 63
    prompts = [f"prompt {i}" for i in range(64)]
    for sign in (1.0, -1.0):
        rewards = sign * rewards_of(*values)
        assert PromptStatistics(clip=None, spread=TINY).advantages(prompts, rewards)[0].item() == pytest.approx(
            sign * math.sqrt(63), rel=1e-6
        )
        clipped = PromptStatistics(spread=TINY).advantages(prompts, rewards)
        assert clipped[0].item() == sign * 5.0
        assert clipped[1].item() == pytest.approx(-sign / math.sqrt(63), rel=1e-6)


def test_equal_rewards_give_zero_whatever_rounding_makes_of_their_mean() -> None:
    # The mean of three 0.1 is not 0.1 in binary; divided by 1e-8 such a rest would be a preference in float32.
    tenths = torch.full((3,), 0.1)
    assert group_advantages(["cat"] * 3, tenths).tolist() == [0.0] * 3
    statistics = PromptStatistics(buffer_size=2, min_count=2, clip=None)
    assert statistics.advantages(["cat"] * 3, tenths).tolist() == [0.0] * 3
    # The buffer holds 0.1 twice; the 7 that it has forgotten within the batch has no scale to be judged by.
    assert statistics.advantages(["cat"] * 3, torch.tensor([7.0, 0.1, 0.1])).tolist() == [0.0] * 3


def test_group_advantages_by_hand() -> None:
    prompts = ["cat", "dog", "cat", "fox", "dog", "cat", "dog"]
    # cat: 1, 2, 6, mean 3, variance 14/3; dog: equal, no signal; fox: alone.
    result = group_advantages(prompts, rewards_of(1.0, 0.3, 2.0, 9.0, 0.3, 6.0, 0.3), spread=TINY)
    deviation = math.sqrt(14 / 3)
    assert result.tolist() == pytest.approx([-2 / deviation, 0, -1 / deviation, 0, 0, 3 / deviation, 0], rel=1e-7)
    assert result[[1, 3, 4, 6]].tolist() == [0.0] * 4
    clipped = group_advantages(prompts, rewards_of(1.0, 0.3, 2.0, 9.0, 0.3, 6.0, 0.3), clip=0.5, spread=TINY)
    assert clipped[[0, 2, 5]].tolist() == [-0.5, pytest.approx(-1 / deviation, rel=1e-7), 0.5]


def test_group_advantages_have_mean_zero_and_unit_variance_in_every_group() -> None:
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-3 + 0.21
    result = group_advantages([f"prompt {i % 4}" for i in range(24)], rewards, spread=TINY).view(6, 4)
    torch.testing.assert_close(result.mean(0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(result.var(0, correction=0), torch.ones(4, dtype=torch.float64), rtol=1e-3, atol=0)


def test_a_resumed_run_goes_on_with_the_same_numbers() -> None:
    source = np.random.default_rng(2)
    prompts = ["cat", "dog", "a “fox”\n", "cat"]
    first, resumed = (PromptStatistics(buffer_size=5, min_count=3) for _ in range(2))
    for _ in range(4):
        first.advantages(prompts, torch.from_numpy(source.normal(size=4)))
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert resumed.state_dict() == first.state_dict()
    rewards = torch.from_numpy(source.normal(size=4))
    assert torch.equal(first.advantages(prompts, rewards), resumed.advantages(prompts, rewards))
    shorter = PromptStatistics(buffer_size=2, min_count=2)
    shorter.load_state_dict(first.state_dict())
    assert shorter.state_dict()["rewards"]["cat"] == first.state_dict()["rewards"]["cat"][-2:]


def test_a_state_is_a_copy() -> None:
    statistics = PromptStatistics(buffer_size=2, min_count=1)
    statistics.advantages(["cat"], rewards_of(1.0))
    state = statistics.state_dict()
    statistics.advantages(["cat"], rewards_of(2.0))
    assert state == {"rewards": {"cat": [1.0]}}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_precision_is_that_of_the_rewards_but_never_half(dtype: torch.dtype) -> None:
    rewards = torch.tensor([0.0, 4.0], dtype=dtype, requires_grad=True)
    statistics = PromptStatistics(spread=TINY)
    by_group = group_advantages(["cat"] * 2, rewards, spread=TINY)
    for result in (by_group, statistics.advantages(["cat", "dog"], rewards)):
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert result.tolist() == pytest.approx([-1, 1], abs=1e-7) and not result.requires_grad


def test_a_reward_that_is_not_finite_is_refused_before_it_is_remembered() -> None:
    statistics = PromptStatistics(min_count=1)
    for broken in (math.nan, math.inf):
        with pytest.raises(ValueError, match="'dog' is (nan|inf)"):
            statistics.advantages(["cat", "dog"], rewards_of(1.0, broken))
        with pytest.raises(ValueError, match="'dog' is (nan|inf)"):
            group_advantages(["cat", "dog"], rewards_of(1.0, broken))
    assert statistics.state_dict() == {"rewards": {}}


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="min_count=17.*buffer_size=16"):
        PromptStatistics(min_count=17)
    with pytest.raises(ValueError, match="min_count=0"):
        PromptStatistics(min_count=0)
    with pytest.raises(ValueError, match="clip=0"):
        PromptStatistics(clip=0.0)
    with pytest.raises(ValueError, match="clip=-1"):
        group_advantages(["cat"], rewards_of(1.0), clip=-1.0)
    with pytest.raises(ValueError, match=r"2 prompts and rewards of shape \(3,\)"):
        PromptStatistics().advantages(["cat", "dog"], rewards_of(1.0, 2.0, 3.0))


def test_what_the_difference_is_divided_by() -> None:
    """cat: 1, 3, mean 2, deviation 1. dog: 10, 18, mean 14, deviation 4. All: mean 8, variance 178 / 4."""
    prompts, rewards = ["cat", "dog", "cat", "dog"], rewards_of(1.0, 10.0, 3.0, 18.0)
    every = math.sqrt((49 + 4 + 25 + 100) / 4)
    for std, expected in (
        ("group", [-1.0, -1.0, 1.0, 1.0]),
        ("batch", [-1 / every, -4 / every, 1 / every, 4 / every]),
        ("none", [-1.0, -4.0, 1.0, 4.0]),
    ):
        found = group_advantages(prompts, rewards, spread=Spread(std, epsilon=0.0, floor=0.0))
        assert found.tolist() == pytest.approx(expected, rel=1e-12)
    statistics = PromptStatistics(buffer_size=2, min_count=2, clip=None, spread=Spread("batch", 0.0, 0.0))
    assert statistics.advantages(prompts, rewards).tolist() == pytest.approx(
        [-1 / every, -4 / every, 1 / every, 4 / every]
    )


@pytest.mark.parametrize("reward", [0.27, 21.0, -1500.0])
def test_rewards_that_differ_by_rounding_are_no_preference(reward: float) -> None:
    """One unit in the last place of float32; with 1e-8 and no floor the advantages were of order 1."""
    first = torch.tensor(reward)
    rewards = torch.stack([first, torch.nextafter(first, torch.tensor(math.inf))])
    assert rewards[0] != rewards[1]
    found = group_advantages(["cat"] * 2, rewards)
    assert 0 < found.abs().max() < 0.01
    assert group_advantages(["cat"] * 2, rewards, spread=TINY).abs().max() > 0.5


def test_epsilon_and_floor_by_hand() -> None:
    rewards = rewards_of(100.0, 102.0)  # deviation 1, largest 102
    for epsilon, floor, deviation in ((0.5, 0.0, 1.5), (0.0, 0.1, 10.2), (0.5, 0.1, 10.7), (0.0, 0.001, 1.0)):
        found = group_advantages(["cat"] * 2, rewards, spread=Spread("group", epsilon, floor))
        assert found.tolist() == pytest.approx([-1 / deviation, 1 / deviation], rel=1e-12)
    for options, message in (
        ({"std": "prompt"}, "must be one of group, batch, none"),
        ({"epsilon": -1.0}, "must be finite and not negative"),
        ({"floor": math.inf}, "must be finite and not negative"),
    ):
        with pytest.raises(ValueError, match=message):
            Spread(**options)  # type: ignore[arg-type]


def test_gdpo_tells_apart_groups_in_which_one_reward_or_two_differ() -> None:
    """Two rollouts, two binary rewards: 0.707 and 1.414 before the batch step; of their sum, 0.707 in both."""
    prompts, values = ["a", "a", "b", "b"], torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    found = each_group_advantages(prompts, values, [1.0, 1.0], spread=Spread(epsilon=0.0))
    each = [group_advantages(prompts, values[:, k], spread=Spread(epsilon=0.0)) for k in (0, 1)]
    before = (each[0] + each[1]) * 0.5**0.5  # two values: the unbiased deviation is sqrt(2) times the population's
    assert before.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5, -(2**0.5), 2**0.5])
    assert found.tolist() == pytest.approx([x / 1.25**0.5 for x in before.tolist()])
    summed = group_advantages(prompts, values.sum(1), spread=Spread(epsilon=0.0)) * 0.5**0.5
    assert summed.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5] * 2)


def test_gdpo_against_loops_in_numpy() -> None:
    source = np.random.default_rng(0)
    prompts = [f"p{index % 3}" for index in range(15)]
    values = source.normal(size=(15, 3)) * [1.0, 100.0, 1e-3]
    weights, total = [1.0, 0.5, -2.0], np.zeros(15)
    for k in range(3):
        for name in set(prompts):
            rows = [row for row, prompt in enumerate(prompts) if prompt == name]
            group = values[rows, k]
            floor = max(group.std(), 1e-5 * np.abs(group).max())
            total[rows] += weights[k] * (group - group.mean()) / (floor + 1e-4)
    expected = (total - total.mean()) / (total.std() + 1e-4)
    found = each_group_advantages(prompts, torch.from_numpy(values), weights)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-12)
    clipped = each_group_advantages(prompts, torch.from_numpy(values), weights, clip=0.5)
    assert clipped.tolist() == pytest.approx(expected.clip(-0.5, 0.5).tolist(), rel=1e-9, abs=1e-12)


def test_gdpo_is_blind_to_the_scale_of_a_reward_and_flat_groups_stay_exactly_zero() -> None:
    values = torch.tensor(
        [[0.0, 1.0], [1.0, 3.0], [0.5, 2.0], [0.2, 0.2], [0.2, 0.2], [0.2, 0.2]], dtype=torch.float64
    )
    prompts, exact = ["a"] * 3 + ["b"] * 3, Spread(epsilon=0.0)
    found = each_group_advantages(prompts, values, [1.0, 1.0], spread=exact)
    scaled = each_group_advantages(prompts, values * torch.tensor([1e-4, 1e4]), [1.0, 1.0], spread=exact)
    torch.testing.assert_close(found, scaled)
    assert found[3:].tolist() == [0.0] * 3 and found[:3].abs().min() >= 0
    flat = each_group_advantages(prompts, torch.ones(6, 2), [1.0, 1.0], spread=exact)
    assert flat.tolist() == [0.0] * 6


def test_gdpo_of_one_reward_is_the_usual_advantage() -> None:
    prompts, values = ["a", "a", "b", "b"], torch.tensor([0.0, 1.0, 5.0, 2.0])
    for spread in (Spread("group"), Spread("batch"), Spread("none")):
        found = each_group_advantages(prompts, values[:, None], [-2.0], spread=spread)
        assert torch.equal(found, group_advantages(prompts, -2 * values, spread=spread))


def test_win_rates_by_hand() -> None:
    nan = float("nan")
    margins = torch.tensor([[[9, 0.2, -0.2], [-0.2, 9, nan], [0.2, nan, 9]]], dtype=torch.float64)
    assert win_rates(margins).tolist() == [[0.5, 0.25, 0.75]]
    assert win_rates(margins, tie_margin=0.2).tolist() == [[0.5, 0.5, 0.5]]
    scores = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    rates = win_rates(scores.unsqueeze(2) - scores.unsqueeze(1))
    assert torch.equal(rates, scores.argsort(1).argsort(1) / 5)  # the rank
    with pytest.raises(ValueError, match="tie_margin=-1"):
        win_rates(margins, tie_margin=-1.0)
    with pytest.raises(ValueError, match="no comparisons"):
        win_rates(torch.zeros(2, 1, 1))


@pytest.mark.usefixtures("unchecked_shapes")
def test_gdpo_needs_a_column_for_each_weight() -> None:
    with pytest.raises(ValueError, match=r"rewards of shape \(4, 1\); needed: 4 prompts x 2"):
        each_group_advantages(["a"] * 4, torch.ones(4, 1), [1.0, 1.0])


def test_gaps_of_a_millionth_are_a_preference_for_scores_and_a_tie_for_win_rates() -> None:
    scores, prompts = torch.tensor([0.5, 0.5 + 1e-6], dtype=torch.float64), ["a", "a"]
    exact = Spread(epsilon=0.0, floor=0.0)
    assert group_advantages(prompts, scores, spread=exact).tolist() == pytest.approx([-1.0, 1.0])
    margins = (scores.unsqueeze(1) - scores.unsqueeze(0)).unsqueeze(0)
    told = group_advantages(prompts, win_rates(margins).flatten(), spread=exact)
    assert told.tolist() == pytest.approx([-1.0, 1.0])  # without a margin they still decide
    ties = group_advantages(prompts, win_rates(margins, tie_margin=1e-3).flatten(), spread=exact)
    assert ties.tolist() == [0.0, 0.0]


def at_angles(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_novelty_by_hand() -> None:
    """1 - cosine: 0.5 between 0 and 60 degrees, 1.5 between 60 and 180, 2 between 0 and 180."""
    lengths = torch.tensor([[1.0], [3.0], [0.01]], dtype=torch.float64)
    found = novelty(torch.stack([at_angles(0, 60, 180) * lengths, at_angles(0, 0, 90)]))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.6, 1.8], [0.0, 0.0, 3.0]], dtype=torch.float64))


def test_images_that_do_not_differ_and_pairs_have_novelty_one() -> None:
    same = torch.tensor([[0.3, -0.7, 0.2]]).repeat(4, 1) * torch.tensor([1.0, 2.0, 0.5, 3.0])[:, None]
    assert novelty(same.unsqueeze(0)).tolist() == [[1.0] * 4]
    torch.testing.assert_close(novelty(at_angles(10, 70).unsqueeze(0)), torch.ones(1, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="one image has no other"):
        novelty(torch.ones(2, 1, 3))


def test_novelty_favours_good_images_and_never_a_bad_one() -> None:
    """A bad image far from all others keeps its advantage; a reward added for distance would raise it."""
    features, rewards = at_angles(0, 10, 20, 180).unsqueeze(0), rewards_of(1.0, 1.0, 0.5, 0.0)
    plain = group_advantages(["a"] * 4, rewards, spread=Spread("none"))
    found = favour_novelty(plain, novelty(features).flatten())
    near, far = 1 - math.cos(math.radians(10)), 1 - math.cos(math.radians(160))
    alike = 0.375 * near / ((3 * near + far) / 4)
    torch.testing.assert_close(found, rewards_of(alike, alike, -0.125, -0.625))
    summed = group_advantages(["a"] * 4, rewards + 0.2 * novelty(features).flatten(), spread=Spread("none"))
    assert summed[3] > plain[3] == found[3]


def test_novelty_is_clipped_after_the_product() -> None:
    found = favour_novelty(rewards_of(1.0, 1.0, -2.0, 0.0), rewards_of(0.5, 3.0, 0.1, 9.0), clip=1.5)
    assert found.tolist() == [0.5, 1.5, -1.5, 0.0]
