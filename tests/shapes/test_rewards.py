"""The oracle as rewards: the same numbers through the plug-in door."""

from __future__ import annotations

import pytest
import torch

from mmalign.shapes.world import Object, Scene, render
from rewards import load_reward, reward_class
from rewards.errors import RewardError


def media(*objects: Object) -> torch.Tensor:
    return torch.from_numpy(render(Scene(objects, "white"))).permute(2, 0, 1)[None].float() / 255


RED = Object("circle", "red", "small", 20, 20, 8.5)


def test_rewards_by_name_agree_with_the_oracle() -> None:
    images = torch.cat([media(RED), media()])
    prompts = ["a red circle", "a red circle"]
    assert load_reward("shapes-correctness")(images, prompts=prompts).tolist() == [1.0, 0.0]
    assert load_reward("shapes-strict")(images[:1], prompts=["a blue circle"]).tolist() == [0.0]
    assert load_reward("shapes-quality")(images[:1]).item() > 0.97


def test_other_sizes_are_refused() -> None:
    with pytest.raises(RewardError, match="64x64"):
        load_reward("shapes-quality")(torch.zeros(1, 3, 32, 32))


def test_prompts_outside_the_grammar_are_told_by_the_rewards_that_read_them() -> None:
    prompts = ["a red circle", "a giraffe", "two zebras"]
    for name in ("shapes-correctness", "shapes-strict"):
        reward_class(name).check_prompts(prompts[:1])
        with pytest.raises(RewardError, match=f"{name} cannot score 2 of 3 prompts: Shapes cannot read 'giraffe'"):
            reward_class(name).check_prompts(prompts)
    for name in ("shapes-quality", "shapes-clip"):
        reward_class(name).check_prompts(prompts)


def test_strict_counts_as_trained_on_when_correctness_was() -> None:
    assert load_reward("shapes-strict").facts.derived_from == ("shapes-correctness",)
    assert load_reward("shapes-quality").facts.derived_from == ()
