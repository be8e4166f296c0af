"""Rewards that are functions of other rewards: how options name these, and which of their facts are inherited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewards.base import Reward
from rewards.errors import RewardError
from rewards.registry import load_reward


def load_inner(spec: Any, common: Mapping[str, Any]) -> Reward:
    """Return the reward given by a name, by a mapping of options with `name`, or by a reward itself.

    common: options of the whole (device, dtype) that hold unless the mapping says otherwise.
    """
    options = {"name": spec} if isinstance(spec, (str, Reward)) else spec
    if not isinstance(options, Mapping) or "name" not in options:
        raise RewardError(f"{spec!r} is not a reward; give a name, or options as a mapping with `name`")
    options = dict(options)
    named = options.pop("name")
    if not isinstance(named, Reward):
        return load_reward(named, **{**common, **options})
    if options:
        raise RewardError(f"{named.name} is already loaded and cannot take the options {sorted(options)}; remove them")
    return named


def inherit_facts(whole: Reward, inner: Sequence[Reward]) -> None:
    """Set the facts that follow from the inner rewards; all of them must score one kind of media."""
    modalities = sorted({reward.modality for reward in inner})
    if len(modalities) > 1:
        kinds = " and ".join(f"{modality}s" for modality in modalities)
        raise RewardError(f"{whole.name}: its rewards score {kinds}; all must score one kind of media")
    whole.modality = modalities[0]
    whole.needs = frozenset().union(*(reward.needs for reward in inner))
    whole.differentiable = all(reward.differentiable for reward in inner)
    whole.batch_invariant = all(reward.batch_invariant for reward in inner)
    whole.derived_from = frozenset().union(*({reward.name} | reward.derived_from for reward in inner))
    whole.licence = "; ".join(dict.fromkeys(f"{reward.name}: {reward.licence}" for reward in inner))
    whole.source = "; ".join(dict.fromkeys(f"{reward.name}: {reward.source}" for reward in inner))
    whole.files = tuple(dict.fromkeys(file for reward in inner for file in reward.files))
