"""Scores by votes: the share of the comparisons with the other samples of a prompt that each wins."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from tiny_runs import Brightness

from mmalign.core.io.items import Item
from mmalign.scoring import votes
from mmalign.scoring.choice import WeightedReward, weighted_total
from mmalign.scoring.votes import score_by_votes, vote_shares


class Darkness(Brightness):
    """Brightness, of which less is better."""

    name = "darkness"
    higher_is_better = False


class Broken(Brightness):
    """Brightness, but nothing where all is black."""

    def score(self, media: Any, prompts: Any, references: Any) -> Any:
        scores = super().score(media, prompts, references)
        return scores.where(scores > 0, math.nan)


class Judge(Brightness):
    """Compares in a circle: each beats the one before it; says how many pairs it was asked about at a time."""

    name = "judge"
    compares_pairs: ClassVar[bool] = True
    calls: ClassVar[list[int]] = []

    def pairwise(self, first: Any, second: Any, *, prompts: Any = None, references: Any = None) -> Any:
        self.calls.append(len(first))
        levels = [[round(float(one.max()) * 255) for one in side] for side in (first, second)]
        return torch.tensor([1.0 if (a - b) % 3 == 1 else -1.0 for a, b in zip(*levels, strict=True)])


def items(levels: list[int], sizes: list[int] | None = None) -> list[Item]:
    made = []
    for number, level in enumerate(levels):
        side = (sizes or [8] * len(levels))[number]
        image = torch.full((3, side, side), level, dtype=torch.uint8)
        made.append(Item(str(number), png(image), "a star", extra=SimpleNamespace(group="a star")))
    return made


def png(image: torch.Tensor) -> bytes:
    from mmalign.core.io.images import encode_png

    return encode_png(image.float() / 255)


def totals(reward: Any, *given: Any) -> list[float]:
    entry = WeightedReward(reward.name, 1.0, reward)
    return [weighted_total(one.scores, [entry]) for one in score_by_votes(items(*given), [entry])]


def test_shares_of_votes_are_means_of_wins() -> None:
    nan = float("nan")
    given = torch.tensor([[0.0, 1.0, 0.5], [-1.0, 0.0, nan], [-0.5, nan, 0.0]])
    assert vote_shares(given).tolist() == [(1.0 + 0.75) / 2, (0.0 + 0.5) / 2, (0.25 + 0.5) / 2]


def test_scores_win_tie_or_break() -> None:
    """Ranks 2, 0, 1/2 and 1/2 ties; less is better the other way round; a score that is no number has no share."""
    levels = [200, 10, 90, 90]
    assert totals(Brightness(), levels) == pytest.approx([1.0, 0.0, 0.5, 0.5])
    assert totals(Darkness(), levels) == pytest.approx([0.0, 1.0, 0.5, 0.5])
    assert totals(Brightness(batch_size=1), levels, [8, 16, 8, 16]) == pytest.approx([1.0, 0.0, 0.5, 0.5])
    assert all(map(math.isnan, totals(Broken(), [200, 0, 90])))
    assert totals(Broken(), [200, 1, 90]) == pytest.approx([1.0, 0.0, 0.5])


def test_a_judge_that_goes_in_circles_prefers_none_and_is_asked_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    Judge.calls.clear()
    assert totals(Judge(), [0, 1, 2]) == [0.5, 0.5, 0.5]
    assert totals(Judge(batch_size=2), [3, 4]) == [0.0, 1.0]
    assert totals(Judge(batch_size=2), [0, 1, 2]) == [0.5, 0.5, 0.5]
    monkeypatch.setattr(votes, "BATCH_PIXELS", 2 * 64)  # one pair of 8 x 8
    assert totals(Judge(), [0, 1, 2], [8, 4, 8]) == [0.5, 0.5, 0.5]
    assert Judge.calls == [3, 1, 2, 1, 1, 1, 1]
