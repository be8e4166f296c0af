"""What advantages in a group are taken of: sums, each reward by itself, and comparisons, also by a judge of pairs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_rounds import Redness, collect, prompts
from tiny_runs import BRIGHTNESS, Brightness, exact_run, losses, online_config

from mmalign.config.run import load_config
from mmalign.core.cost import Cost
from mmalign.core.errors import UserError
from mmalign.losses.advantages import Spread, each_group_advantages, group_advantages
from mmalign.methods import methods
from mmalign.methods.run import Run
from mmalign.scoring.choice import WeightedReward
from mmalign.scoring.live import LiveRewards
from mmalign.training.train import train
from rewards import Reward, TwoTowerReward

NFT: dict[str, Any] = {"sampling_steps": 3, "images_per_prompt": 4, "levels": 1}
DDPO: dict[str, Any] = {"sampling_steps": 3, "images_per_prompt": 4, "advantage": "group", "guidance": 1.0}
FLOW_GRPO: dict[str, Any] = {"sampling_steps": 3, "images_per_prompt": 4, "window": {"size": 1, "range": [0, 2]}}


class Nothing(Reward):
    """Scores that are no numbers."""

    name = "nothing"

    def score(self, media: Any, prompts: Any, references: Any) -> Any:
        return media.mean((1, 2, 3)) * torch.nan


class Judge(Reward):
    """Says of two images which is brighter; of two that are nearly equal, nothing; it has no scores."""

    name = "judge"
    needs = frozenset({"prompts"})
    compares_pairs = True

    def score(self, media: Any, prompts: Any, references: Any) -> Any:
        raise AssertionError("a judge of pairs was asked for scores")

    def pairwise(self, first: Any, second: Any, *, prompts: Any = None, references: Any = None) -> Any:
        assert len(prompts) == len(first) == len(second) and len(set(prompts)) == 1
        gap = (first - second).mean((1, 2, 3))
        return torch.where(gap.abs() < 0.05, torch.nan, gap.sign())


class Colour(TwoTowerReward):
    """A function of the mean colour that sets small images apart is the embedding."""

    name = "colour"

    def encode_media(self, media: Any) -> Any:
        return torch.sin(1000 * media.mean((2, 3)))

    def encode_prompts(self, prompts: Any) -> Any:
        return torch.ones(len(prompts), 3)

    def compare(self, cosine: Any) -> Any:
        return cosine


@pytest.fixture
def run(model: str) -> Run:
    rewards = [WeightedReward("brightness", 1.0, Brightness()), WeightedReward("redness", 0.5, Redness())]
    return exact_run(model, rewards=rewards)


def make(name: str, run: Run, **options: Any) -> Any:
    chosen = methods.get(name)
    method: Any = chosen(chosen.Config(**options))
    method.begin(run)
    return method


@pytest.mark.parametrize(("name", "options"), [("nft", NFT), ("ddpo", DDPO)])
def test_each_reward_is_normalised_in_its_group(run: Run, name: str, options: dict[str, Any]) -> None:
    drawn = collect(run, make(name, run, **options, advantage_of="each"))
    texts = [text for one in drawn for text in one.samples.prompts]
    columns = torch.stack([torch.cat([one.parts[key] for one in drawn]) for key in ("brightness", "redness")], dim=1)
    expected = each_group_advantages(texts, columns, [1.0, -0.5])
    torch.testing.assert_close(torch.cat([one.advantages for one in drawn]), expected, rtol=1e-5, atol=1e-6)
    summed = collect(run, make(name, run, **options))
    assert not torch.allclose(torch.cat([one.advantages for one in summed]), expected, atol=1e-2)


@pytest.mark.parametrize(("name", "options"), [("nft", NFT), ("ddpo", DDPO)])
def test_win_rates_of_scores(run: Run, name: str, options: dict[str, Any]) -> None:
    margin = 2e-4
    drawn = collect(run, make(name, run, **options, advantage_of="win_rate", tie_margin=margin))
    for one in drawn:
        expected = torch.zeros(8)
        for key, weight, sign in (("brightness", 1.0, 1), ("redness", 0.5, -1)):
            scores = (sign * one.parts[key]).tolist()
            for i in range(8):
                others = [j for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
                won = [0.5 if abs(scores[i] - scores[j]) <= margin else float(scores[i] > scores[j]) for j in others]
                expected[i] += weight * sum(won) / 3
        torch.testing.assert_close(one.rewards, expected)
    spread = Spread("batch" if name == "nft" else "group")
    texts = [text for one in drawn for text in one.samples.prompts]
    told = group_advantages(texts, torch.cat([one.rewards for one in drawn]), spread=spread)
    torch.testing.assert_close(torch.cat([one.advantages for one in drawn]), told)


def test_gaps_below_the_margin_teach_nothing(run: Run) -> None:
    drawn = collect(run, make("nft", run, **NFT, advantage_of="win_rate", tie_margin=1e3))
    assert all(one.advantages.tolist() == [0.0] * 8 for one in drawn)


def test_a_judge_of_pairs_is_asked_once_about_each_pair_of_a_group() -> None:
    shades = torch.tensor([0.1, 0.5, 0.52, 0.9, 0.3, 0.2, 0.6, 0.31]).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    cost = Cost()
    cost.start()
    live = LiveRewards([WeightedReward("judge", 2.0, Judge())], cost)
    found = live.win_rates(shades, ["a"] * 4 + ["b"] * 4, 4, 0.0)
    rates = torch.tensor([0.0, 0.5, 0.5, 1.0, 1.5 / 3, 0.0, 1.0, 1.5 / 3])
    torch.testing.assert_close(found.parts["judge"], rates)
    torch.testing.assert_close(found.total, 2 * rates)
    assert cost.reward_calls == 12


def test_a_score_that_is_no_number_is_refused_and_not_a_tie() -> None:
    live = LiveRewards([WeightedReward("nothing", 1.0, Nothing())], Cost())
    with pytest.raises(UserError, match="reward 'nothing' gave nan for an image of 'a'"):
        live.win_rates(torch.rand(2, 3, 4, 4), ["a", "a"], 2, 0.1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nft", {**NFT, "advantage_of": "win_rate"}, "go together"),
        ("nft", {**NFT, "tie_margin": 0.1}, "go together"),
        ("ddpo", {**DDPO, "advantage": "running", "advantage_of": "each"}, "is for advantage: group"),
        ("ddpo", {**DDPO, "advantage": "running", "advantage_diversity": "clip"}, "diversity is for advantage: group"),
    ],
)
def test_options_that_contradict_each_other_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        methods.get(name).Config(**options)


@pytest.mark.parametrize(("name", "options"), [("nft", NFT), ("ddpo", DDPO), ("flow_grpo", FLOW_GRPO)])
def test_good_images_count_by_their_distance_to_the_nearest(model: str, name: str, options: dict[str, Any]) -> None:
    rewards = [WeightedReward("brightness", 1.0, Brightness()), WeightedReward("colour", 0.0, Colour())]
    plain = collect(exact_run(model, rewards=rewards), make(name, exact_run(model, rewards=rewards), **options))
    run = exact_run(model, rewards=rewards)
    seen: list[torch.Tensor] = []
    run.viewers.append(lambda images, prompts: seen.append(images))
    drawn = collect(run, make(name, run, **options, advantage_diversity="colour"))
    for before, after, images in zip(plain, drawn, seen, strict=True):
        units = torch.nn.functional.normalize(torch.sin(1000 * images.double().mean((2, 3))))
        for first in (0, 4):
            rows = range(first, first + 4)
            nearest = [min(1 - float(units[i] @ units[j]) for j in rows if j != i) for i in rows]
            for i, distance in zip(rows, nearest, strict=True):
                advantage = float(before.advantages[i])
                factor = distance / (sum(nearest) / 4) if advantage > 0 else 1.0
                assert float(after.advantages[i]) == pytest.approx(advantage * factor, rel=1e-2, abs=1e-3)
    assert any(not torch.allclose(a.advantages, b.advantages) for a, b in zip(plain, drawn, strict=True))


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (
            [BRIGHTNESS],
            "advantage_diversity: 'shapes-clip' is not among `rewards`; add {name: shapes-clip, weight: 0}",
        ),
        ([BRIGHTNESS, "shapes-quality"], "advantage_diversity: 'shapes-quality' embeds no images"),
    ],
)
def test_features_are_those_of_a_reward_that_embeds(
    model: str, tmp_path: Path, rewards: list[str], message: str
) -> None:
    method = {"name": "nft", **NFT, "advantage_diversity": "shapes-clip" if len(rewards) == 1 else rewards[1]}
    given = {"model": model, "method": method, "data": {"prompts": "shapes-train"}, "rewards": rewards}
    with pytest.raises(UserError, match=re.escape(message)):
        load_config({**given, "output": str(tmp_path)})


def test_a_run_with_each_reward_by_itself(model: str, tmp_path: Path) -> None:
    method = {"name": "nft", **NFT, "advantage_of": "each"}
    rewards = [{"name": "tiny_runs:Brightness"}, {"name": "tiny_rounds:Redness", "weight": 0.5}]
    output = train(online_config(model, tmp_path, method, rewards=rewards, steps=2))
    assert set(losses(output, "reward/tiny_rounds:Redness")) == {1, 2}


def test_prompts_of_one_batch_are_groups_of_their_own(run: Run) -> None:
    method = make("nft", run, **NFT, advantage_of="win_rate", tie_margin=0.0)
    (one,) = method.collect(run, [prompts(run, "a red circle", "a star")])
    torch.testing.assert_close(one.rewards.reshape(2, 4).mean(1), torch.full((2,), 0.75))  # half of 1 + 0.5
