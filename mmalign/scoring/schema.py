"""The YAML form of a choice of rewards, read as strictly as a training config."""

from __future__ import annotations

from pydantic import Field

from mmalign.config.run import load_schema
from mmalign.config.sections import RewardConfig, StrictModel
from mmalign.scoring.choice import Choice


class ScoreReward(RewardConfig):
    """One reward that scores."""

    weight: float | None = None  # type: ignore[assignment]
    """factor in the weighted sum; null everywhere: there is no sum"""
    label: str = ""
    """label of the scores; empty: the reward's name (needed where one reward is used twice)"""


class ScoreRewards(StrictModel):
    """A file of rewards."""

    rewards: list[ScoreReward] = Field(min_length=1)
    """the rewards, in the order of the columns"""


def read_yaml(path: str) -> list[Choice]:
    """Read a YAML file of rewards.

    Raises:
        UserError: it cannot be read, or anything in it is wrong: one line a fault, all of them.
    """
    read = load_schema(ScoreRewards, path)
    return [Choice(one.name, one.label or one.name, one.weight, one.options) for one in read.rewards]
